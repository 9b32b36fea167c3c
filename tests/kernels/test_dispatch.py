"""Which backend serves, and what is said when one cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import zorba_kernels as zk
from tests.kernels.conftest import CPU_ISAS, processor_lacks
from zorba_kernels import dispatch
from zorba_kernels.backends import cpu
from zorba_kernels.build import extension


@pytest.fixture(autouse=True)
def unforced(monkeypatch):
    monkeypatch.delenv("ZORBA_BACKEND", raising=False)
    monkeypatch.delenv("ZORBA_CPU_ISA", raising=False)


def one_noise(**call):
    return zk.noise(8, seed=1, stream=2, **call)


def rows(device="cpu"):
    return {row.name: row for row in zk.backends(device)}


def test_backends_lists_all_with_reasons():
    assert list(rows()) == ["cuda", "triton", "cpu", "reference"]  # the oracle is the last resort
    for row in rows().values():
        assert row.available == (row.reason is None)
    assert rows()["cpu"].available, rows()["cpu"].reason
    assert rows()["reference"].available
    assert "meta" in rows("meta")["cpu"].reason
    assert "no values" in rows("meta")["reference"].reason
    assert rows("cuda")["cpu"].reason == "it serves CPU tensors, not cuda"


def test_best_by_default(monkeypatch):
    def served(*args, **kwargs):
        raise AssertionError("served by cpu")

    monkeypatch.setitem(dispatch._registered, "cpu", replace(cpu.BACKEND, noise=served))
    with pytest.raises(AssertionError, match="served by cpu"):
        one_noise()
    one_noise(backend="reference")
    monkeypatch.setenv("ZORBA_BACKEND", "reference")
    one_noise()
    with pytest.raises(AssertionError, match="served by cpu"):
        one_noise(backend="cpu")
    monkeypatch.setenv("ZORBA_BACKEND", "")  # empty variables force nothing
    monkeypatch.setenv("ZORBA_CPU_ISA", "")
    with pytest.raises(AssertionError, match="served by cpu"):
        one_noise()


@pytest.mark.parametrize("name", ["cpu ", "CPU", "opencl"])
def test_unknown_backend(monkeypatch, name):
    monkeypatch.setenv("ZORBA_BACKEND", name)
    for backend in (name, None):
        with pytest.raises(ValueError, match=r"unknown backend .* cpu, reference"):
            one_noise(backend=backend)


@pytest.mark.parametrize("backend", ["cpu", None])
def test_unknown_instruction_set(monkeypatch, backend):
    """Without a backend too: nobody who asks for an instruction set wants the oracle instead."""
    monkeypatch.setenv("ZORBA_CPU_ISA", "avx1024")
    with pytest.raises(zk.BackendUnavailableError, match="ZORBA_CPU_ISA='avx1024'"):
        one_noise(backend=backend)
    assert not rows()["cpu"].available
    with pytest.raises(ValueError, match="avx1024"):
        extension()[0].cpu_isa("avx1024")


@pytest.mark.parametrize("isa", CPU_ISAS)
def test_forced_instruction_set_serves_or_says_why(monkeypatch, isa):
    monkeypatch.setenv("ZORBA_CPU_ISA", isa)
    if processor_lacks(isa):
        with pytest.raises(zk.BackendUnavailableError, match=isa):
            one_noise()
    else:
        one_noise()
        assert extension()[0].cpu_isa(isa) == isa


# What each backend says of tensors that it does not serve.
REFUSED = [
    *((name, "meta", "meta") for name in ("cpu", "reference", None)),
    ("cuda", "cpu", "serves CUDA tensors, not cpu"),
    ("triton", "cpu", "serves GPU tensors, not cpu|cannot be imported"),
]


@pytest.mark.parametrize(("backend", "device", "said"), REFUSED)
def test_tensors_of_other_devices_are_refused(backend, device, said):
    weights = torch.ones(8, device=device)
    table = zk.ParamTable({"w": weights})
    for call in (
        lambda: one_noise(device=device, backend=backend),
        lambda: zk.add_noise_(table, 1, 0.1, backend=backend),
        lambda: zk.fingerprint(table, backend=backend),
    ):
        with pytest.raises(zk.BackendUnavailableError, match=said):
            call()
    assert device == "meta" or bool((weights == 1).all())


def test_the_op_carries_the_names_of_its_module():
    assert callable(zk.noise)
    for name in ("philox4x32", "stream_of", "canonical_name", "NOISE_VERSION", "Distribution"):
        assert hasattr(zk.noise, name)
