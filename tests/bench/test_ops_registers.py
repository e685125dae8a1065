"""What the compiler makes of the kernels with matrix products; compiled here, for a GPU that need not be here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from bench.cli.main import app
from bench.ops.registers import (
    Compiled,
    asynchronous_products,
    by_capability,
    hasty_accesses,
    too_much_shared,
)
from dig.ops.tiles import KIB, sm90

QUICK, ALL = 22, 99
"""Kernels, and their variants; SwiGLU's GEMMs, of which there are two and seven, and the gradients of weights in one
launch are Hopper's alone."""
OTHERWISE = {"9.0": (5, 10), "10.0": (2, -10)}
"""More of them, or fewer: gradients in rounds and outputs in parts, beside the other form; Blackwell for data centres
has a forward pass in one launch of few programs alone."""

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
    assert hasty_accesses(load.replace("LDG.E R8", "ATOM.E.ADD R8") + WAITING)
    assert not hasty_accesses("        /*0290*/                   ATOMS.OR RZ, [UR5], R2 ;\n" + WAITING)


def test_what_must_not_run() -> None:
    good = Compiled(
        kernel="k", sizes="K 32 V 64", dtype="bf16", warps=4, registers=255, spills=0, shared=0, products=8, wrong=()
    )
    assert (good.faulty, good.verdict) == (False, "ok")
    slow = replace(good, spills=3, products=0)
    assert (slow.faulty, slow.verdict) == (False, "spills without asynchronous products: ok")
    spilling = replace(good, spills=3)
    assert (spilling.faulty, spilling.verdict) == (True, "spills beside asynchronous products")
    wrong = replace(slow, wrong=("5680: UIADD3.X", "56a0: UIADD3.X"))
    assert (wrong.faulty, wrong.verdict) == (True, "5680: UIADD3.X; 56a0: UIADD3.X")


@pytest.mark.parametrize(
    ("instruction", "counted"),
    [
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], !UPT", 1),
        ("UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR12]", 1),
        ("UTCQMMA.2CTA gdesc[UR8], gdesc[UR10], tmem[UR12]", 1),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", 0),
        ("UTCBAR [UR4], URZ", 0),
    ],
)
def test_products_whose_operands_are_found_by_descriptors(instruction: str, counted: int) -> None:
    """Spills beside any other product are slow and no fault."""
    assert asynchronous_products(f"        /*53c0*/                   {instruction} ;\n" * 2) == 2 * counted


def test_shared_memory_is_held_to_tiles_and_gpu() -> None:
    variant = SimpleNamespace(shared=28 * KIB)
    tiny = replace(sm90.ARCHITECTURE, name="Tiny", capability=(5, 3), shared_memory=20 * KIB)
    assert too_much_shared(20 * KIB, variant, tiny) == ()  # type: ignore[arg-type]
    assert too_much_shared(24 * KIB, variant, tiny) == ("24.0 KiB of shared memory where Tiny (5.3) has 20",)  # type: ignore[arg-type]
    assert too_much_shared(29 * KIB, variant, sm90.ARCHITECTURE) == (  # type: ignore[arg-type]
        "29.0 KiB of shared memory where its tiles count with 28",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--capabilities", "9.1"), "unknown --capabilities '9.1'"),
        (("--capabilities", "9.0,9.1"), "unknown --capabilities '9.1'"),
        (("--kernels", "gradient_kernels"), "unknown --kernels 'gradient_kernels': did you mean gradient_kernel?"),
        (("--kernels", ","), "--kernels needs at least one of"),
    ],
)
def test_options_are_checked(words: tuple[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = CliRunner().invoke(app, ["ops", "registers", *words])
    assert found.exit_code == 2, found.output
    assert found.output.count("\n") == 1, found.output
    assert message in found.output


CAPABILITIES = list(by_capability())


def compiled(*options: str) -> list[str]:
    """A line for each kernel that was compiled, in a process of its own: this one may have Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "ops", "registers", *options]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.endswith(" ok") for line in lines)
    return lines


ROUNDS = """
import json
from dataclasses import asdict
from bench.ops.kernel_variants import kernel_variants
from bench.ops.registers import inspect_variants
from dig.ops.tiles import architectures

(hopper,) = (each for each in architectures() if each.capability == (9, 0))
names = "gradient_rounds_kernel", "output_backward_parts_kernel"
chosen = [each for each in kernel_variants(hopper) if each.function.__name__ in names]
print(json.dumps([asdict(each) | {"faulty": each.faulty} for each in inspect_variants(chosen, hopper)]))
"""


@pytest.mark.slow
def test_three_programs_of_rounds_share_an_sm_of_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ROUNDS]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True, timeout=600)
    parts, *gradients, plain_with_scan = json.loads(done.stdout)
    assert len(gradients) == 3
    assert not [each for each in (parts, *gradients, plain_with_scan) if each["faulty"]]
    for each in (parts, *gradients):
        assert 3 * 32 * 4 * each["registers"] <= 65536
        assert 3 * each["shared"] <= 227 * KIB


def test_the_compiler_has_tile_choices_for_every_architecture() -> None:
    assert {"8.0", "8.9", "9.0", "10.0", "12.0"} <= set(CAPABILITIES)


MEASURED_ON = "9.0"
"""Whose kernels are compiled each time; those of the other architectures, when slow tests run."""
HERE = [pytest.param(each, marks=() if each == MEASURED_ON else pytest.mark.slow) for each in CAPABILITIES]


@pytest.mark.skipif(torch.version.hip is not None, reason="compiles for NVIDIA GPUs")
@pytest.mark.parametrize("capability", HERE)
def test_each_kernel_may_run(capability: str) -> None:
    """One variant of each; what an architecture's GPU would refuse, the compiler refuses or shows here."""
    assert len(compiled("--quick", "--capabilities", capability)) == QUICK + OTHERWISE.get(capability, (0, 0))[0]


@pytest.mark.skipif(torch.version.hip is not None, reason="compiles for NVIDIA GPUs")
@pytest.mark.slow
@pytest.mark.tables
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_of_the_tables_may_run(capability: str) -> None:
    """Minutes of compiling each: nox -s tests_tables."""
    assert len(compiled("--capabilities", capability)) == ALL + OTHERWISE.get(capability, (0, 0))[1]


RESIDENT = """
import json
from bench.ops.kernel_variants import norm_variants
from bench.ops.registers import inspect_variants
from dig.ops.tiles import architectures

(hopper,) = (each for each in architectures() if each.capability == (9, 0))
chosen = [each for each in norm_variants(hopper) if each.function.__name__ == "norm_modulate_backward_kernel"]
print(json.dumps([[each.sizes, each.dtype, each.registers, each.warps] for each in inspect_variants(chosen, hopper)]))
"""


@pytest.mark.slow
def test_programs_of_the_backward_norm_are_there_at_once() -> None:
    """Were a few more than the SMs hold, all would wait for those few, which begin when the others are done."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT], check=True, env=environment, capture_output=True, text=True, timeout=600
    )
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    for sizes, dtype, registers, warps in json.loads(done.stdout):
        tiles = sm90.ADALN[int(sizes.removeprefix("D ")), dtypes[dtype]]
        # An SM gives a warp's registers in units of 256.
        resident = 65536 // (warps * -(-32 * registers // 256) * 256)
        assert tiles.branch_programs <= 132 * resident, (sizes, dtype, registers)
