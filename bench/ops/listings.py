"""The machine code of compiled kernels as text: what cuobjdump prints, of many kernels by one disassembler.

cuobjdump starts nvdisasm for each file, which takes half a second to begin: longer than ptxas takes for most kernels.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

ALIGNMENT = 128
"""Bytes that a function begins at a multiple of."""
_SECTION = struct.Struct("<IIQQQQIIQQ")


def instructions_of(cubin: bytes) -> bytes:
    """The encoded instructions of a cubin's functions, one after another.

    Raises:
        ValueError: It is no ELF file of 64 bits, or has no function.
    """
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise ValueError("a cubin is an ELF file of 64 bits, little-endian; this is none")
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, number, names_at = struct.unpack_from("<HHH", cubin, 58)
    sections = [_SECTION.unpack_from(cubin, table + size * i) for i in range(number)]
    names = sections[names_at][4]
    found = [
        cubin[start : start + length]
        for name, _, _, _, start, length, *_ in sections
        if cubin.startswith(b".text.", names + name)
    ]
    if not found:
        raise ValueError("this cubin has no function")
    return b"".join(found)


def listings(cubins: Sequence[bytes], target: str) -> list[str]:
    """A line of each kernel's instructions each, ``/*0050*/ PREEXIT ;``, addresses from its own start.

    Branches alone read otherwise than in cuobjdump's listing: their targets are counted from the first kernel.

    Args:
        cubins: As ptxas made them, all for one target.
        target: As in PTX: ``sm_90a``.

    Raises:
        ValueError: A cubin has no machine code, or the disassembler did not read all of it.
        subprocess.CalledProcessError: The disassembler failed, for one that it doesn't know the target.
    """
    from triton import knobs

    starts, code = [], b""
    for cubin in cubins:
        starts.append(len(code))
        own = instructions_of(cubin)
        code += own + bytes(-len(own) % ALIGNMENT)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.bin"
        path.write_bytes(code)
        # -ndf: without the analysis of branches, whose labels nobody reads.
        command = [knobs.nvidia.nvdisasm.path, "-ndf", "-b", target.replace("sm_", "SM"), str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines: list[list[str]] = [[] for _ in cubins]
    kernel = 0
    for address, instruction in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text):
        at = int(address, 16)
        while kernel + 1 < len(starts) and at >= starts[kernel + 1]:
            kernel += 1
        lines[kernel].append(f"/*{at - starts[kernel]:04x}*/ {instruction} ;")
    if not all(lines):
        raise ValueError("the disassembler left out a kernel")
    return ["\n".join(each) for each in lines]
