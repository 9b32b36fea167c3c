"""ZOTrainer as a user of transformers.Trainer meets it."""

from __future__ import annotations

import ast
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.multiprocessing import start_processes
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from zorba import ZerothOrderSGD, ZOArguments, ZOTrainer
from zorba.log import Log, LogError, replay

import zorba_kernels as zk
from tests.optim.models import assert_close, same_bits, snapshot

CONSTANT = {"lr_scheduler_type": "constant"}


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


class Spy(ZOTrainer):
    def training_step(self, model: Any, inputs: Any, items: Any = None) -> torch.Tensor:
        vars(self).setdefault("seen", []).append({n: value.clone() for n, value in inputs.items()})
        return super().training_step(model, inputs, items)


def train(
    folder: Path,
    model: LlamaForCausalLM,
    resume: str | None = None,
    kind: type[ZOTrainer] = ZOTrainer,
    given: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """Trains with changed arguments; ``given`` are what the trainer takes besides these."""
    given = {"train_dataset": rows(), **(given or {})}
    trainer = kind(model=model, args=arguments(folder, **changes), **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: ZOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("micro", [1, 2])
def test_steps_are_those_of_the_optimizer(tmp_path: Path, micro: int) -> None:
    """By hand over the trainer's own batches; micro-batches make one larger batch."""
    model = tiny()
    options = {"gradient_accumulation_steps": micro, "zo_momentum": 0.5, **CONSTANT}
    seen = train(tmp_path, model, kind=Spy, **options).seen
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
    trainer = train(tmp_path, tiny(), max_steps=30, zo_perturbations=4, learning_rate=0.03)
    losses = logged(trainer, "loss")
    assert sum(losses[-10:]) < sum(losses[:10]) - 0.5
    assert len(logged(trainer, "zo_scalar")) == len(losses) == 30
    assert not logged(trainer, "grad_norm")
    assert set(logged(trainer, "zo_skipped_steps")) == {0}
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"zo_momentum": 0.7}, {"zo_placement": "inplace"}], ids=str
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    options = {**options, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole, again = (tiny(torch.bfloat16, attention_dropout=0.2) for _ in range(2))
    train(tmp_path / "a", whole, **options)
    train(tmp_path / "b", again, resume=str(tmp_path / "a" / "checkpoint-3"), **options)
    assert same_bits(again, snapshot(whole))
    assert not same_bits(tiny(torch.bfloat16), snapshot(whole))


def test_evaluation_metrics_and_callbacks(tmp_path: Path) -> None:
    events: list[str] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            events.append("step")

        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            events.append("evaluate")

    given = {
        "eval_dataset": rows(8),
        "compute_metrics": lambda p: {"first": float(p.predictions[0].mean())},
        "callbacks": [Watch()],
    }
    trainer = train(tmp_path, tiny(), given=given, eval_strategy="steps", eval_steps=2)
    assert events == ["step", "step", "evaluate"] * 2
    assert "eval_first" in trainer.evaluate()
    assert trainer.predict(rows(3)).predictions.shape == (3, 8, 50)


def test_two_passes_in_place_leave_restored_weights(tmp_path: Path) -> None:
    options = {"zo_placement": "inplace", "zo_eps": 0.1, **CONSTANT}
    plain = train(tmp_path / "a", tiny(), **options).model
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trained = train(tmp_path / "b", tiny(), zo_two_pass=True, **saved, **options).model
    stored = LlamaForCausalLM.from_pretrained(tmp_path / "b" / "checkpoint-4")
    for model in (trained, stored):
        assert_close(model, snapshot(plain), "two passes in Trainer")


def test_weight_decay_spares_norms(tmp_path: Path) -> None:
    """A flat loss: nothing but decay moves weights."""
    model = tiny()
    before = snapshot(model)
    options = {"max_steps": 1, "learning_rate": 0.1, "weight_decay": 0.5, **CONSTANT}
    train(
        tmp_path,
        model,
        given={"compute_loss_func": lambda o, labels, **rest: o.logits.sum() * 0},
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
    given = {"compute_loss_func": lambda o, labels, **rest: o.logits.sum() * math.nan}
    trainer = train(tmp_path, model, given=given)
    assert same_bits(model, before)
    assert logged(trainer, "zo_skipped_steps") == [1, 2, 3, 4]


def test_a_trajectory_rebuilds_the_model_also_after_a_resume(tmp_path: Path) -> None:
    log = tmp_path / "run.zot"
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "weight_decay": 0.1}
    options["zo_trajectory"] = str(log)
    trained = train(tmp_path / "a", tiny(torch.bfloat16), **options).model
    whole = log.read_bytes()
    assert len(whole) < 4096
    base = tiny(torch.bfloat16)
    assert replay(base, Log.read(log)).verified
    assert same_bits(base, snapshot(trained))
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    train(tmp_path / "b", tiny(torch.bfloat16), checkpoint, **options)
    assert log.read_bytes() == whole
    with pytest.raises(LogError, match="exists"):
        train(tmp_path / "c", tiny(torch.bfloat16), **options)


def test_a_loss_that_is_a_mean_of_its_batch_is_scaled(tmp_path: Path) -> None:
    """transformers' switch for a compute_loss of one's own, where it has one."""

    class Mean(ZOTrainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model: Any, batch: Any, **rest: Any) -> torch.Tensor:
            return model(**batch).loss

    losses = []
    for micro in (1, 4):
        options = {"gradient_accumulation_steps": micro, "per_device_train_batch_size": 8 // micro}
        given = {"train_dataset": rows(8)}
        trainer = train(tmp_path, tiny(), None, Mean, given, max_steps=1, zo_eps=1e-6, **options)
        losses += logged(trainer, "loss")
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_what_it_refuses(tmp_path: Path) -> None:
    adam = torch.optim.Adam(tiny().parameters())
    with pytest.raises(ValueError, match="makes its own optimizer"):
        train(tmp_path, tiny(), given={"optimizers": (adam, None)})
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="one process a GPU"):
        ZOTrainer(model=tiny(), args=args)
    with pytest.raises(ValueError, match="distribution"):
        train(tmp_path, tiny(), zo_distribution="cauchy")
    with pytest.raises(ValueError, match="zo_placement='scratch' or 'fused'"):
        train(tmp_path, tiny(), zo_placement="inplace", zo_trajectory=str(tmp_path / "run.zot"))


def train_one_of_two(rank: int, folder: Path) -> None:
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2")
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that was forked
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=2)
    options = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    trainer = train(folder, tiny(), kind=Spy, **options)
    weights = zk.fingerprint(zk.ParamTable(trainer.model.named_parameters()))
    told = weights, trainer.zo_optimizer.last_step.scalars, trainer.seen[0]["input_ids"].tolist()
    (folder / f"rank{rank}").write_text(repr(told))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that used CUDA cannot be forked")
def test_two_processes_take_the_same_steps(tmp_path: Path) -> None:
    """Each sees half of a batch; only losses travel, and the replicas stay equal to the bit."""
    # Forked, as starting Python and importing transformers twice takes most of a minute.
    start_processes(train_one_of_two, (tmp_path,), nprocs=2, start_method="fork")
    one, two = (ast.literal_eval((tmp_path / f"rank{i}").read_text()) for i in (0, 1))
    assert one[:2] == two[:2], "weights and scalars"
    assert one[2] != two[2], "other data"
