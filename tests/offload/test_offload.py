"""Moving blocks between host and device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from zorba import ZerothOrderSGD
from zorba.offload import Offload
from zorba.offload import offload as module
from zorba.tables import DeviceTables, fingerprint

import zorba_kernels as zk
from tests.hf.steps import changed, state_of
from tests.hf.tiny import build, case_of, loss_of

CASE = case_of("llama")


def is_mapped(tensor: torch.Tensor, folder: Path) -> bool:
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            return len(rest) == 5 and rest[-1].startswith(str(folder))
    return False


def test_idle_weights_are_in_files_and_active_ones_in_memory(tmp_path: Path) -> None:
    model = build(CASE)
    with torch.no_grad():
        expected = loss_of(model, CASE)
    with Offload(model, ["model.layers.2"], folder=tmp_path) as offload:
        for name, p in model.named_parameters():
            idle = name.startswith(("model.layers.0.", "model.layers.1."))
            assert is_mapped(p, tmp_path) == idle, name
        with torch.no_grad():
            assert torch.equal(loss_of(model, CASE), expected)
            with offload.streaming():
                assert torch.equal(loss_of(model, CASE), expected)
        assert offload.buffer_bytes >= 2 * sum(p.nbytes for p in model.model.layers[0].parameters())
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "model.layers.0.bin",
            "model.layers.1.bin",
        ]
    assert not list(tmp_path.iterdir())
    assert not any(is_mapped(p, tmp_path) for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(loss_of(model, CASE), expected)


def test_updates_reach_the_file_and_the_next_forward(tmp_path: Path) -> None:
    resident, offloaded = build(CASE), build(CASE)
    groups = {n: int(n.split(".")[2]) for n, _ in resident.named_parameters() if ".layers." in n}
    with Offload(offloaded, ["model.layers.1"], folder=tmp_path) as offload:
        tables = [
            DeviceTables({n: p for n, p in m.named_parameters() if n in groups}, groups)
            for m in (resident, offloaded)
        ]
        for active in (["model.layers.1"], ["model.layers.0", "model.layers.2"], CASE.names, []):
            offload.set_active(active)
            for tables_of in tables:
                for table in tables_of.tables:
                    zk.add_noise_(table, [1, 2], [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
            assert fingerprint(tables[0]) == fingerprint(tables[1])
            with torch.no_grad():
                assert torch.equal(loss_of(resident, CASE), loss_of(offloaded, CASE))
    assert changed(offloaded, state_of(resident)) == []


def test_a_weight_written_between_forwards_is_seen(tmp_path: Path) -> None:
    """Buffers are not trusted outside of ``streaming``."""
    model = build(CASE)
    with Offload(model, [], folder=tmp_path), torch.no_grad():
        before = loss_of(model, CASE)
        weight = model.model.layers[0].mlp.down_proj.weight
        weight.add_(1.0)
        after = loss_of(model, CASE)
        assert not torch.equal(before, after)
        weight.sub_(1.0)


def test_what_cannot_be_offloaded_is_refused(tmp_path: Path) -> None:
    model = build(CASE)
    with pytest.raises(ValueError, match=r"no blocks named model\.layers\.9"):
        Offload(model, ["model.layers.9"], folder=tmp_path)
    with pytest.raises(ValueError, match="give folder="):
        Offload(model, [])
    with Offload(model, [], folder=tmp_path) as offload:
        with pytest.raises(ValueError, match="already"):
            Offload(model, [], folder=tmp_path)
        with pytest.raises(ValueError, match="no blocks named"):
            offload.set_active(["nothing"])
        with pytest.raises(ValueError, match="off the device"):
            ZerothOrderSGD(model, lr=1e-3)
    with pytest.raises(ValueError, match="no transformer blocks"):
        Offload(nn.Linear(2, 2), [], folder=tmp_path)
    tied = build(CASE)
    tied.model.layers[1].mlp.gate_proj.weight = nn.Parameter(tied.model.norm.weight.data)
    tied.model.norm.weight = tied.model.layers[1].mlp.gate_proj.weight
    with pytest.raises(ValueError, match=r"shares weights with model\.norm"):
        Offload(tied, ["model.layers.0"], folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_a_model_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(CASE)
    with torch.no_grad():
        expected = loss_of(model, CASE)
    written = module.to_file
    calls = []

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return written(path, tensors)

    monkeypatch.setattr(module, "to_file", full)
    with pytest.raises(OSError, match="No space left"):
        Offload(model, [], folder=tmp_path)
    assert Offload.of(model) is None
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        assert torch.equal(loss_of(model, CASE), expected)
