"""``zorba replay``: a folder with the fine-tuned model, from a base and a log."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from tqdm import tqdm

from zorba.log import Log, LogError, LogHeader, WrongBaseError, check_base, replay

if TYPE_CHECKING:
    from zorba.apps.cli import ReplaySettings

_TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "*.tiktoken", "*.jinja", "preprocessor_config.json", "processor_config.json"),
)


def run_replay(settings: ReplaySettings) -> None:
    """Writes the fine-tuned model to a folder, which is there as a whole or not at all.

    LogError: the log is damaged, the base is another model, or the folder is taken.
    """
    log, out = Log.read(settings.log), settings.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LogError(f"{out} exists: give a folder that is new or empty")
    skipped = f" ({log.num_skipped} more skipped)" if log.num_skipped else ""
    print(
        f"{settings.log}: {log.size:,} bytes, {log.num_steps:,} steps{skipped}, "
        f"{log.header.distribution} noise, {log.header.rounding} rounding"
    )
    if log.torn_bytes:
        print(f"ignored a torn tail of {log.torn_bytes} bytes: the run was interrupted")
    model = _load_base(settings.base, log)
    with tqdm(total=log.num_steps, desc="replay", disable=None) as bar:  # None: on a terminal alone
        report = replay(
            model, log, verify=settings.verify, progress=lambda done, _: bar.update(done - bar.n)
        )
    rate = f", {report.steps / report.seconds:,.1f} steps/s" if report.steps else ""
    print(f"replayed in {report.seconds:.2f} s{rate}, {report.passes} passes over the weights")
    if not settings.verify:
        verdict = "not verified"
    elif report.verified is None:
        verdict = "cannot be verified, the run was not finished"
    elif report.verified == log.last:
        verdict = "verified, every bit is that of the run"
    else:
        verdict = f"verified up to entry {report.verified}, every bit is that of the run; no "
        verdict += f"fingerprint is known of the last {log.last - report.verified}"
    print(f"fingerprint {report.fingerprint:#018x}: {verdict}")
    _save(model, settings.base, out)
    print(f"wrote {out}")


def _load_base(base: str, log: Log) -> Any:
    """Loads the base in the dtype of the run; WrongBaseError where it is another model in all."""
    kind = _class_of(base, log.header)
    known = getattr(torch, log.header.dtype or "", None)
    # A federation's server holds no model and cannot tell its dtype; the likeliest come first.
    guesses = ["auto", torch.float32, torch.bfloat16, torch.float16]
    first: WrongBaseError | None = None
    for dtype in [known] if isinstance(known, torch.dtype) else guesses:
        model = kind.from_pretrained(base, dtype=dtype)
        try:
            check_base(model, log)
            return model
        except WrongBaseError as error:
            first = first or error  # the difference of the likeliest dtype tells most
    assert first is not None
    raise first


def _class_of(base: str, header: LogHeader) -> Any:
    name = header.architecture
    if name is None or not hasattr(transformers, name):
        config = transformers.AutoConfig.from_pretrained(base)
        name = next(iter(config.architectures or ()), None)
    kind = getattr(transformers, name or "", None)
    if not hasattr(kind, "from_pretrained"):
        raise WrongBaseError(f"{base} is of the architecture {name}, which transformers has not")
    return kind


def _save(model: nn.Module, base: str, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and renamed: a folder of that name is a whole model.
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        draft = Path(folder) / "model"
        model.save_pretrained(draft)  # type: ignore[operator]
        for pattern in _TOKENIZER_FILES:
            for file in Path(base).glob(pattern):
                if file.is_file() and not (draft / file.name).exists():
                    shutil.copy2(file, draft / file.name)
        os.replace(draft, out)
