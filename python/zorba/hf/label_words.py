"""LabelWordLoss: classification and multiple choice by the words that a language model says."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zorba.hf.head import check_head, narrow_logits

Examples = Sequence[Mapping[str, Any]]
_MASK = "mask"  # the field of a template that becomes the tokenizer's mask token


@dataclass(frozen=True)
class LabelWordBatch:
    """Encoded examples: sequences padded on the right, and where their logits are read.

    Attributes:
        inputs: what the model is called with.
        rows: Tensor  # int64 [reads], sequence of each read position
        positions: Tensor  # int64 [reads], its index in the sequence
        targets: Tensor  # int64 [reads], the token that is scored there, where scores are sums of
            log-probabilities; None where every label word is one token
        slots: Tensor  # int64 [reads], place of the read in [examples, choices, longest]; ditto
        lengths: Tensor  # int64 [examples, choices], tokens; 0 where an example has fewer choices
        longest: tokens of the longest candidate.
        labels: Tensor  # int64 [examples], or None
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    positions: Tensor
    targets: Tensor | None
    slots: Tensor | None
    lengths: Tensor
    longest: int
    labels: Tensor | None

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.lengths)

    def to(self, device: torch.device | str) -> LabelWordBatch:
        """Returns the batch on a device."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, inputs={k: v.to(device) for k, v in self.inputs.items()}, **moved)


class LabelWordLoss:
    """Cross-entropy over label words behind a prompt, as in MeZO's experiments (2305.17333).

    Logits are computed only where they are read: for label words of one token, the position behind
    the prompt and the words' rows of the output embedding. Otherwise each candidate is a sequence
    of its own, scored by the log-probabilities of its tokens, which need the whole vocabulary at
    their positions alone. Causal models get no attention mask: the padding comes last, where no
    position that is read sees it.

    Args:
        model: a causal language model of transformers, or a masked one for a template with
            ``{mask}``; wrappers of PEFT work. Whatever it does with its logits is honoured.
        tokenizer: its tokenizer.
        template: a format string over the fields of an example: ``"{sentence} It was"``, or
            ``"{sentence} It was {mask}."``.
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
        tail = parts[-1][0] if parts and parts[-1][1] is None else ""
        self._tokens: list[list[int]] | None = None
        if not isinstance(self.words, str):
            if len(set(self.words)) < max(2, len(self.words)):
                raise ValueError(f"label words must be two or more, all different: {self.words}")
            tail = "" if self.masked else tail
            self._tokens = [self._continuation(tail, word) for word in self.words]
        # One token a word is the cheap case: one forward an example, and a few logits of it.
        single = self._tokens is not None and all(len(ids) == 1 for ids in self._tokens)
        if self.masked and not single:
            raise ValueError(
                f"a mask stands for one token, but the words {self.words!r} are not of one token "
                "each: use a causal model"
            )
        self._columns = (
            torch.tensor([ids[0] for ids in self._tokens]) if single and self._tokens else None
        )
        if self._columns is not None and len(set(self._columns.tolist())) < len(self._columns):
            raise ValueError(f"two of the label words {self.words} are the same token")
        # Once, here: a head that cannot be narrowed would give wrong losses without an error.
        probe = self._columns.tolist() if self._columns is not None else [0, 1]
        check_head(model, probe, causal=not self.masked)

    def encode(self, examples: Examples) -> LabelWordBatch:
        """Tokenizes examples: mappings of the template's fields, and of the label.

        Raises:
            ValueError: no examples, a label that is no candidate, or a prompt that is cut where it
                is read.
        """
        if not examples:
            raise ValueError("encode needs at least one example")
        prompts = [self._prompt(example) for example in examples]
        if self._columns is None:
            choices = [self._candidates(example) for example in examples]
        else:
            choices = [[[int(token)] for token in self._columns] for _ in examples]
        width = max(map(len, choices))
        longest = max(len(ids) for own in choices for ids in own)
        sequences: list[list[int]] = []
        reads: list[tuple[int, int, int, int]] = []  # row, position, target, slot
        for e, (prompt, own) in enumerate(zip(prompts, choices, strict=True)):
            if self._columns is not None:
                reads.append((e, self._read_at(prompt), 0, 0))
                sequences.append(prompt)
                continue
            # A sequence for each candidate: their lengths differ, and so do positions behind them.
            for c, ids in enumerate(own):
                for k, token in enumerate(ids):
                    slot = (e * width + c) * longest + k
                    reads.append((len(sequences), len(prompt) - 1 + k, token, slot))
                # The last token is predicted, never read.
                sequences.append(prompt + ids[:-1])
        at = [torch.tensor(column) for column in zip(*reads, strict=True)]
        summed = self._columns is None
        batch = LabelWordBatch(
            self._pad(sequences),
            at[0],
            at[1],
            at[2] if summed else None,
            at[3] if summed else None,
            torch.tensor(
                [[len(ids) for ids in own + [[]] * (width - len(own))] for own in choices]
            ),
            longest,
            self._labels(examples, choices),
        )
        return batch.to(next(self.model.parameters()).device)

    def scores(self, batch: LabelWordBatch) -> Tensor:
        """Returns float32 [examples, choices]; minus infinity where there is no such choice.

        Logits of the label words, or log-probabilities of the candidates.
        """
        columns = self._columns.to(batch.rows.device) if self._columns is not None else None
        # A cache of keys and values would be filled for nothing, and blocks could not be reused.
        inputs = batch.inputs if self.masked else {**batch.inputs, "use_cache": False}
        logits = narrow_logits(self.model, inputs, batch.rows, batch.positions, columns)
        if batch.targets is None or batch.slots is None:
            return logits
        gains = logits.gather(1, batch.targets[:, None])[:, 0] - logits.logsumexp(dim=1)
        table = gains.new_zeros(batch.lengths.numel() * batch.longest)
        # Every slot is written once, so that the sum has a fixed order on every device.
        table = table.index_put((batch.slots,), gains)
        scores = table.view(*batch.lengths.shape, batch.longest).sum(dim=2)
        if self.normalise:
            scores = scores / batch.lengths.clamp(min=1)
        return scores.masked_fill(batch.lengths == 0, -torch.inf)

    def __call__(self, batch: LabelWordBatch) -> Tensor:
        """Returns the mean cross-entropy of the right words among the candidates, a scalar."""
        right = self._right(batch)
        return nn.functional.cross_entropy(self.scores(batch), right)

    def losses(self, batch: LabelWordBatch) -> Tensor:
        """Returns the cross-entropy of each example, float32 [examples]."""
        right = self._right(batch)
        return nn.functional.cross_entropy(self.scores(batch), right, reduction="none")

    @torch.no_grad()
    def predict(self, batch: LabelWordBatch) -> Tensor:
        """Returns the index of the best candidate of each example, int64 [examples]."""
        return self.scores(batch).argmax(dim=1)

    def _right(self, batch: LabelWordBatch) -> Tensor:
        if batch.labels is None:
            raise ValueError(f"the examples have no field {self.label!r}: there is no loss")
        return batch.labels

    def _prompt(self, example: Mapping[str, Any]) -> list[int]:
        fields = {**example, _MASK: self.tokenizer.mask_token} if self.masked else example
        ids = list(self.tokenizer(self.template.format_map(fields))["input_ids"])
        # Tokenizers end a text with a token that says so, but a prompt goes on.
        if not self.masked and ids and ids[-1] in self._enders():
            ids = ids[:-1]
        if self.max_length is not None and len(ids) > self.max_length:
            # The end is kept, where the question is; a special token in front as well.
            start = int(ids[0] in self.tokenizer.all_special_ids)
            ids = ids[:start] + ids[len(ids) - self.max_length + start :]
        if not ids:
            raise ValueError(f"the prompt of {dict(example)!r} has no tokens")
        return ids

    def _enders(self) -> set[int | None]:
        special = self.tokenizer
        return {special.eos_token_id, special.sep_token_id} - {None}

    def _read_at(self, prompt: list[int]) -> int:
        if not self.masked:
            return len(prompt) - 1
        if prompt.count(self.tokenizer.mask_token_id) != 1:
            raise ValueError(
                "a prompt must have one mask token, got "
                f"{prompt.count(self.tokenizer.mask_token_id)}: is max_length too short?"
            )
        return prompt.index(self.tokenizer.mask_token_id)

    def _candidates(self, example: Mapping[str, Any]) -> list[list[int]]:
        if self._tokens is not None:
            return self._tokens
        assert isinstance(self.words, str)
        prompt = self.template.format_map(example)
        return [self._continuation(prompt, choice) for choice in example[self.words]]

    def _continuation(self, prompt: str, word: str) -> list[int]:
        """Tokens that a word adds to a prompt."""
        # Of the text with and without it: a tokenizer may merge a word with the text before it.
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

    def _labels(self, examples: Examples, choices: list[list[list[int]]]) -> Tensor | None:
        if any(self.label not in example for example in examples):
            return None
        labels = [int(example[self.label]) for example in examples]
        for label, own in zip(labels, choices, strict=True):
            if not 0 <= label < len(own):
                raise ValueError(f"label {label} is not among {len(own)} candidates, from 0")
        return torch.tensor(labels)

    def _pad(self, sequences: list[list[int]]) -> dict[str, Tensor]:
        # On the right: positions count from 0 in every row, as they do without padding. Any token
        # may pad a causal model, whose real positions never see it.
        length = max(map(len, sequences))
        ids = torch.full((len(sequences), length), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for r, sequence in enumerate(sequences):
            ids[r, : len(sequence)] = torch.tensor(sequence)
            mask[r, : len(sequence)] = 1
        return {"input_ids": ids, "attention_mask": mask} if self.masked else {"input_ids": ids}
