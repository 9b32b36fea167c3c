"""ZOTrainer with a direction for each few examples of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMultipleChoice, LlamaForCausalLM
from zorba import ZerothOrderSGD, ZOTrainer
from zorba.log import Log, replay

from tests.hf.test_trainer import CONSTANT, Spy, arguments, logged, rows, tiny, train
from tests.hf.tiny import CASES, VOCABULARY, Case, build, case_of
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


# --- Architectures -------------------------------------------------------------------------------

REFUSED = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), r"dt_proj.*read outside of the forward"),
    "mamba2": r"'backbone.layers.0.mixer.norm' .*does not compute row by row",
    "rwkv": r"attention.output.weight.*read outside of the forward",
    "qwen3_next": r"'model.layers.0.linear_attn.norm' .*saw rows \(48, 8\) of a batch of 4",
}
"""Models whose layers do not have the batch's rows, and what they are told."""

HEADS = ("ForCausalLM", "ForMaskedLM", "ForSequenceClassification", "ForSeq2SeqLM")
TEXT = [case for case in CASES if case.auto in HEADS]


def text_losses(model: nn.Module, case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (4, 6), generator=generator)
    labels = {"labels": ids} if case.auto == "ForSeq2SeqLM" else {}
    logits = model(input_ids=ids, **labels).logits.float()
    wanted = torch.tensor([0, 1, 0, 1]) if case.auto == "ForSequenceClassification" else ids
    losses = nn.functional.cross_entropy(logits.movedim(-1, 1), wanted, reduction="none")
    return losses.reshape(4, -1).mean(1)


def one_step(model: nn.Module, placement: str, losses: Callable[[], Tensor]) -> ZerothOrderSGD:
    optimizer = ZerothOrderSGD(
        model, 1e-3, eps=1e-2, placement=placement, directions="own", distribution="rank1",
        examples_per_direction=2,
    )  # fmt: skip
    optimizer.step(losses)
    return optimizer


def assert_fused_is_scratch(start: nn.Module, losses: Callable[[nn.Module], Tensor]) -> None:
    """Of the parameters that the fused placement trains."""
    for p in start.parameters():  # some start near zero, where any noise would be lost
        p.data.add_(0.1 * torch.randn_like(p))
    fused, scratch = copy.deepcopy(start), copy.deepcopy(start)
    one = one_step(fused, "fused", lambda: losses(fused))
    for name, p in scratch.named_parameters():
        p.requires_grad_(name in one.placement.table.names)
    other = one_step(scratch, "scratch", lambda: losses(scratch))
    assert len(other.last_step.scalars) == 2
    assert min(map(abs, other.last_step.scalars)) > 0
    assert_close_scalars(one.last_step.scalars, other.last_step.scalars)


@pytest.mark.filterwarnings("ignore:placement='fused' cannot", "ignore:the first evaluation")
@pytest.mark.parametrize("case", TEXT, ids=str)
def test_every_architecture_is_right_or_refused(case: Case) -> None:
    torch.manual_seed(0)
    model = build(case)
    if case.kind not in REFUSED:
        assert_fused_is_scratch(model, lambda model: text_losses(model, case))
        return
    before = snapshot(model)
    with pytest.raises(ValueError, match=REFUSED[case.kind]):
        one_step(model, "fused", lambda: text_losses(model, case))
    assert same_bits(model, before)


OPT = case_of("opt")
OLDER = {"do_layer_norm_before": False, "word_embed_proj_dim": 16}  # as OPT-350m


@pytest.mark.filterwarnings("ignore:placement='fused' cannot", "ignore:the first evaluation")
@pytest.mark.parametrize("trained", ["", "fc1", "fc2.bias", "final_layer_norm", "q_proj"])
@pytest.mark.parametrize("changes", [{}, OLDER], ids=["newer", "older"])
def test_opt_flattens_rows_and_tokens(changes: dict[str, Any], trained: str) -> None:
    """The rows are those of the layer, also where no other layer has seen them."""
    torch.manual_seed(0)
    case = Case(OPT.kind, OPT.auto, OPT.blocks, changes)
    model = build(case)
    for name, p in model.named_parameters():
        p.requires_grad_(".layers." in name and trained in name)
    assert_fused_is_scratch(model, lambda model: text_losses(model, case))


def test_opt_of_another_kind_is_refused() -> None:
    """What a layer of one's own does is not known."""
    from transformers.models.opt.modeling_opt import OPTDecoderLayer

    class Mine(OPTDecoderLayer):
        pass

    model = build(OPT)
    for layer in model.model.decoder.layers:
        layer.__class__ = Mine
    model.model.decoder.embed_tokens.requires_grad_(False)
    model.model.decoder.embed_positions.requires_grad_(False)
    with pytest.raises(ValueError, match=r"final_layer_norm.*saw rows \(24, 32\)"):
        one_step(model, "fused", lambda: text_losses(model, OPT))


# --- With Trainer --------------------------------------------------------------------------------


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
