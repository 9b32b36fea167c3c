"""Machine code of CUDA and Triton kernels, as cuobjdump lists it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
RESOURCES = re.compile(r"Function (\S+):\s*REG:(\d+) STACK:(\d+)(?: SHARED:\d+ LOCAL:(\d+))?")
PRODUCER = re.compile(rb"Cuda compilation tools, release [0-9.]+, V([0-9.]+)")
ARCH = "sm_90"
REGISTER = re.compile(r"[-|~]*R(\d+)(\.\w+)*\|?")
STORED = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # bytes; 4 without a size


@dataclass(frozen=True)
class Instruction:
    """One line of the disassembly."""

    address: int
    guard: str  # predicate with its @, or empty
    name: str  # with its suffixes
    operands: str

    @cached_property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @cached_property
    def arguments(self) -> list[str]:
        return [part.strip() for part in self.operands.split(",")]

    @cached_property
    def stored_bytes(self) -> int:
        if self.opcode not in ("ST", "STG"):
            return 0
        return next((STORED[s] for s in self.name.split(".") if s in STORED), 4)

    @property
    def is_wide_store(self) -> bool:
        """Whether it stores 16 bytes to memory that the compiler knows to be global."""
        return self.opcode == "STG" and self.stored_bytes == 16


def register(argument: str) -> int | None:
    """Number of the register that an argument names: 5 for R5, -R5.reuse and |R5|."""
    found = REGISTER.fullmatch(argument)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel."""

    name: str
    instructions: list[Instruction]
    registers: int
    stack_bytes: int  # spills and local arrays

    @property
    def local_accesses(self) -> int:
        """Instructions that access local memory: spills, and arrays that are not in registers."""
        return sum(i.opcode in ("LDL", "STL") for i in self.instructions)


def find_tool() -> str | None:
    spec = importlib.util.find_spec("triton")
    shipped = Path(spec.origin).parent / "backends/nvidia/bin" if spec and spec.origin else None
    return shutil.which("cuobjdump") or (shipped and shutil.which("cuobjdump", path=shipped))


def run_tool(*arguments: str, folder: str | None = None) -> str:
    tool = find_tool()
    if tool is None:
        raise RuntimeError("cuobjdump is neither on the PATH nor in a triton wheel")
    command = [tool, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def disassemble(path: Path, arch: str | None = None) -> list[Code]:
    """Every kernel of a file, of one architecture if it holds several."""
    only = ["-arch", arch] if arch else []
    used = resources(run_tool("-res-usage", *only, str(path)))
    listing = run_tool("-sass", *only, str(path))
    return [Code(name, code, *used[name]) for name, code in functions(listing)]


def disassemble_cubin(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (code,) = disassemble(Path(file.name))
    return code


def functions(listing: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Yields name and instructions of every kernel of a listing."""
    for part in listing.split("Function : ")[1:]:
        name, *lines = part.splitlines()
        found = [m for m in map(LINE.match, lines) if m]
        code = [Instruction(int(m[1], 16), (m[2] or "").strip(), m[3], m[4].strip()) for m in found]
        yield name.strip(), code


def resources(listing: str) -> dict[str, tuple[int, int]]:
    """(registers, bytes of stack and local memory) of every kernel."""
    found = RESOURCES.findall(listing)
    return {name: (int(regs), int(stack) + int(local or 0)) for name, regs, stack, local in found}


def assembler(binary: bytes) -> str:
    """Version of the ptxas that made a cubin, which notes it there."""
    found = PRODUCER.search(binary)
    return found[1].decode() if found else "unknown"


def assembler_of(path: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        run_tool("-arch", ARCH, "-xelf", "all", str(path.resolve()), folder=folder)
        made = {assembler(cubin.read_bytes()) for cubin in Path(folder).glob("*.cubin")}
    return ", ".join(sorted(made)) or "unknown"
