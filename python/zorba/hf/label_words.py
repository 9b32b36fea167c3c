"""LabelWordLoss: classification and multiple choice by the words that a language model says."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from zorba.hf.head import check_head, narrow_logits

Examples = Sequence[Mapping[str, Any]]
_MASK = "mask"  # the field of a template that becomes the tokenizer's mask token


@dataclass(frozen=True)
class LabelWordBatch:
    """Encoded examples: sequences padded on the right, and where their logits are read.

    Tensors are on the model's device. Where every label word is one token, ``targets`` is None and
    ``lengths`` is empty.
    """

    inputs: dict[str, Tensor]  # what the model is called with
    rows: Tensor  # int64 [reads], sequence of each read position
    positions: Tensor  # int64 [reads], its index in the sequence
    targets: Tensor | None  # int64 [reads], the token that is scored there, candidate by candidate
    lengths: list[int]  # tokens of each candidate
    choices: list[int]  # candidates of each example
    labels: Tensor | None  # int64 [examples]

    def __len__(self) -> int:
        return len(self.choices)

    def repeat(self, times: int) -> LabelWordBatch:
        """Returns the examples several times, one batch behind the other."""
        sequences = len(self.inputs["input_ids"])
        return LabelWordBatch(
            {name: torch.cat([value] * times) for name, value in self.inputs.items()},
            torch.cat([self.rows + number * sequences for number in range(times)]),
            self.positions.repeat(times),
            None if self.targets is None else self.targets.repeat(times),
            self.lengths * times,
            self.choices * times,
            None if self.labels is None else self.labels.repeat(times),
        )


class LabelWordLoss:
    """Cross-entropy over label words behind a prompt, as in MeZO's experiments (2305.17333).

    Logits are computed only where they are read: for label words of one token, the position behind
    the prompt and the words' rows of the output embedding. Otherwise each candidate is a sequence
    of its own, scored by the log-probabilities of its tokens, which need the whole vocabulary at
    their positions alone. Causal models get no attention mask: the padding comes last, unseen.

    Args:
        model: a causal language model of transformers, or a masked one for a template with
            ``{mask}``; wrappers of PEFT work. Whatever it does with its logits is honoured.
        tokenizer: its tokenizer.
        template: with an example's fields: ``"{sentence} It was"`` or ``"{text} It was {mask}."``.
        words: the label words, each with the space in front that the prompt needs:
            ``[" terrible", " great"]``. Or the name of the field with an example's own candidates.
        normalise: divide a candidate's sum of log-probabilities by its number of tokens.
        label: field with the index of the right word; examples may lack it, but for the loss.
        max_length: tokens of a prompt at most; earlier ones are cut, but for the first special one.

    Raises:
        ValueError: bad words or template, or a model whose logits cannot be had in part
            (``HeadError``, found by comparing with the model's own).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        template: str,
        words: Sequence[str] | str,
        *,
        normalise: bool = False,
        label: str = "label",
        max_length: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.words = words if isinstance(words, str) else list(words)
        self.normalise = normalise
        self.label = label
        self.max_length = max_length
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}")
        parts = list(string.Formatter().parse(template))
        self.masked = any(name == _MASK for _, name, _, _ in parts)
        if self.masked and tokenizer.mask_token_id is None:
            raise ValueError(f"the template has {{{_MASK}}}, but the tokenizer has no mask token")
        self._tokens: list[list[int]] = []  # of each label word
        self._columns: Tensor | None = None  # the words' rows of the head, if each is one token
        if not isinstance(self.words, str):
            if len(set(self.words)) < max(2, len(self.words)):
                raise ValueError(f"label words must be two or more, all different: {self.words}")
            # What stands between the last field and the word: a tokenizer may merge the two.
            tail = "" if self.masked or not parts or parts[-1][1] is not None else parts[-1][0]
            self._tokens = [self._continuation(tail, word) for word in self.words]
            if all(len(ids) == 1 for ids in self._tokens):
                self._columns = torch.tensor(self._tokens)[:, 0]
                if len(set(self._columns.tolist())) < len(self._columns):
                    raise ValueError(f"two of the label words {self.words} are the same token")
        if self.masked and self._columns is None:
            raise ValueError(
                f"a mask stands for one token, but the words {self.words!r} are not of one token "
                "each: use a causal model"
            )
        # Once, here: a head that cannot be narrowed would give wrong losses without an error.
        probe = [0, 1] if self._columns is None else self._columns.tolist()
        check_head(model, probe, causal=not self.masked)

    def encode(self, examples: Examples) -> LabelWordBatch:
        """Tokenizes examples: mappings of the template's fields, and of the label.

        ValueError: no examples, a label that is no candidate, or a prompt cut where it is read.
        """
        if not examples:
            raise ValueError("encode needs at least one example")
        prompts = [self._prompt(example) for example in examples]
        lengths: list[int] = []
        targets: list[int] = []
        if self._columns is not None:
            # One token a word is the cheap case: one forward an example, a few logits of it.
            choices = [len(self._columns)] * len(prompts)
            sequences, rows = prompts, list(range(len(prompts)))
            positions = [self._read_at(prompt) for prompt in prompts]
        else:
            # A sequence for each candidate: their lengths differ, and so do positions behind them.
            candidates = [self._candidates(example) for example in examples]
            choices = [len(own) for own in candidates]
            pairs = [(p, ids) for p, own in zip(prompts, candidates, strict=True) for ids in own]
            lengths = [len(ids) for _, ids in pairs]
            targets = [token for _, ids in pairs for token in ids]
            # The last token is predicted, never read.
            sequences = [prompt + ids[:-1] for prompt, ids in pairs]
            rows = [row for row, (_, ids) in enumerate(pairs) for _ in ids]
            positions = [len(prompt) - 1 + k for prompt, ids in pairs for k in range(len(ids))]
        device = next(self.model.parameters()).device
        inputs = {name: ids.to(device) for name, ids in self._pad(sequences).items()}
        read, at = torch.tensor([rows, positions], device=device).unbind()
        wanted = torch.tensor(targets, device=device) if targets else None
        right = self._labels(examples, choices)
        labels = None if right is None else torch.tensor(right, device=device)
        return LabelWordBatch(inputs, read, at, wanted, lengths, choices, labels)

    def scores(self, batch: LabelWordBatch) -> Tensor:
        """Returns float32 [examples, choices]; minus infinity where there is no such choice.

        Logits of the label words, or log-probabilities of the candidates.
        """
        columns = self._columns.to(batch.rows.device) if self._columns is not None else None
        # A cache of keys and values would be filled for nothing, and blocks could not be reused.
        inputs = batch.inputs if self.masked else {**batch.inputs, "use_cache": False}
        logits = narrow_logits(self.model, inputs, batch.rows, batch.positions, columns)
        if batch.targets is None:
            return logits
        gains = logits.gather(1, batch.targets[:, None])[:, 0] - logits.logsumexp(dim=1)
        # Padded, not scattered: the sum then has a fixed order on every device.
        scores = pad_sequence(list(torch.split(gains, batch.lengths)), True).sum(dim=1)
        if self.normalise:
            scores = scores / torch.tensor(batch.lengths, device=scores.device)
        return pad_sequence(list(torch.split(scores, batch.choices)), True, -torch.inf)

    @property
    def by_row(self) -> bool:
        """Whether each example is one row of the forward: where all words are of one token."""
        return self._columns is not None

    def __call__(self, batch: LabelWordBatch) -> Tensor:
        """Returns the mean cross-entropy of the right words among the candidates, a scalar."""
        return self.losses(batch, reduction="mean")

    def losses(self, batch: LabelWordBatch, reduction: str = "none") -> Tensor:
        """Returns the cross-entropy of each example, float32 [examples]."""
        if batch.labels is None:
            raise ValueError(f"the examples have no field {self.label!r}: there is no loss")
        return nn.functional.cross_entropy(self.scores(batch), batch.labels, reduction=reduction)

    @torch.no_grad()
    def predict(self, batch: LabelWordBatch) -> Tensor:
        """Returns the index of the best candidate of each example, int64 [examples]."""
        return self.scores(batch).argmax(dim=1)

    def _prompt(self, example: Mapping[str, Any]) -> list[int]:
        fields = {**example, _MASK: self.tokenizer.mask_token} if self.masked else example
        ids = list(self.tokenizer(self.template.format_map(fields))["input_ids"])
        # Tokenizers end a text with a token that says so, but a prompt goes on.
        if not self.masked and ids:
            ends = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
            ids = ids[:-1] if ids[-1] in ends else ids
        if self.max_length is not None and len(ids) > self.max_length:
            # The end is kept, where the question is; a special token in front as well.
            start = int(ids[0] in self.tokenizer.all_special_ids)
            ids = ids[:start] + ids[len(ids) - self.max_length + start :]
        if not ids:
            raise ValueError(f"the prompt of {dict(example)!r} has no tokens")
        return ids

    def _read_at(self, prompt: list[int]) -> int:
        if not self.masked:
            return len(prompt) - 1
        mask = self.tokenizer.mask_token_id
        if (count := prompt.count(mask)) != 1:
            raise ValueError(
                f"a prompt must have one mask token, got {count}: is max_length too short?"
            )
        return prompt.index(mask)

    def _candidates(self, example: Mapping[str, Any]) -> list[list[int]]:
        if not isinstance(self.words, str):
            return self._tokens
        prompt = self.template.format_map(example)
        return [self._continuation(prompt, choice) for choice in example[self.words]]

    def _continuation(self, prompt: str, word: str) -> list[int]:
        # Tokens with and without the word: a tokenizer may merge it with the text before it.
        before, after = (
            list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (prompt, prompt + word)
        )
        if after[: len(before)] != before or len(after) == len(before):
            raise ValueError(
                f"the word {word!r} does not begin a token of its own behind {prompt[-20:]!r}: let "
                "the prompt end without a space, and words begin with one"
            )
        return after[len(before) :]

    def _labels(self, examples: Examples, choices: Sequence[int]) -> list[int] | None:
        if any(self.label not in example for example in examples):
            return None
        labels = [int(example[self.label]) for example in examples]
        for label, count in zip(labels, choices, strict=True):
            if not 0 <= label < count:
                raise ValueError(f"label {label} is not among {count} candidates, from 0")
        return labels

    def _pad(self, sequences: list[list[int]]) -> dict[str, Tensor]:
        # On the right: positions count from 0 in every row, as they do without padding. Any token
        # may pad a causal model, whose real positions never see it.
        rows = [torch.tensor(sequence) for sequence in sequences]
        inputs = {"input_ids": pad_sequence(rows, True, self.tokenizer.pad_token_id or 0)}
        if self.masked:
            inputs["attention_mask"] = pad_sequence([torch.ones_like(row) for row in rows], True)
        return inputs
