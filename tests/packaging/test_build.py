"""What an installation contains, and what it works without."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import zorba_kernels as zk

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str) -> str:
    """Output of a fresh interpreter."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_build_info():
    info = zk.build_info()
    assert info["compiled"] is True, info["reason"]
    assert info["reason"] is None
    assert info["noise_version"] == zk.NOISE_VERSION
    assert info["compiler"]
    assert info["cpu_isas"][-1] == "baseline"
    assert set(info["cpu_isas"]) <= {"avx512", "avx2", "baseline"}
    assert isinstance(info["cuda"], bool)


def test_import_needs_torch_alone():
    banned = ("zorba", "transformers", "scipy", "triton", "peft", "flwr", "pandas")
    code = f"""
import sys, torch
before = set(sys.modules)
import zorba_kernels
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(new & set({banned!r})))
"""
    assert run_python(code).strip() == "[]"


def test_without_the_compiled_part():
    """Imports, says what is missing, and computes the same bits, slowly."""
    code = """
import sys
sys.modules["zorba_kernels._C"] = None  # import raises ImportError
import torch, zorba_kernels as zk
info = zk.build_info()
assert info["compiled"] is False and info["cpu_isas"] == [] and info["cuda"] is False, info
assert "pip install" in info["reason"], info
rows = {row.name: row for row in zk.backends()}
assert rows["reference"].available and not rows["cpu"].available
assert rows["cpu"].reason == info["reason"]
try:
    zk.noise(8, seed=1, stream=2, backend="cpu")
except zk.BackendUnavailableError as error:
    assert "compiled part is missing" in str(error), error
else:
    raise AssertionError("cpu served without its compiled part")
print(zk.noise(8, seed=1, stream=2).tolist())
"""
    assert run_python(code).strip() == str(zk.noise(8, seed=1, stream=2).tolist())


def test_another_noise_version_of_the_compiled_part_is_refused():
    code = """
import sys, types
sys.modules["zorba_kernels._C"] = types.SimpleNamespace(noise_version=999)
import zorba_kernels as zk
print(zk.build_info()["compiled"], {row.name: row for row in zk.backends()}["cpu"].reason)
"""
    output = run_python(code)
    assert output.startswith("False")
    assert "noise version 999" in output


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> set[str]:
    """Paths in a source distribution, made without network and without compiling."""
    pytest.importorskip("setuptools", reason="the build backend is not installed here")
    where = tmp_path_factory.mktemp("sdist")
    code = f"""
import os, setuptools.build_meta as backend
os.chdir({str(ROOT)!r})
print("made", backend.build_sdist({str(where)!r}))
"""
    name = run_python(code).rsplit("made ", 1)[1].strip()
    with tarfile.open(where / name) as archive:
        return {path.split("/", 1)[1] for path in archive.getnames() if "/" in path}


def test_source_distribution_can_be_built_from(sdist):
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert {"csrc/noise.h", "csrc/binding.cpp", "csrc/cpu/kernels.cpp"} <= sources
    assert sources <= sdist, f"missing: {sorted(sources - sdist)}"
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= sdist
    for package in ("zorba_kernels", "python/zorba"):
        for path in (ROOT / package).rglob("*.py"):
            assert str(path.relative_to(ROOT)) in sdist


def test_source_distribution_carries_no_build_products(sdist):
    assert not [path for path in sdist if path.endswith((".so", ".o", ".pyc"))]
