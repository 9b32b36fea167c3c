"""The Triton backend on any machine: who cannot run says why, and large tables are tuned once."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.conftest import INTERPRETED
from zorba_kernels.backends import triton, triton_tuning
from zorba_kernels.backends.triton_tuning import SIZES, candidates
from zorba_kernels.backends.triton_variants import variants

if INTERPRETED:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton")

FLAGS = {
    **{"DISTRIBUTION": 0, "STOCHASTIC": False, "MANY": False, "DECAYS": False},
    **{"TILE": 8192, "DTYPE": 1},
}
GPU = torch.device("cuda", 0)


def test_no_value_of_an_argument_leads_to_another_compilation():
    for op in ("add_noise", "noise", "fingerprint"):
        for parameter in triton.kernel(op).params:
            assert parameter.is_constexpr or parameter.do_not_specialize, parameter.name
            assert parameter.is_constexpr or parameter.annotation_type, parameter.name


def test_what_else_is_refused(monkeypatch):
    assert "not meta" in triton.unavailable(torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton.unavailable(GPU) == "torch finds no usable GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert triton.unavailable(torch.device("cuda", 3)) == "there is no GPU 3, only 1"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "capability 8.0" in triton.unavailable(GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert triton.unavailable(GPU) is None


def test_the_interpreter_cannot_be_switched_on_later(monkeypatch):
    triton.kernel("add_noise")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "set it before" in triton.unavailable(torch.device("cpu"))


def test_without_triton_everything_else_works():
    code = """
import sys
sys.modules["triton"] = None
import zorba_kernels as zk
zk.noise(8, seed=1, stream=2)
print({row.name: row.reason for row in zk.backends("cuda")}["triton"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "triton cannot be imported" in done.stdout


# --- Tuning --------------------------------------------------------------------------------------


@pytest.fixture
def tuning(monkeypatch):
    """Measurements that find the second candidate the fastest: the calls, and a fresh memory."""
    calls = []

    def measured(kernel, flags, size, device, rehearse):
        calls.append(size)
        return candidates(flags)[1]

    monkeypatch.setattr(triton_tuning, "_measured", measured)
    monkeypatch.setattr(triton_tuning, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return calls


def choose(elements, flags=FLAGS):
    return triton_tuning.choose(None, flags, elements, GPU, None)


def test_large_tables_are_measured_once(tuning):
    default, other = candidates(FLAGS)[:2]
    assert choose(SIZES[0] - 1) == default
    assert tuning == []
    assert choose(SIZES[0]) == choose(SIZES[1] - 1) == other
    assert choose(1 << 33) == other
    assert tuning == [SIZES[0], SIZES[1]]
    choose(SIZES[0], FLAGS | {"DTYPE": 2})
    assert tuning == [SIZES[0], SIZES[1], SIZES[0]]


def test_a_captured_pass_and_one_without_memory_are_not_measured(tuning, monkeypatch):
    def full(*args):
        tuning.append(args)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(SIZES[0]) == candidates(FLAGS)[0]
    assert tuning == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton_tuning, "_measured", full)
    assert choose(SIZES[0]) == choose(SIZES[0]) == candidates(FLAGS)[0]
    assert len(tuning) == 1


def test_candidates_fit_a_tile():
    for variant in variants(every_candidate=True):
        if variant.op == "add_noise":
            strip, warps = variant.flags["STRIP"], variant.options["num_warps"]
            assert triton_tuning.TILE % strip == 0
            assert strip % (512 * warps) == 0
