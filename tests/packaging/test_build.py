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
    banned = ("zorba", "transformers", "scipy", "triton", "peft", "nvflare", "pandas")
    code = f"""
import sys, torch
before = set(sys.modules)
import zorba_kernels
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(new & set({banned!r})))
"""
    assert run_python(code).strip() == "[]"


def test_without_the_compiled_part():
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


def test_source_distribution_can_be_built_from(tmp_path):
    """Made without network and without compiling; it carries no build products."""
    pytest.importorskip("setuptools", reason="the build backend is not installed here")
    code = f"import setuptools.build_meta as b; print('made', b.build_sdist({str(tmp_path)!r}))"
    name = run_python(code).rsplit("made ", 1)[1].strip()
    with tarfile.open(tmp_path / name) as archive:
        found = {path.split("/", 1)[1] for path in archive.getnames() if "/" in path}
    needed = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    needed += [p for part in ("zorba_kernels", "python/zorba") for p in (ROOT / part).rglob("*.py")]
    wanted = {str(p.relative_to(ROOT)) for p in needed}
    wanted |= {"setup.py", "pyproject.toml", "LICENSE", "README.md"}
    assert {"csrc/noise.h", "csrc/binding.cpp", "csrc/cpu/kernels.cpp"} <= wanted
    assert wanted <= found, f"missing: {sorted(wanted - found)}"
    assert not [path for path in found if path.endswith((".so", ".o", ".pyc"))]
