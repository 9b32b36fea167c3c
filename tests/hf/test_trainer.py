"""ZOTrainer as a user of transformers.Trainer meets it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from zorba import ZerothOrderSGD, ZOArguments, ZOTrainer
from zorba.log import Log, LogError, replay

from tests.optim.models import assert_close, same_bits, snapshot


def tiny(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def rows(count: int = 24) -> list[dict[str, torch.Tensor]]:
    """Periodic sequences, which a model can learn."""
    starts = torch.randint(0, 50, (count, 1), generator=torch.Generator().manual_seed(1))
    ids = (starts + 3 * torch.arange(8)) % 50
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, **changes: Any) -> ZOArguments:
    options: dict[str, Any] = {
        "output_dir": str(folder), "learning_rate": 0.05, "max_steps": 4, "use_cpu": True,
        "per_device_train_batch_size": 4, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "logging_steps": 1, "zo_eps": 1e-2, "seed": 5,
    }  # fmt: skip
    return ZOArguments(**{**options, **changes})


def train(
    folder: Path,
    model: LlamaForCausalLM,
    resume: str | None = None,
    loss_of: Callable[..., torch.Tensor] | None = None,
    **changes: Any,
) -> ZOTrainer:
    args = arguments(folder, **changes)
    trainer = ZOTrainer(model=model, args=args, train_dataset=rows(), compute_loss_func=loss_of)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: ZOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("micro", [1, 2])
def test_steps_are_those_of_the_optimizer(tmp_path: Path, micro: int) -> None:
    """By hand over the trainer's own batches; micro-batches make one larger batch."""
    model = tiny()
    seen: list[dict[str, torch.Tensor]] = []

    class Spy(ZOTrainer):
        def training_step(self, model: Any, inputs: Any, items: Any = None) -> torch.Tensor:
            seen.append({name: value.clone() for name, value in inputs.items()})
            return super().training_step(model, inputs, items)

    args = arguments(
        tmp_path, gradient_accumulation_steps=micro, lr_scheduler_type="constant", zo_momentum=0.5
    )
    Spy(model=model, args=args, train_dataset=rows()).train()
    other = tiny().train()
    optimizer = ZerothOrderSGD(other, lr=0.05, eps=1e-2, momentum=0.5, seed=5)
    assert len(seen) == 4 * micro
    for step in range(4):
        parts = seen[step * micro : (step + 1) * micro]
        items = sum(int((b["labels"][:, 1:] != -100).sum()) for b in parts)
        optimizer.step(
            lambda parts=parts, items=items: sum(
                float(other(**b, num_items_in_batch=items).loss) for b in parts
            )
        )
    assert_close(model, snapshot(other), "micro-batches")


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="auto would spread the model over them")
def test_device_map_auto_on_one_device(tmp_path: Path) -> None:
    """The same steps as of a model that Trainer placed itself."""
    tiny(torch.bfloat16).save_pretrained(tmp_path / "model")
    placed, plain = (
        LlamaForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map)
        for device_map in ("auto", None)
    )
    before = snapshot(placed)
    for model in (placed, plain):
        train(tmp_path, model, use_cpu=False)
    assert same_bits(placed, snapshot(plain))
    assert not same_bits(placed, before)


def test_loss_falls_and_logs_tell_of_scalars(tmp_path: Path) -> None:
    trainer = train(tmp_path, tiny(), max_steps=60, zo_perturbations=4, learning_rate=0.02)
    losses = logged(trainer, "loss")
    assert sum(losses[-10:]) < sum(losses[:10]) - 0.5
    assert len(logged(trainer, "zo_scalar")) == len(losses) == 60
    assert not logged(trainer, "grad_norm")
    assert set(logged(trainer, "zo_skipped_steps")) == {0}
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"zo_momentum": 0.7}, {"zo_placement": "inplace"}], ids=str
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Bit for bit, in bfloat16, with dropout, shuffled data and a schedule."""
    options = {**options, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = tiny(torch.bfloat16, attention_dropout=0.2)
    train(tmp_path / "a", whole, **options)
    again = tiny(torch.bfloat16, attention_dropout=0.2)
    train(tmp_path / "b", again, resume=str(tmp_path / "a" / "checkpoint-3"), **options)
    assert same_bits(again, snapshot(whole))
    assert not same_bits(tiny(torch.bfloat16), snapshot(whole))


def test_evaluation_metrics_and_callbacks(tmp_path: Path) -> None:
    events: list[str] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.append("step")

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.append("evaluate")

    trainer = ZOTrainer(
        model=tiny(),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=2),
        train_dataset=rows(),
        eval_dataset=rows(8),
        compute_metrics=lambda p: {"first": float(p.predictions[0].mean())},
        callbacks=[Watch()],
    )
    trainer.train()
    assert events == ["step", "step", "evaluate"] * 2
    assert "eval_first" in trainer.evaluate()
    assert trainer.predict(rows(3)).predictions.shape == (3, 8, 50)


def test_two_passes_in_place_leave_restored_weights(tmp_path: Path) -> None:
    """Evaluation, checkpoints and the end see weights without a perturbation."""
    options = {"zo_placement": "inplace", "lr_scheduler_type": "constant", "zo_eps": 0.1}
    plain = train(tmp_path / "a", tiny(), **options).model
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = train(tmp_path / "b", tiny(), zo_two_pass=True, **saved, **options)
    assert_close(trainer.model, snapshot(plain), "two passes in Trainer")
    stored = LlamaForCausalLM.from_pretrained(tmp_path / "b" / "checkpoint-4")
    assert_close(stored, snapshot(plain), "two passes in Trainer")


def test_weight_decay_spares_norms(tmp_path: Path) -> None:
    """A flat loss: nothing but decay moves weights."""
    model = tiny()
    before = snapshot(model)
    options = {"lr_scheduler_type": "constant", "max_steps": 1, "learning_rate": 0.1}
    train(
        tmp_path,
        model,
        loss_of=lambda o, t, **rest: o.logits.sum() * 0,
        weight_decay=0.5,
        **options,
    )
    for name, p in model.named_parameters():
        expected = before[name] * (1.0 if "norm" in name else 0.95)
        torch.testing.assert_close(p.detach(), expected)


def test_plain_arguments_a_frozen_embedding_and_the_last_blocks(tmp_path: Path) -> None:
    model = tiny(torch.bfloat16)
    model.model.embed_tokens.requires_grad_(False)
    before = snapshot(model)
    args = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no",
        learning_rate=0.05, disable_tqdm=True,
    )  # fmt: skip
    ZOTrainer(model=model, args=args, train_dataset=rows()).train()
    assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    assert not same_bits(model, before)
    model = tiny()
    before = snapshot(model)
    train(tmp_path, model, zo_blocks="last:1")
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("model.layers.2."), name


def test_losses_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    model = tiny()
    before = snapshot(model)
    trainer = train(tmp_path, model, loss_of=lambda o, labels, **rest: o.logits.sum() * math.nan)
    assert same_bits(model, before)
    assert logged(trainer, "zo_skipped_steps") == [1, 2, 3, 4]


def test_a_trajectory_rebuilds_the_model_also_after_a_resume(tmp_path: Path) -> None:
    log = tmp_path / "run.zot"
    options = {"zo_trajectory": str(log), "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    trained = train(tmp_path / "a", tiny(torch.bfloat16), weight_decay=0.1, **options).model
    whole = log.read_bytes()
    assert len(whole) < 4096
    base = tiny(torch.bfloat16)
    assert replay(base, Log.read(log)).verified
    assert same_bits(base, snapshot(trained))
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    train(tmp_path / "b", tiny(torch.bfloat16), checkpoint, weight_decay=0.1, **options)
    assert log.read_bytes() == whole
    with pytest.raises(LogError, match="exists"):
        train(tmp_path / "c", tiny(torch.bfloat16), **options)
    with pytest.raises(ValueError, match="zo_placement='scratch'"):
        train(tmp_path / "d", tiny(), zo_placement="inplace", zo_trajectory=str(tmp_path / "d.zot"))


def test_a_loss_that_is_a_mean_of_its_batch_is_scaled(tmp_path: Path) -> None:
    """transformers' switch for a compute_loss of one's own, where it has one."""
    losses = []
    for micro in (1, 4):
        options = {"gradient_accumulation_steps": micro, "per_device_train_batch_size": 8 // micro}
        args = arguments(tmp_path, max_steps=1, zo_eps=1e-6, **options)
        trainer = ZOTrainer(model=tiny(), args=args, train_dataset=rows(8))
        trainer.compute_loss = lambda model, batch, **rest: model(**batch).loss  # type: ignore[method-assign]
        trainer.loss_is_scaled_for_ga = False
        trainer.train()
        losses += logged(trainer, "loss")
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_what_it_refuses(tmp_path: Path) -> None:
    adam = torch.optim.Adam(tiny().parameters())
    with pytest.raises(ValueError, match="makes its own optimizer"):
        ZOTrainer(model=tiny(), args=arguments(tmp_path), optimizers=(adam, None))
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="one process a GPU"):
        ZOTrainer(model=tiny(), args=args)
    with pytest.raises(ValueError, match="distribution"):
        train(tmp_path, tiny(), zo_distribution="cauchy")


def test_two_processes_take_the_same_steps(tmp_path: Path) -> None:
    """Each sees half of a batch; only losses travel, and the replicas stay equal to the bit."""
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent("""
            import sys, torch, zorba_kernels as zk
            from pathlib import Path
            from tests.hf.test_trainer import arguments, rows, tiny
            from zorba import ZOTrainer
            torch.set_num_threads(1)
            args = arguments(sys.argv[1], per_device_train_batch_size=2, ddp_backend="gloo")
            trainer = ZOTrainer(model=tiny(), args=args, train_dataset=rows())
            seen = []
            plain = trainer.compute_loss
            def compute_loss(model, batch, **rest):
                seen.append(batch["input_ids"])
                return plain(model, batch, **rest)
            trainer.compute_loss = compute_loss
            trainer.train()
            table = zk.ParamTable(trainer.model.named_parameters())
            report = trainer.zo_optimizer.last_step
            Path(sys.argv[1], f"rank{args.process_index}").write_text(
                f"{zk.fingerprint(table)} {report.scalars} {int(seen[0].sum())}"
            )
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = ((tmp_path / f"rank{i}").read_text().rsplit(" ", 1) for i in (0, 1))
    assert one[0] == two[0], "weights and scalars"
    assert one[1] != two[1], "other data"
