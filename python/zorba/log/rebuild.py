"""``zorba replay``: a folder with the fine-tuned model, from a base and a trajectory."""

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

from zorba.log.errors import TrajectoryError, WrongBaseError
from zorba.log.file import Trajectory
from zorba.log.header import TrajectoryHeader
from zorba.log.replay import Progress, ReplayReport, replay

_TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "*.tiktoken", "*.jinja", "preprocessor_config.json", "processor_config.json"),
)

Say = Callable[[str], None]


def rebuild(
    base: str,
    log: Path,
    out: Path,
    *,
    verify: bool = True,
    say: Say = print,
    progress: Progress | None = None,
) -> ReplayReport:
    """Writes the fine-tuned model to a folder, which is there as a whole or not at all.

    Args:
        base: local folder or hub name of a Hugging Face model.
        log: the trajectory.
        out: folder to be made; an empty one is used.
        verify: see ``replay``.
        say: is given lines on what happens.
        progress: see ``replay``.

    Raises:
        TrajectoryError: the trajectory is damaged, the base is another model, or ``out`` is taken.
        OSError: the base cannot be loaded, or ``out`` not be written.
    """
    trajectory = Trajectory.read(log)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrajectoryError(f"{out} exists: give a folder that is new or empty")
    header = trajectory.header
    skipped = f" ({trajectory.num_skipped} more skipped)" if trajectory.num_skipped else ""
    say(
        f"{log}: {trajectory.size:,} bytes, {trajectory.num_steps:,} steps{skipped}, "
        f"{header.distribution} noise, {header.rounding} rounding"
    )
    if trajectory.torn_bytes:
        say(f"ignored a torn tail of {trajectory.torn_bytes} bytes: the run was interrupted")
    model = _load(base, header)
    report = replay(model, trajectory, verify=verify, progress=progress)
    rate = f", {report.steps / report.seconds:,.1f} steps/s" if report.steps else ""
    say(f"replayed in {report.seconds:.2f} s{rate}, {report.passes} passes over the weights")
    say(f"fingerprint {report.fingerprint:#018x}: {_verdict(report, trajectory, verify)}")
    _save(model, base, out)
    say(f"wrote {out}")
    return report


def _verdict(report: ReplayReport, trajectory: Trajectory, verify: bool) -> str:
    if report.verified:
        return "verified, every bit is that of the run"
    if verify and trajectory.fingerprint is None:
        return "cannot be verified, the run was not finished"
    return "not verified"


def _load(base: str, header: TrajectoryHeader) -> Any:
    import transformers

    name = header.architecture
    if name is None or not hasattr(transformers, name):
        config = transformers.AutoConfig.from_pretrained(base)
        name = next(iter(config.architectures or ()), None)
    kind = getattr(transformers, name, None) if name else None
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise WrongBaseError(f"{base} is of the architecture {name}, which transformers has not")
    return kind.from_pretrained(base, dtype=_dtype(header))


def _dtype(header: TrajectoryHeader) -> torch.dtype:
    """What the base is loaded in: the dtype of most weights."""
    known = getattr(torch, header.dtype or "", None)
    if isinstance(known, torch.dtype):
        return known
    counts = Counter(p.dtype for p in header.parameters)
    return counts.most_common(1)[0][0] if counts else torch.float32


def _save(model: nn.Module, base: str, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
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
