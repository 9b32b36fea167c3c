"""Builds zorba_kernels._C with ninja: C++ for the CPU and, where nvcc is found, CUDA.

ZORBA_CUDA=auto (default) builds the CUDA part if nvcc is on the PATH and works, 0 leaves it out, 1
fails without it. ZORBA_CUDA_ARCHS (default "80;90;100", as far as nvcc knows them) names the
compute capabilities; the last one is also kept as PTX. torch is never imported here: the extension
does not link against it.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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


class NinjaBuild(build_ext):
    """Writes one build.ninja, runs it and imports the result."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles, links and imports the extension."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(self.rules(target))
        subprocess.run([*ninja_command(), "-C", str(work)], check=True)
        # An undefined symbol shows up at import, not at link time.
        check = "import importlib.util as u, sys; s = u.spec_from_file_location('_C', sys.argv[1])"
        check += "; u.module_from_spec(s)"
        subprocess.run([sys.executable, "-c", check, str(target)], check=True)

    def rules(self, target: Path) -> str:
        """The text of build.ninja."""
        import pybind11

        cuda = cuda_toolchain()
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        defines = ["-DZORBA_WITH_CUDA"] if cuda else []
        defines += ["-DZORBA_X86"] if "avx2" in ISA_FLAGS else []
        cxx = os.environ.get("CXX", "c++")
        lines = [
            "rule cxx",
            f"  command = {cxx} -MD -MF $out.d {quote(CXX_FLAGS + defines)} $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {cxx} -shared -pthread $in -o $out $libs",
        ]
        if cuda:
            flags = quote([*CUDA_FLAGS, "--threads=0", *cuda.gencode])
            lines += [
                "rule nvcc",
                f"  command = {cuda.nvcc} -MD -MF $out.d {flags} -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
        objects: list[str] = []

        def compile_(rule: str, source: str, name: str, flags: list[str] | None = None) -> None:
            objects.append(f"{name}.o")
            lines.append(f"build {name}.o: {rule} {escape(ROOT / 'csrc' / source)}")
            lines.append(f"  flags = {quote(flags or [])}")

        for isa, flags in ISA_FLAGS.items():
            compile_("cxx", "cpu/kernels.cpp", f"cpu_{isa}", [f"-DZORBA_ISA={isa}", *flags])
        for source in ("cpu/dispatch.cpp", "cpu/threads.cpp"):
            compile_("cxx", source, source.replace("/", "_"))
        compile_("cxx", "binding.cpp", "binding", includes)
        libs: list[str] = []
        if cuda:
            for path in sorted((ROOT / "csrc/cuda").glob("*.cu")):
                compile_("nvcc", f"cuda/{path.name}", f"cuda_{path.stem}")
            compile_("cxx", "cuda/binding.cpp", "cuda_binding", includes)
            libs = [*(f"-L{f}" for f in cuda.libraries), "-lcudart_static", "-ldl", "-lrt"]
        lines += [
            f"build {escape(target)}: link {' '.join(objects)}",
            f"  libs = {quote(libs)}",
            "",
        ]
        return "\n".join(lines)


def escape(path: Path) -> str:
    """A path as ninja reads it in a build line."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def quote(flags: list[str]) -> str:
    """A line of a shell, from its words."""
    return " ".join(shlex.quote(flag) for flag in flags)


def ninja_command() -> list[str]:
    """How to start ninja."""
    return [sys.executable, "-m", "ninja"]


setup(
    ext_modules=[Extension("zorba_kernels._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
