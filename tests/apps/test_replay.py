"""``zorba replay`` behind its command line: a log and a folder become a folder."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from zorba.blocks import find_blocks
from zorba.identity import identity_of, model_fingerprint
from zorba.log import LogEntry, LogFile, LogHeader, TrajectoryWriter
from zorba.optim import NoiseTerms, active_table, step_seed

import zorba_kernels as zk
from tests.command import zorba
from tests.hf.tiny import tiny_config
from tests.kernels.bits import assert_same_bits

STEPS = 70


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config("llama")).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "notes.txt").write_text("of the base")
    return tmp_path / "base"


def train(base: Path, log: Path, dtype: torch.dtype, finish: bool = True) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype)
    model.get_input_embeddings().requires_grad_(False)
    table = active_table(model)
    writer = TrajectoryWriter.create(log, table, 3, "rademacher", "stochastic", model=model)
    writer.skip(0)
    for step in range(1, STEPS):
        seed = step_seed(3, step)
        zk.add_noise_(table, [seed], [1e-2], "rademacher", "stochastic")
        writer.append(step, NoiseTerms.single(seed, 0, [1e-2]))
    writer.finish() if finish else writer.close()
    return model


def run(base: Path, log: Path, out: Path, *more: str) -> str:
    result = zorba("replay", base, log, out, *more)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_folder_holds_the_trained_model(tmp_path: Path, base: Path, dtype: torch.dtype) -> None:
    trained = train(base, tmp_path / "run.zot", dtype)
    out = tmp_path / "new" / "tuned"
    said = run(base, tmp_path / "run.zot", out)
    assert f"{(tmp_path / 'run.zot').stat().st_size:,} bytes, " in said
    assert f"{STEPS - 1} steps (1 more skipped), rademacher noise" in said
    assert "steps/s, 2 passes over the weights" in said
    assert "verified, every bit is that of the run" in said
    rebuilt = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    for p, q in zip(rebuilt.parameters(), trained.parameters(), strict=True):
        assert_same_bits(p, q)
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "notes.txt").exists()
    assert [path.name for path in out.parent.iterdir()] == ["tuned"]
    assert "exists: give a folder" in zorba("replay", base, tmp_path / "run.zot", out).output


def test_a_run_without_an_end_says_so(tmp_path: Path, base: Path) -> None:
    train(base, tmp_path / "run.zot", torch.bfloat16, finish=False)
    with (tmp_path / "run.zot").open("ab") as file:
        file.write(b"\x09\x01")
    (tmp_path / "out").mkdir()
    said = run(base, tmp_path / "run.zot", tmp_path / "out")
    assert "ignored a torn tail of 2 bytes" in said
    assert "cannot be verified, the run was not finished" in said
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert ": not verified" in run(base, tmp_path / "run.zot", tmp_path / "new", "--no-verify")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_log_of_a_federation_is_replayed_too(
    tmp_path: Path, base: Path, dtype: torch.dtype
) -> None:
    """Its server knows neither names nor dtype: the layout's hash finds blocks and dtype."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype)
    groups = {p: b for b, block in enumerate(find_blocks(model)[-1:]) for p in block.parameters}
    table = active_table(model, groups)
    identity = identity_of(table, model_fingerprint(model.named_parameters()))
    with LogFile(tmp_path / "job.log", LogHeader(5, identity, "gaussian", "nearest")) as log:
        for round_number in (1, 2, 3):
            terms = NoiseTerms((7, 7), (0, 1), torch.full((1, 2), 0.1 * round_number))
            now = zk.fingerprint(table)
            log.append(LogEntry(round_number, terms, round_number, base=now))
            zk.add_noise_(table, terms.seeds, terms.coefs, samples=terms.samples)
    said = run(base, tmp_path / "job.log", tmp_path / "out")
    assert "verified up to entry 2" in said
    assert "no fingerprint is known of the last 1" in said
    rebuilt = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for p, q in zip(rebuilt.parameters(), model.parameters(), strict=True):
        assert_same_bits(p, q)


def test_what_fails_writes_nothing(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(base, tmp_path / "run.zot", torch.bfloat16)
    torch.manual_seed(2)
    LlamaForCausalLM(tiny_config("llama")).to(torch.bfloat16).save_pretrained(tmp_path / "other")
    (tmp_path / "bad.zot").write_bytes(b"ZORBAZOT")
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    before = sorted(tmp_path.iterdir())
    for model, log, told in (
        (tmp_path / "other", "run.zot", "values do not"),
        (tmp_path / "nowhere", "run.zot", "nowhere"),
        (base, "bad.zot", "of version 0.1.0"),
        (base, "run.zot", "No space left"),
    ):
        result = zorba("replay", model, tmp_path / log, tmp_path / "out")
        assert result.exit_code == 1
        assert told in result.output
        assert sorted(tmp_path.iterdir()) == before
