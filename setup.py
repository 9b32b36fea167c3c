"""Builds zorba_kernels._C: C++ for the CPU and, where nvcc is found, CUDA.

ZORBA_CUDA=auto (default) builds the CUDA part if nvcc is on the PATH and works, 0 leaves it out, 1
fails without it. ZORBA_CUDA_ARCHS (default "80;90;100", as far as nvcc knows them) names the
compute capabilities; the last one is also kept as PTX. torch is never imported here: the extension
does not link against it.

``pip install`` brings ninja and pybind11. Neither is needed to build in the source tree, with
``python setup.py build_ext --inplace``: without ninja the same commands run directly, all of them
every time, and torch carries pybind11's headers.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

try:
    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext
except ImportError:
    raise SystemExit(
        f"setup.py needs setuptools, which {sys.executable} does not have: install it, or build "
        "with pip install ."
    ) from None

ROOT = Path(__file__).resolve().parent
CXX_FLAGS = [
    *["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"],
    # Equal bits on every instruction set: no contraction into FMA behind our back.
    *["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
]
# Baseline first: the linker takes code that objects share (std templates) from the first of them.
ISA_FLAGS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = [
        *[
            "-mavx512f",
            "-mavx512bw",
            "-mavx512dq",
            "-mavx512vl",
            "-mfma",
            "-mprefer-vector-width=512",
        ],
        # GCC 12 warns inside its own intrinsics (GCC bug 105593).
        *["-Wno-uninitialized", "-Wno-maybe-uninitialized"],
    ]


class Cuda(NamedTuple):
    """A CUDA compiler that was seen to work."""

    nvcc: str
    libraries: list[str]  # folders
    gencode: list[str]


CUDA_FLAGS = [
    *["-std=c++17", "-O3", "-fmad=false", "-lineinfo"],
    "-diag-suppress=1675",  # GCC's unroll pragma in noise.h
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off",
]


def cuda_toolchain() -> Cuda | None:
    """The CUDA compiler, or None when it should not or cannot be used."""
    wish = os.environ.get("ZORBA_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"ZORBA_CUDA is {wish!r}; expected auto, 0 or 1")
    if wish == "0":
        return None
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    found = try_cuda(nvcc) if nvcc else "nvcc is not on the PATH"
    if isinstance(found, Cuda):
        print(f"zorba: building with CUDA: {found.nvcc}, {' '.join(found.gencode)}")
        return found
    if wish == "1":
        raise SystemExit(f"ZORBA_CUDA=1, but {found}")
    print(f"zorba: building without CUDA: {found}")
    return None


def try_cuda(nvcc: str) -> Cuda | str:
    """The toolchain of an nvcc, or why it cannot be used: it must find its parts and compile."""
    # nvcc may be a wrapper script, so ask it where its libraries are.
    dry = output_of([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull])
    folders = re.findall(r'"-L([^"]+)"', dry or "")
    folders = [f for f in folders if (Path(f) / "libcudart_static.a").is_file()]
    if not folders:
        return f"{nvcc} does not work or its libcudart_static.a is missing"
    archs = os.environ.get("ZORBA_CUDA_ARCHS", "").replace(",", ";").split(";")
    if archs == [""]:
        known = re.findall(r"compute_(\w+)", output_of([nvcc, "--list-gpu-arch"]) or "")
        archs = [a for a in ("80", "90", "100") if a in known]
        if not archs:
            return f"{nvcc} compiles for none of sm_80, sm_90 and sm_100"
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    gencode.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cu"
        probe.write_text("__global__ void probe(int *out) { *out = 1; }\n")
        command = [nvcc, *CUDA_FLAGS, *gencode, "-c", str(probe), "-o", f"{probe}.o"]
        if output_of(command) is None:
            return f"{nvcc} does not compile: {quote(command)}"
    return Cuda(nvcc, folders, gencode)


def output_of(command: list[str]) -> str | None:
    """What a command prints, or None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout + done.stderr


class Command(NamedTuple):
    """Makes one file out of others. Paths are absolute or relative to the build folder."""

    output: str
    inputs: list[str]
    words: list[str]


class CommandBuild(build_ext):
    """Compiles with ninja where there is one, links and imports the result."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles, links and imports the extension."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        compiles, link = commands(target, cuda_toolchain())
        ninja = ninja_command()
        if ninja is not None:
            (work / "build.ninja").write_text(ninja_rules(compiles, link))
            subprocess.run([*ninja, "-C", str(work)], check=True)
        else:
            run_directly(compiles, link, work)
        # An undefined symbol shows up at import, not at link time.
        check = "import importlib.util as u, sys; s = u.spec_from_file_location('_C', sys.argv[1])"
        check += "; u.module_from_spec(s)"
        subprocess.run([sys.executable, "-c", check, str(target)], check=True)


def commands(target: Path, cuda: Cuda | None) -> tuple[list[Command], Command]:
    """What compiles, in any order, and then what links."""
    includes = [f"-I{pybind11_headers()}", f"-I{sysconfig.get_path('include')}"]
    defines = ["-DZORBA_WITH_CUDA"] if cuda else []
    defines += ["-DZORBA_X86"] if "avx2" in ISA_FLAGS else []
    cxx = shlex.split(os.environ.get("CXX", "c++"))
    compiles: list[Command] = []

    def compile_(compiler: list[str], source: str, name: str) -> None:
        path, output = str(ROOT / "csrc" / source), f"{name}.o"
        words = [*compiler, "-MD", "-MF", f"{output}.d", "-c", path, "-o", output]
        compiles.append(Command(output, [path], words))

    # What takes longest goes first.
    plain = [*cxx, *CXX_FLAGS, *defines]
    libs: list[str] = []
    if cuda:
        for path in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            nvcc = [cuda.nvcc, *CUDA_FLAGS, "--threads=0", *cuda.gencode]
            compile_(nvcc, f"cuda/{path.name}", f"cuda_{path.stem}")
        compile_([*plain, *includes], "cuda/binding.cpp", "cuda_binding")
        libs = [*(f"-L{f}" for f in cuda.libraries), "-lcudart_static", "-lrt"]
    for isa, flags in ISA_FLAGS.items():
        compile_([*plain, f"-DZORBA_ISA={isa}", *flags], "cpu/kernels.cpp", f"cpu_{isa}")
    for source in ("cpu/dispatch.cpp", "cpu/threads.cpp"):
        compile_(plain, source, source.replace("/", "_"))
    compile_([*plain, *includes], "binding.cpp", "binding")
    objects = [command.output for command in compiles]
    words = [*cxx, "-shared", "-pthread", *objects, "-o", str(target), *libs, "-ldl"]
    return compiles, Command(str(target), objects, words)


def pybind11_headers() -> Path:
    """The folder of pybind11's headers: its own, or torch's. Imports neither."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for location in (spec and spec.submodule_search_locations) or []:
            folder = Path(location) / "include"
            if (folder / "pybind11" / "pybind11.h").is_file():
                return folder
    raise SystemExit(
        f"pybind11's headers are neither in pybind11 nor in torch of {sys.executable}: install "
        "pybind11"
    )


def ninja_command() -> list[str] | None:
    """How to start ninja, or None where there is none."""
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    return [found] if found else None


def ninja_rules(compiles: list[Command], link: Command) -> str:
    """The commands as the text of build.ninja."""
    lines = ["rule compile", "  command = $words", "  depfile = $out.d", "  deps = gcc"]
    lines += ["rule link", "  command = $words"]
    for rule, command in [*(("compile", c) for c in compiles), ("link", link)]:
        inputs = " ".join(map(escape, command.inputs))
        lines.append(f"build {escape(command.output)}: {rule} {inputs}")
        lines.append(f"  words = {quote(command.words).replace('$', '$$')}")
    return "\n".join([*lines, ""])


def run_directly(compiles: list[Command], link: Command, work: Path) -> None:
    """Runs the commands without ninja, as many at a time as there are processors."""

    def run(command: Command) -> None:
        print(f"zorba: {quote(command.words)}", flush=True)
        subprocess.run(command.words, cwd=work, check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(run, compiles):  # the first failure calls off what has not begun
            pass
    run(link)


def escape(path: str) -> str:
    """A path as ninja reads it in a build line."""
    return re.sub(r"([$ :])", r"$\1", path)


def quote(flags: list[str]) -> str:
    """A line of a shell, from its words."""
    return " ".join(shlex.quote(flag) for flag in flags)


setup(
    ext_modules=[Extension("zorba_kernels._C", sources=[])],
    cmdclass={"build_ext": CommandBuild},
)
