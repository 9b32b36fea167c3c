"""setup.py with and without ninja, pybind11 and CUDA: one list of commands, run either way."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

setuptools = pytest.importorskip("setuptools", reason="the build backend is not installed here")
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no source tree")


@pytest.fixture
def setup(monkeypatch) -> ModuleType:
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    spec = importlib.util.spec_from_file_location("setup_of_zorba", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hide(monkeypatch, *hidden: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in hidden else find(n))


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


FAKE_COMPILER = f"""#!{sys.executable}
import sys, pathlib
folder = pathlib.Path(__file__).parent
with (folder / 'log').open('a') as f: f.write(repr(sys.argv[1:]) + '\\n')
pathlib.Path(sys.argv[sys.argv.index('-o') + 1]).touch()
sys.exit((folder / 'fail').exists())
"""
"""Writes down how it was called, makes the file that it was asked for, and fails on demand."""


@pytest.fixture
def plan(tmp_path, monkeypatch, setup):
    # A space: quoting is part of what is tested.
    compiler = program(tmp_path / "fake compiler", FAKE_COMPILER)
    monkeypatch.setenv("CXX", shlex.quote(str(compiler)))
    cuda = setup.Cuda(str(compiler), ["/opt/$cuda/lib"], ["-gencode=arch=compute_90,code=sm_90"])
    return setup.commands(tmp_path / "out $1" / "_C.so", cuda)


def logged(tmp_path) -> list[str]:
    lines = (tmp_path / "log").read_text().splitlines()
    (tmp_path / "log").unlink()
    return lines


def test_ninja_and_direct_run_the_same_commands(setup, plan, tmp_path):
    pytest.importorskip("ninja")
    compiles, link = plan
    for name in ("out $1", "ninja", "direct"):
        (tmp_path / name).mkdir()
    (tmp_path / "ninja/build.ninja").write_text(setup.ninja_rules(compiles, link))
    command = [*setup.ninja_command(), "-C", str(tmp_path / "ninja")]
    subprocess.run(command, check=True, capture_output=True)
    by_ninja = logged(tmp_path)
    setup.run_directly(compiles, link, tmp_path / "direct")
    directly = logged(tmp_path)
    assert len(directly) == len(compiles) + 1
    assert sorted(by_ninja) == sorted(directly)
    assert by_ninja[-1] == directly[-1] == repr(link.words[1:])  # linked last


def test_everything_is_compiled_and_linked(plan):
    compiles, link = plan
    sources = {Path(command.inputs[0]) for command in compiles}
    assert sources == {p for s in ("cpp", "cu") for p in ROOT.glob(f"csrc/**/*.{s}")}
    assert link.inputs == [command.output for command in compiles]
    assert set(link.inputs) <= set(link.words)
    # What objects share must come from baseline code: it is linked before the others.
    isas = [o for o in link.inputs if o.startswith("cpu_") and o[4:-2] in ("baseline", "avx2")]
    assert isas[0] == "cpu_baseline.o"


def test_a_failing_command_fails_the_build(setup, plan, tmp_path):
    compiles, link = plan
    (tmp_path / "fail").touch()
    with pytest.raises(subprocess.CalledProcessError):
        setup.run_directly(compiles, link, tmp_path)
    assert repr(link.words[1:]) not in logged(tmp_path)


def test_headers_of_torch_serve_without_pybind11(setup, monkeypatch):
    hide(monkeypatch, "pybind11")
    folder = setup.pybind11_headers()
    assert folder.parent.name == "torch"
    compiler = ["c++", *setup.CXX_FLAGS, "-O0", "-fsyntax-only", "-Werror"]
    python = f"-I{setup.sysconfig.get_path('include')}"
    source = str(ROOT / "csrc/binding.cpp")
    subprocess.run([*compiler, f"-I{folder}", python, source], check=True)


def test_no_headers_anywhere_says_so(setup, monkeypatch):
    hide(monkeypatch, "pybind11", "torch")
    with pytest.raises(SystemExit, match="install pybind11"):
        setup.pybind11_headers()


def test_no_ninja_means_none(setup, monkeypatch, tmp_path):
    hide(monkeypatch, "ninja")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.ninja_command() is None


def test_no_setuptools_says_so():
    code = "import sys, runpy; sys.modules['setuptools'] = None; runpy.run_path('setup.py')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "setup.py needs setuptools" in done.stderr
    assert "Traceback" not in done.stderr


BROKEN_NVCC = {
    "fails": ("exit 1", "does not work"),
    "no libraries": ("echo '#$ LIBRARIES= \"-L/nowhere\"' >&2", "libcudart_static.a is missing"),
    "compiles nothing": (
        """case "$*" in
          *--dryrun*) echo "#$ LIBRARIES= \\"-L$(dirname "$0")\\"" >&2 ;;
          *--list-gpu-arch*) echo compute_90 ;;
          *) exit 1 ;;
        esac""",
        "does not compile",
    ),
    "missing": (None, "not on the PATH"),
}


@pytest.mark.parametrize("case", BROKEN_NVCC)
def test_a_broken_nvcc(setup, monkeypatch, tmp_path, capsys, case):
    """It must not fail an ordinary installation, and must fail one that asks for CUDA."""
    script, said = BROKEN_NVCC[case]
    (tmp_path / "libcudart_static.a").touch()
    if script is not None:
        program(tmp_path / "nvcc", f"#!/bin/sh\n{script}\n")
    monkeypatch.setenv("NVCC", str(tmp_path / "nvcc"))
    monkeypatch.setenv("ZORBA_CUDA", "auto")
    assert setup.cuda_toolchain() is None
    printed = capsys.readouterr().out
    assert "building without CUDA" in printed
    assert said in printed
    monkeypatch.setenv("ZORBA_CUDA", "1")
    with pytest.raises(SystemExit, match=f"ZORBA_CUDA=1, but .*{said}"):
        setup.cuda_toolchain()


def test_an_unknown_wish_for_cuda(setup, monkeypatch):
    monkeypatch.setenv("ZORBA_CUDA", "yes")
    with pytest.raises(SystemExit, match="expected auto, 0 or 1"):
        setup.cuda_toolchain()
