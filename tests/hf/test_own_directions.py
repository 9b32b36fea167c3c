"""ZOTrainer with a direction for each few examples of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMultipleChoice, LlamaForCausalLM
from zorba import ZerothOrderSGD, ZOTrainer
from zorba.log import Log, replay

from tests.hf.test_trainer import CONSTANT, Spy, arguments, logged, rows, tiny, train
from tests.optim.models import same_bits, snapshot
from tests.tolerances import bound

OWN = {
    "zo_directions": "own", "zo_examples_per_direction": 2, "zo_placement": "fused",
    "per_device_train_batch_size": 8,
}  # fmt: skip


def fusable(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """Without embeddings to train: then all placements train the same parameters."""
    model = tiny(dtype, **changes)
    model.model.embed_tokens.requires_grad_(False)
    return model


def assert_close_scalars(mine: list[float], theirs: list[float]) -> None:
    assert len(mine) == len(theirs)
    largest = max(map(abs, theirs))
    assert all(
        abs(g - h) <= bound("fused scalar") * largest for g, h in zip(mine, theirs, strict=True)
    )


def all_scalars(
    folder: Path, model: nn.Module, kind: type[ZOTrainer] = ZOTrainer, **options: Any
) -> list[float]:
    """Scalars of all steps, in order."""
    found: list[float] = []

    class Keep(kind):
        def training_step(self, *args: Any) -> Tensor:
            loss = super().training_step(*args)
            if self.accelerator.sync_gradients:
                found.extend(self.zo_optimizer.last_step.scalars)
            return loss

    train(folder, model, kind=Keep, **options)
    return found


@pytest.mark.parametrize("placement", ["fused", "scratch"])
@pytest.mark.parametrize("options", [{}, {"zo_normalize": True, "learning_rate": 0.03}], ids=str)
def test_loss_falls(tmp_path: Path, placement: str, options: dict[str, Any]) -> None:
    given = {"learning_rate": 0.01, "max_steps": 60, **options, "zo_placement": placement}
    given |= {"zo_distribution": "rank1"}
    trainer = train(tmp_path, fusable(), **{**OWN, **given})
    losses = logged(trainer, "loss")
    assert sum(losses[-10:]) < sum(losses[:10]) - 0.5
    assert len(trainer.zo_optimizer.last_step.scalars) == 4
    assert len(logged(trainer, "zo_scalar")) == 60


def test_steps_are_those_of_the_optimizer(tmp_path: Path) -> None:
    """By hand over the trainer's own batches, with losses by hand."""
    model = fusable()
    seen = train(tmp_path, model, kind=Spy, **OWN, **CONSTANT).seen
    other = fusable().train()
    optimizer = ZerothOrderSGD(
        other, lr=0.05, eps=1e-2, seed=5, placement="fused", directions="own",
        examples_per_direction=2,
    )  # fmt: skip
    for batch in seen:

        def losses(batch: dict[str, Tensor]) -> Tensor:
            logits = other(input_ids=batch["input_ids"]).logits[:, :-1].transpose(1, 2)
            of_tokens = nn.functional.cross_entropy(
                logits, batch["labels"][:, 1:], reduction="none"
            )
            return of_tokens.mean(1)

        optimizer.step(losses, batch)
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.detach(), other.get_parameter(name), rtol=0, atol=bound("own steps by hand")
        )


def test_a_forward_for_each_direction_is_the_same(tmp_path: Path) -> None:
    options = {**OWN, "zo_distribution": "rank1", "max_steps": 3}
    fused = all_scalars(tmp_path / "a", fusable(), **options)
    scratch = all_scalars(tmp_path / "b", fusable(), **{**options, "zo_placement": "scratch"})
    assert len(fused) == 3 * 4
    assert_close_scalars(fused, scratch)


@pytest.mark.parametrize("micro", [2, 4])
@pytest.mark.parametrize("placement", ["fused", "scratch"])
def test_micro_batches_are_one_larger_batch(tmp_path: Path, micro: int, placement: str) -> None:
    """Directions of 3 examples reach over the ends of micro-batches."""
    options = {**OWN, "zo_placement": placement, "zo_distribution": "rank1", "max_steps": 2}
    options |= {"zo_examples_per_direction": 3}
    whole = all_scalars(tmp_path / "a", fusable(), **options)
    parts = {"per_device_train_batch_size": 8 // micro, "gradient_accumulation_steps": micro}
    cut = all_scalars(tmp_path / "b", fusable(), **{**options, **parts})
    assert len(whole) == 2 * 3
    assert_close_scalars(cut, whole)


def test_a_last_batch_of_fewer_examples(tmp_path: Path) -> None:
    """20 rows by micro-batches of 6, two a step: the second step has 6 and 2 rows."""
    options = {
        **OWN, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "max_steps": 2,
        "zo_distribution": "rank1",
    }  # fmt: skip
    given = {"train_dataset": rows(20)}
    fused = all_scalars(tmp_path / "a", fusable(), given=given, **options)
    scratch = all_scalars(
        tmp_path / "b", fusable(), given=given, **{**options, "zo_placement": "scratch"}
    )
    assert len(fused) == 6 + 4
    assert_close_scalars(fused, scratch)


@pytest.mark.parametrize("placement", ["fused", "scratch"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, placement: str, dropout: float
) -> None:
    options = {**OWN, "zo_placement": placement, "zo_momentum": 0.5}
    options |= {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole, again = (fusable(torch.bfloat16, attention_dropout=dropout) for _ in range(2))
    train(tmp_path / "a", whole, **options)
    train(tmp_path / "b", again, resume=str(tmp_path / "a" / "checkpoint-3"), **options)
    assert same_bits(again, snapshot(whole))
    assert not same_bits(fusable(torch.bfloat16), snapshot(whole))


@pytest.mark.parametrize("options", [OWN, {"zo_placement": "fused"}], ids=["own", "shared"])
def test_a_trajectory_of_fused_noise_rebuilds_the_model(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    log = tmp_path / "run.zot"
    given = {**options, "zo_trajectory": str(log), "weight_decay": 0.1, "max_steps": 6}
    trained = train(tmp_path / "a", fusable(torch.bfloat16), **given).model
    base = fusable(torch.bfloat16)
    assert replay(base, Log.read(log)).verified
    assert same_bits(base, snapshot(trained))
    assert not same_bits(fusable(torch.bfloat16), snapshot(trained))


def test_weight_decay_where_noise_cannot_be_made(tmp_path: Path) -> None:
    """What the optimizer leaves out is in no group, not even if decay would spare it."""
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    model = BertForMultipleChoice(config)
    model.extra = nn.Conv1d(2, 2, 1)  # its bias would be spared
    options = {**OWN, "weight_decay": 0.1}
    trainer = ZOTrainer(model=model, args=arguments(tmp_path, **options))
    with pytest.warns(UserWarning, match="cannot make noise"):
        optimizer = trainer.create_optimizer()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def by_example(outputs: Any, labels: Tensor, **rest: Any) -> Tensor:
    """Minus the accuracy of each example: there is no loss of a model to compare it with."""
    return -(outputs.logits[:, :-1].argmax(-1) == labels[:, 1:]).float().mean(1)


def test_losses_of_ones_own_are_taken_as_they_are(tmp_path: Path) -> None:
    given, found = {"compute_loss_func": by_example}, []
    for micro in (1, 2):
        parts = {"per_device_train_batch_size": 8 // micro, "gradient_accumulation_steps": micro}
        options = {**OWN, **parts, "zo_eps": 0.3, "max_steps": 1, "logging_strategy": "steps"}
        trainer = train(tmp_path, fusable(), given=given, **options)
        assert -1.0 <= logged(trainer, "loss")[0] <= 0.0
        assert len(trainer.zo_optimizer.last_step.scalars) == 4
        shared = {**options, "zo_directions": "shared", "zo_eps": 1e-6}
        found.append(logged(train(tmp_path, fusable(), given=given, **shared), "loss")[0])
    assert found[0] == pytest.approx(found[1])


def test_a_loss_of_ones_own_that_is_no_models_is_refused(tmp_path: Path) -> None:
    model = fusable()
    before = snapshot(model)

    def mean(outputs: Any, labels: Tensor, **rest: Any) -> Tensor:
        return outputs.logits.square().mean()

    with pytest.raises(ValueError, match=r"LlamaForCausalLM: .* mean .*compute_loss_func"):
        train(tmp_path, model, given={"compute_loss_func": mean}, **OWN)
    assert same_bits(model, before)

    class Alone(ZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            return model(**inputs).loss

    with pytest.raises(ValueError, match="NoneType"):
        train(tmp_path, fusable(), kind=Alone, **OWN)


def test_a_loss_that_a_model_adds_is_refused(tmp_path: Path) -> None:
    """A router's loss is of the batch, not of an example."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=4,
        output_router_logits=True, router_aux_loss_coef=0.01,
    )  # fmt: skip
    with pytest.raises(ValueError, match="MixtralForCausalLM: these have the mean"):
        train(tmp_path, MixtralForCausalLM(config), **{**OWN, "zo_placement": "scratch"})


@pytest.mark.filterwarnings("ignore:placement='fused' cannot")
def test_choices_are_rows_of_their_own(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    model = BertForMultipleChoice(config)
    generator = torch.Generator().manual_seed(1)
    data = [
        {"input_ids": torch.randint(3, 50, (3, 6), generator=generator), "labels": i % 3}
        for i in range(8)
    ]
    # Of both signs in one forward.
    with pytest.raises(ValueError, match=r"16 losses.*48 rows.*several choices.*scratch"):
        train(tmp_path, model, given={"train_dataset": data}, **OWN)
    options = {**OWN, "zo_placement": "scratch"}
    trainer = train(tmp_path, model, given={"train_dataset": data}, **options)
    assert len(trainer.zo_optimizer.last_step.scalars) == 4


def test_it_refuses_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path, **OWN)
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(ValueError, match=r"own' runs in one process.*'shared'"):
        ZOTrainer(model=fusable(), args=args)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"zo_directions": "both"}, "directions"),
        ({"zo_examples_per_direction": 0}, "examples_per_direction"),
        ({"zo_distribution": "gaussian"}, "rank1"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train(tmp_path, fusable(), **{**OWN, **options})
