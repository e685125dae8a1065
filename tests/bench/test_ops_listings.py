"""Many kernels' machine code by one disassembler is, instruction by instruction, what cuobjdump lists of each."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from bench.ops.listings import instructions_of, listings

knobs = pytest.importorskip("triton.knobs")

PTX = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry {name}(.param .u64 at)
{{
    .reg .b64 %rd<3>;
    .reg .b32 %r<{number}>;
    ld.param.u64 %rd1, [at];
    ld.global.u32 %r0, [%rd1];
{body}
    st.global.u32 [%rd1], %r{last};
    ret;
}}
"""


def cubin_of(name: str, length: int, folder: Path) -> bytes:
    """What ptxas makes of a chain of multiplications."""
    body = "\n".join(f"    mul.lo.u32 %r{i + 1}, %r{i}, %r{i};" for i in range(length))
    (folder / f"{name}.ptx").write_text(PTX.format(name=name, number=length + 1, body=body, last=length))
    made = folder / f"{name}.cubin"
    subprocess.run([knobs.nvidia.ptxas.path, "-arch=sm_90a", "-o", made, folder / f"{name}.ptx"], check=True)
    return made.read_bytes()


def listed_alone(path: Path) -> list[tuple[str, str]]:
    command = [knobs.nvidia.cuobjdump.path, "-sass", str(path)]
    return instructions(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def instructions(listing: str) -> list[tuple[str, str]]:
    """Addresses and instructions; of a branch not where to."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", listing)
    return [(address, re.sub(r"BRA 0x\w+", "BRA", instruction)) for address, instruction in found]


def test_each_kernels_instructions_are_those_that_cuobjdump_lists(tmp_path: Path) -> None:
    cubins = [cubin_of(f"k{length}", length, tmp_path) for length in (3, 40, 9)]
    found = [instructions(listing) for listing in listings(cubins, "sm_90a")]
    assert found == [listed_alone(tmp_path / f"k{length}.cubin") for length in (3, 40, 9)]
    assert [sum("IMAD" in instruction for _, instruction in each) >= 3 for each in found] == [True] * 3


def test_what_is_no_cubin_is_refused() -> None:
    with pytest.raises(ValueError, match="this is none"):
        instructions_of(b"// .version 8.0")
    with pytest.raises(ValueError, match="this is none"):
        instructions_of(b"\x7fELF\x01\x01" + bytes(60))
