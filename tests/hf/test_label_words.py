"""Label words scored from the logits that are read, against the model's full logits, one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedTokenizerFast
from zorba.hf import HeadError, LabelWordLoss
from zorba.hf.head import check_head

from tests.hf.steps import check_step
from tests.hf.tiny import CASES, Case, build, tiny_config
from tests.tolerances import bound

TEMPLATE = "{sentence} It was"
WORDS = [" bad", " good"]
LONG_WORDS = [" not good", " good", " so very good"]
EXAMPLES: list[dict[str, Any]] = [
    {"sentence": "a dull film", "label": 0},
    {"sentence": "a very good film and so on", "label": 1},
    {"sentence": "good", "label": 1},
]
CHOICES: list[dict[str, Any]] = [
    {"sentence": "a film", "choices": [" dull", " good and so on", " not bad"], "label": 1},
    {"sentence": "so good a film", "choices": [" bad", " very very good"], "label": 0},
]
CAUSAL = [case for case in CASES if case.auto == "ForCausalLM"]
MASKED = [case for case in CASES if case.auto == "ForMaskedLM"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words with the space in front of them are tokens, as in most models' tokenizers."""
    special = ["<pad>", "</s>", "<s>", "<unk>", "<mask>"]
    plain = ["a", "good", "film", "and", "It", "was", "bad", "dull", "very", "so", "not", "on", "."]
    names = special + plain + [f" {word}" for word in plain]
    core = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = Split(Regex(r" ?[^ .]+|\."), "isolated")
    core.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 1)]
    )
    keys = ("pad_token", "eos_token", "bos_token", "unk_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=core, **dict(zip(keys, special, strict=True)))


TOKENIZER = make_tokenizer()


def of(kind: str, **changes: Any) -> Case:
    case = next(c for c in CAUSAL + MASKED if c.kind == kind)
    return dataclasses.replace(case, changes={**case.changes, **changes})


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def prompt_of(example: Mapping[str, Any]) -> list[int]:
    return [TOKENIZER.bos_token_id, *ids_of(TEMPLATE.format_map(example))]


def plain_scores(
    model: nn.Module,
    example: Mapping[str, Any],
    words: list[str],
    normalise: bool = False,
) -> Tensor:
    """Log-probabilities of the continuations from full logits, each in a forward of its own."""
    prompt, scores = prompt_of(example), []
    for word in words:
        own = ids_of(word)
        logits = model(input_ids=torch.tensor([prompt + own])).logits[0].float()
        gains = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(own)[:, None])
        scores.append(gains.mean() if normalise else gains.sum())
    return torch.stack(scores)


def close(mine: Tensor, plain: Tensor) -> None:
    limit = bound("narrow logits")
    torch.testing.assert_close(mine, plain, rtol=limit, atol=limit)


KINDS = [
    of("llama"),
    of("llama", tie_word_embeddings=True),
    of("phi"),  # a head with a bias
    of("gemma2", final_logit_softcapping=1.0),
    of("granite", logits_scaling=8.0),
    of("cohere", logit_scale=0.25),
    of("mamba"),
    of("opt"),
]


@pytest.mark.parametrize("case", KINDS, ids=lambda c: c.kind)
def test_single_tokens_equal_full_logits(case: Case) -> None:
    model = build(case)
    bias = model.get_output_embeddings().bias
    if bias is not None:
        nn.init.normal_(bias)  # they start as zeros
    loss = LabelWordLoss(model, TOKENIZER, TEMPLATE, WORDS)
    batch = loss.encode(EXAMPLES)
    plain = torch.stack([plain_scores(model, e, WORDS) for e in EXAMPLES]).detach()
    scores = loss.scores(batch)
    close(scores.log_softmax(1), plain.log_softmax(1))
    close(loss(batch), nn.functional.cross_entropy(plain, torch.tensor([0, 1, 1])))
    assert torch.equal(loss.predict(batch), plain.argmax(1))
    # Logits themselves: their difference between two words has no scale to hide a factor in.
    with torch.no_grad():
        ids = batch.inputs["input_ids"][:1, : int(batch.positions[0]) + 1]
        whole = model(input_ids=ids).logits[0, -1]
    close(scores[0].detach(), whole[[ids_of(w)[0] for w in WORDS]])


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_candidates_of_several_tokens(kind: str, normalise: bool) -> None:
    """Label words for all, and each example's own: also more of them than others have."""
    model = build(of(kind))
    for words, examples in ((LONG_WORDS, EXAMPLES), ("choices", CHOICES)):
        loss = LabelWordLoss(model, TOKENIZER, TEMPLATE, words, normalise=normalise)
        batch = loss.encode(examples)
        scores, plain = loss.scores(batch), []
        assert scores.shape == (len(examples), 3)
        for example, mine in zip(examples, scores, strict=True):
            own = example.get("choices", LONG_WORDS)
            plain.append(plain_scores(model, example, own, normalise))
            close(mine[: len(own)], plain[-1])
            assert mine[len(own) :].tolist() == [-torch.inf] * (3 - len(own))
        labels = torch.tensor([example["label"] for example in examples])
        losses = [nn.functional.cross_entropy(p, y) for p, y in zip(plain, labels, strict=True)]
        close(loss.losses(batch), torch.stack(losses))
        close(loss(batch), torch.stack(losses).mean())
        assert loss.predict(batch).tolist() == [int(p.argmax()) for p in plain]


@pytest.mark.parametrize("case", MASKED, ids=lambda c: c.kind)
def test_masked_model(case: Case) -> None:
    model = build(case)
    nn.init.normal_(model.get_output_embeddings().bias)
    loss = LabelWordLoss(model, TOKENIZER, "{sentence} It was {mask}.", WORDS)
    batch = loss.encode(EXAMPLES)
    words = [ids_of(word)[0] for word in WORDS]
    for example, mine in zip(EXAMPLES, loss.scores(batch), strict=True):
        ids = torch.tensor([TOKENIZER(f"{example['sentence']} It was <mask>.")["input_ids"]])
        at = ids[0].tolist().index(TOKENIZER.mask_token_id)
        close(mine, model(input_ids=ids).logits[0, at, words])


@pytest.mark.parametrize("case", CAUSAL + MASKED, ids=lambda c: f"{c.kind}-{c.auto}")
def test_every_language_model_can_be_narrowed(case: Case) -> None:
    """``check_head`` compares with the model's own logits, which is what these must equal."""
    check_head(build(case), [5, 9], causal=case.auto == "ForCausalLM")


def test_only_the_logits_that_are_read_are_computed() -> None:
    model = build(of("llama"))
    seen: list[torch.Size] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    words = LabelWordLoss(model, TOKENIZER, TEMPLATE, WORDS)
    choices = LabelWordLoss(model, TOKENIZER, TEMPLATE, "choices")
    seen.clear()
    words.scores(words.encode(EXAMPLES))
    choices.scores(choices.encode(CHOICES))
    tokens = sum(len(ids_of(c)) for e in CHOICES for c in e["choices"])
    assert seen == [(1, 3, 2), (1, tokens, 100)]
    assert "forward" not in vars(head)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("words", [WORDS, LONG_WORDS], ids=["single", "several"])
def test_a_step_with_an_active_head(tied: bool, words: list[str]) -> None:
    def loss_of(model: nn.Module) -> Tensor:
        loss = LabelWordLoss(model, TOKENIZER, TEMPLATE, words) if model is not trained else mine
        return loss(batch)

    trained = build(of("llama", tie_word_embeddings=tied))
    mine = LabelWordLoss(trained, TOKENIZER, TEMPLATE, words)
    batch = mine.encode(EXAMPLES)
    check_step(trained, loss_of, lr=1e-2, eps=2**-6)


def test_the_loss_is_differentiable() -> None:
    model = build(of("llama"))
    loss = LabelWordLoss(model, TOKENIZER, TEMPLATE, WORDS)
    loss(loss.encode(EXAMPLES)).backward()
    mine = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    plain = torch.stack([plain_scores(model, e, WORDS) for e in EXAMPLES])
    nn.functional.cross_entropy(plain, torch.tensor([0, 1, 1])).backward()
    for name, p in model.named_parameters():
        assert mine[name] is not None
        assert p.grad is not None
        close(mine[name], p.grad)


@pytest.mark.parametrize("task", ["lora", "prompt", "prefix"])
def test_adapters(task: str) -> None:
    """Virtual tokens in front of a prompt move the positions that are read."""
    peft = pytest.importorskip("peft", reason="peft is in the test extra")
    config = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[task]()
    model = peft.get_peft_model(build(of("llama")), config).eval()
    loss = LabelWordLoss(model, TOKENIZER, TEMPLATE, WORDS)
    scores = loss.scores(loss.encode(EXAMPLES))
    words = [ids_of(word)[0] for word in WORDS]
    for example, mine in zip(EXAMPLES, scores, strict=True):
        ids = torch.tensor([prompt_of(example)])
        close(mine, model(input_ids=ids).logits[0, -1, words])


def test_a_head_that_is_patched_or_no_linear_layer() -> None:
    """Accelerate gives modules that it places a forward of their own: it is called, and kept."""
    model = build(of("llama"))
    loss = LabelWordLoss(model, TOKENIZER, TEMPLATE, WORDS)
    batch = loss.encode(EXAMPLES)
    plain = loss.scores(batch)
    head = model.get_output_embeddings()
    calls = []

    def placed(hidden: Tensor) -> Tensor:
        calls.append(hidden.shape)
        return nn.functional.linear(hidden, head.weight)

    head.forward = placed
    close(loss.scores(batch), plain)
    assert calls == [(1, 3, 32)]
    assert head.forward is placed
    del head.forward
    head.__class__ = type("MyLinear", (nn.Linear,), {})
    close(loss.scores(batch), plain)


def test_long_prompts_lose_their_beginning() -> None:
    loss = LabelWordLoss(build(of("llama")), TOKENIZER, TEMPLATE, WORDS, max_length=4)
    ids = loss.encode(EXAMPLES[1:2]).inputs["input_ids"][0].tolist()
    assert ids == [TOKENIZER.bos_token_id, *ids_of(" on It was")]


def test_dropout_is_left_as_it_was() -> None:
    model = build(of("opt")).train()
    model.get_output_embeddings().eval()
    LabelWordLoss(model, TOKENIZER, TEMPLATE, WORDS)
    assert model.training
    assert not model.get_output_embeddings().training


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "template", "options", "complaint"),
    [
        ("llama", TEMPLATE, {"words": [" good"]}, "two or more"),
        ("llama", TEMPLATE, {"words": [" good", " good"]}, "all different"),
        ("llama", TEMPLATE, {"words": [" unheard", " unknown"]}, "same token"),
        ("llama", TEMPLATE, {"words": ["", " good"]}, "does not begin a token"),
        ("llama", TEMPLATE, {"max_length": 1}, "at least 2"),
        ("bert", "{sentence} {mask}", {"words": LONG_WORDS}, "one token"),
        ("bert", TEMPLATE, {}, r"model type bert.*later ones"),
        ("t5", TEMPLATE, {}, r"model type t5.* encoder-decoder"),
        ("bart", TEMPLATE, {}, r"model type bart.* encoder-decoder"),
        # It multiplies with the weights of its output embedding itself.
        ("mobilebert", "{sentence} {mask}", {}, r"model type mobilebert.* 0 times"),
    ],
)
def test_bad_words_and_models(
    kind: str, template: str, options: dict[str, Any], complaint: str
) -> None:
    sizes = {"embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32}
    mobile = Case("mobilebert", "ForMaskedLM", "", sizes)
    known = [*CAUSAL, *MASKED, *CASES, mobile]
    model = build(next(case for case in known if case.kind == kind))
    with pytest.raises(ValueError, match=complaint):
        LabelWordLoss(model, TOKENIZER, template, **{"words": WORDS, **options})


def test_a_model_without_a_head_is_refused() -> None:
    model = AutoModel.from_config(tiny_config(of("llama")))
    with pytest.raises(HeadError, match="no output embedding"):
        LabelWordLoss(model, TOKENIZER, TEMPLATE, WORDS)


def test_bad_examples() -> None:
    loss = LabelWordLoss(build(of("llama")), TOKENIZER, TEMPLATE, WORDS)
    with pytest.raises(ValueError, match="at least one example"):
        loss.encode([])
    with pytest.raises(ValueError, match="label 2 is not among 2"):
        loss.encode([{"sentence": "good", "label": 2}])
    with pytest.raises(ValueError, match="no field 'label'"):
        loss(loss.encode([{"sentence": "good"}]))
    masked = LabelWordLoss(build(of("bert")), TOKENIZER, "{mask} {sentence}", WORDS, max_length=3)
    with pytest.raises(ValueError, match="one mask token, got 0"):
        masked.encode(EXAMPLES)
