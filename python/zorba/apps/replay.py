"""``zorba replay``: a folder with the fine-tuned model, from a base and a log."""

from __future__ import annotations

import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from zorba.log import Log, LogError, LogHeader, ReplayReport, WrongBaseError, check_base
from zorba.log import replay as replay_log

_TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "*.tiktoken", "*.jinja", "preprocessor_config.json", "processor_config.json"),
)


def rebuild(
    base: str,
    path: Path,
    out: Path,
    *,
    verify: bool = True,
    say: Callable[[str], None] = print,
) -> ReplayReport:
    """Writes the fine-tuned model to a folder, which is there as a whole or not at all.

    Args:
        base: local folder or hub name of a Hugging Face model.
        path: of the log, of a fine-tune or of a federation.
        out: folder to be made; an empty one is used.
        verify: see ``zorba.log.replay``.
        say: gets lines on what happens.

    Raises:
        LogError: the log is damaged, the base is another model, or ``out`` is taken.
        OSError: the base cannot be loaded, or ``out`` not be written.
    """
    log = Log.read(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LogError(f"{out} exists: give a folder that is new or empty")
    header = log.header
    skipped = f" ({log.num_skipped} more skipped)" if log.num_skipped else ""
    say(
        f"{path}: {log.size:,} bytes, {log.num_steps:,} steps{skipped}, "
        f"{header.distribution} noise, {header.rounding} rounding"
    )
    if log.torn_bytes:
        say(f"ignored a torn tail of {log.torn_bytes} bytes: the run was interrupted")
    model = _load_base(base, log)
    with tqdm(total=log.num_steps, desc="replay", disable=None) as bar:  # None: on a terminal alone
        report = replay_log(
            model, log, verify=verify, progress=lambda done, _: bar.update(done - bar.n)
        )
    rate = f", {report.steps / report.seconds:,.1f} steps/s" if report.steps else ""
    say(f"replayed in {report.seconds:.2f} s{rate}, {report.passes} passes over the weights")
    say(f"fingerprint {report.fingerprint:#018x}: {_verdict(report, log, verify)}")
    _save(model, base, out)
    say(f"wrote {out}")
    return report


def _verdict(report: ReplayReport, log: Log, verify: bool) -> str:
    if not verify:
        return "not verified"
    if report.verified is None:
        return "cannot be verified, the run was not finished"
    if report.verified == log.last:
        return "verified, every bit is that of the run"
    behind = log.last - report.verified
    return (
        f"verified up to entry {report.verified}, every bit is that of the run; no fingerprint is "
        f"known of the last {behind}"
    )


def _load_base(base: str, log: Log) -> Any:
    """Loads the base in the dtype of the run.

    Raises:
        WrongBaseError: in no dtype it is the model that the log starts from.
    """
    first: WrongBaseError | None = None
    for dtype in _dtypes(log.header):
        model = _load(base, log.header, dtype)
        try:
            check_base(model, log)
            return model
        except WrongBaseError as error:
            # The first dtype is the likeliest, and its difference tells most.
            first = first or error
    assert first is not None
    raise first


def _load(base: str, header: LogHeader, dtype: torch.dtype | str) -> Any:
    import transformers

    name = header.architecture
    if name is None or not hasattr(transformers, name):
        config = transformers.AutoConfig.from_pretrained(base)
        name = next(iter(config.architectures or ()), None)
    kind = getattr(transformers, name, None) if name else None
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise WrongBaseError(f"{base} is of the architecture {name}, which transformers has not")
    return kind.from_pretrained(base, dtype=dtype)


def _dtypes(header: LogHeader) -> list[torch.dtype | str]:
    """The dtypes that the run may have loaded its model in, the likeliest first."""
    known = getattr(torch, header.dtype or "", None)
    if isinstance(known, torch.dtype):
        return [known]
    counts = Counter(p.dtype for p in header.parameters)
    if counts:
        return [getattr(torch, counts.most_common(1)[0][0])]
    # A federation's server holds no model and cannot tell.
    return ["auto", torch.float32, torch.bfloat16, torch.float16]


def _save(model: nn.Module, base: str, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and renamed: a folder of that name is a whole model.
    draft = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    draft.mkdir()
    try:
        model.save_pretrained(draft)  # type: ignore[operator]
        if Path(base).is_dir():
            for pattern in _TOKENIZER_FILES:
                for file in Path(base).glob(pattern):
                    if file.is_file() and not (draft / file.name).exists():
                        shutil.copy2(file, draft / file.name)
        os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
