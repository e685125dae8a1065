"""What the compiler makes of the kernels with matrix products; compiled here, for a GPU that need not be here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench.ops.registers import Compiled, hasty_accesses, wrong_descriptors

# From a listing of gradient_kernel whose products read wrong operands on an H100.
FAULT = """
        /*53c0*/                   UIADD3 UR14, UP0, UR4, 0x40, URZ ;      /* 0x000000 */
        /*53e0*/                   UIADD3 UR18, UP1, UR4, 0x40, URZ ;
        /*5570*/                   ULDC UR32, c[0x0][0x2dc] ;
        /*5680*/                   UIADD3.X UR15, UR4, -0x7fffffe0, URZ, UP0, !UPT ;
        /*56a0*/                   UIADD3.X UR19, UR4, -0x7fffffe0, URZ, UP1, !UPT ;
"""


def test_the_fault_is_found() -> None:
    found = wrong_descriptors(FAULT)
    assert [line.split(":")[0] for line in found] == ["5680", "56a0"]


def test_a_base_that_is_written_in_between_is_none() -> None:
    assert not wrong_descriptors(FAULT.replace("ULDC UR32, c[0x0][0x2dc]", "UMOV UR4, URZ"))
    assert not wrong_descriptors(
        FAULT.replace("UIADD3.X UR15, UR4", "UIADD3.X UR15, UR5").replace("UIADD3.X UR19, UR4", "UIADD3.X UR19, URZ")
    )


WAITING = """
        /*0050*/                   PREEXIT ;
        /*0060*/                   ACQBULK ;
        /*0070*/                   LDG.E.128 R4, desc[UR8][R2.64] ;
"""


def test_memory_touched_before_the_wait_is_found() -> None:
    assert hasty_accesses(WAITING) == ()
    load = "        /*0040*/                   @!P0 LDG.E R8, desc[UR8][R2.64] ;\n"
    assert hasty_accesses(load + WAITING) == ("0040: @!P0 LDG.E R8, desc[UR8][R2.64]",)
    assert hasty_accesses(WAITING.replace("ACQBULK", "NOP")) == ("it never waits",)


def test_what_must_not_run() -> None:
    good = Compiled(
        kernel="k", sizes="K 32 V 64", dtype="bf16", warps=4, registers=255, spills=0, shared=0, products=8, wrong=()
    )
    assert not good.faulty
    assert not replace(good, spills=3, products=0).faulty
    assert replace(good, spills=3).faulty
    assert replace(good, wrong=("5680: UIADD3.X",)).faulty


@pytest.mark.skipif(torch.version.hip is not None, reason="compiles for NVIDIA GPUs")
def test_every_kernel_of_the_table_may_run() -> None:
    """In a process of its own: this one may have Triton's interpreter in the compiler's place."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "ops", "registers"]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok\n") == done.stdout.count("\n") == 37
