"""What the compiler makes of every kernel: registers, spills, shared memory, products. Needs no GPU.

    python -m bench ops registers                           # for every architecture that has tile choices
    python -m bench ops registers --capabilities 9.0 --kernels gradient_kernel
    python -m bench ops registers --quick                   # one variant of each kernel

compiles the kernels of `dig.ops` at the tile choices of an architecture (`dig.ops.tiles`), and reads the machine code
(`bench.ops.listings`) with tools that come with Triton. Exit status 1 if a kernel keeps registers in memory (spills)
while it uses asynchronous matrix products, takes more shared memory than its tiles count with or the GPU has, touches
memory before it has waited for the kernel before it, or if the code shows the following fault.

**Spills alone are no fault.** They count beside asynchronous products only: Hopper's (HGMMA) and those of Blackwell for
data centres (tcgen05: UTCHMMA and others). Ampere, Ada and Blackwell for desktops have none: their products (HMMA) take
operands from a thread's registers, so that a spill costs time and nothing else. A line says ``spills without
asynchronous products: ok``.

**The fault.** ptxas 12.8 has been seen to give Hopper's asynchronous products (HGMMA) wrong places of their operands,
in two ways; `bench.ops.descriptors` follows them through the code. Blackwell's asynchronous products find operands by
descriptors too, hence the rule about spills.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bench.ops.descriptors import wrong_descriptors
from bench.ops.kernel_variants import Variant, kernel_variants
from bench.ops.listings import listings
from dig.ops.tiles import KIB, Architecture, architectures

AT_ONCE = 12
"""Kernels that are disassembled together, and so printed together."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One kernel at one table entry.

    Attributes:
        kernel: Its name.
        sizes: What it is compiled for.
        dtype: ``bf16`` or ``fp32``.
        warps: Of a program.
        registers: Of a thread.
        spills: Instructions that store a register to memory.
        shared: Bytes of shared memory of a program.
        products: Asynchronous matrix products in the code.
        wrong: What `wrong_descriptors`, `hasty_accesses` and `too_much_shared` found.
    """

    kernel: str
    sizes: str
    dtype: str
    warps: int
    registers: int
    spills: int
    shared: int
    products: int
    wrong: tuple[str, ...]

    @property
    def faulty(self) -> bool:
        """Whether this must not run. Spills count beside asynchronous products only."""
        return bool(self.wrong) or (self.products > 0 and self.spills > 0)

    @property
    def verdict(self) -> str:
        """What is wrong, or that it may run."""
        if self.faulty:
            return "; ".join(self.wrong) or "spills beside asynchronous products"
        return "spills without asynchronous products: ok" if self.spills else "ok"


def asynchronous_products(sass: str) -> int:
    """Matrix products of a listing that find their operands by descriptors: Hopper's, and Blackwell's tcgen05."""
    return len(re.findall(r"\b(?:HGMMA|UTC[A-Z]*MMA)\b", sass))


def hasty_accesses(sass: str) -> tuple[str, ...]:
    """Instructions of a kernel that may be launched early and touch memory before it has waited.

    Shared memory is its own: Blackwell's kernels begin by asking for tensor memory, with an atomic operation there.
    """
    hasty: list[str] = []
    for match in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass):
        if "ACQBULK" in match.group(2):
            return tuple(hasty)
        if re.search(r"\b(LDG|STG|LD\.E|ST\.E|ATOM(?!S)|RED|UTMA|UBLKCP)", match.group(2)):
            hasty.append(f"{match.group(1)}: {match.group(2).strip()}")
    return ("it never waits",)


def compile_variant(variant: Variant, architecture: Architecture) -> Any:
    """The kernel as Triton compiles it for aligned arguments, which is how the models call it: Triton's own object."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, capability = variant.function, architecture.capability
    if capability is None:
        raise ValueError(f"there is no compiler for {architecture}")
    constants = {**variant.constants, **_early(variant, architecture)}
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], constexprs[(i,)] = "constexpr", constants[name]
            continue
        if name in variant.blocks:
            signature[name] = f"tensordesc<{variant.dtype}{list(variant.blocks[name])}>"
            continue
        if name in variant.lists:
            of, number_of = variant.lists[name]
            signature[name] = (f"*{of}",) * number_of
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(number_of)}
            continue
        is_stride = re.fullmatch(r"\w+_[bt]", name) is not None
        number = variant.numbers.get(name, "i32" if is_stride or function.params[i].do_not_specialize else None)
        signature[name] = number or ("*fp32" if name in variant.fp32 else f"*{variant.dtype}")
        if number is None or is_stride:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton.compile(source, target=target, options=_options(variant))


def inspect_variants(variants: Sequence[Variant], architecture: Architecture) -> list[Compiled]:
    """What the compiler makes of each; all are compiled before their machine code is read."""
    compiled = [compile_variant(variant, architecture) for variant in variants]
    found = []
    codes = listings([each.asm["cubin"] for each in compiled], _target(compiled[0].asm["ptx"]))
    for variant, each, sass in zip(variants, compiled, codes, strict=True):
        shared = each.metadata.shared
        wrong = wrong_descriptors(sass) + (hasty_accesses(sass) if _early(variant, architecture).get("EARLY") else ())
        found.append(
            Compiled(
                kernel=variant.function.__name__,
                sizes=variant.sizes,
                dtype=variant.dtype,
                warps=_options(variant)["num_warps"],
                registers=_registers(each.asm["cubin"]),
                spills=sass.count("STL"),
                shared=shared,
                products=asynchronous_products(sass),
                wrong=wrong + too_much_shared(shared, variant, architecture),
            )
        )
    return found


def _early(variant: Variant, architecture: Architecture) -> dict[str, bool]:
    return {"EARLY": architecture.early_launch} if "EARLY" in variant.function.arg_names else {}


def _options(variant: Variant) -> dict[str, int]:
    return {name: value for name, value in variant.options.items() if value is not None}


def _target(ptx: str) -> str:
    """``sm_90a``, as PTX names what it is for."""
    match = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    if match is None:
        raise ValueError("this PTX names no target")
    return match.group(1)


def too_much_shared(taken: int, variant: Variant, architecture: Architecture) -> tuple[str, ...]:
    """What is wrong with the bytes of shared memory that a program takes: see `Variant` and `Architecture`."""
    limits = {"its tiles count with": variant.shared, f"{architecture} has": architecture.shared_memory}
    return tuple(
        f"{taken / KIB:.1f} KiB of shared memory where {whose} {limit / KIB:g}"
        for whose, limit in limits.items()
        if limit is not None and taken > limit
    )


def _registers(cubin: bytes) -> int:
    """Of a thread, as the cubin's own table says."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+)", usage)
    return int(found.group(1)) if found else 0


def by_capability() -> dict[str, Architecture]:
    """Every architecture that has tile choices, by its compute capability: ``9.0``."""
    return {".".join(map(str, each.capability or ())): each for each in architectures()}


def kernel_names(capabilities: Iterable[str]) -> list[str]:
    """The kernels that these architectures (`by_capability`) have compiled, each once."""
    known = by_capability()
    variants = (variant for capability in capabilities for variant in kernel_variants(known[capability]))
    return list(dict.fromkeys(variant.function.__name__ for variant in variants))


def _chosen(variants: Iterable[Variant], kernels: Collection[str], quick: bool) -> Iterator[Variant]:
    seen: set[str] = set()
    for variant in variants:
        name = variant.function.__name__
        if name in kernels and not (quick and name in seen):
            seen.add(name)
            yield variant


def report(capabilities: Iterable[str], kernels: Collection[str], *, quick: bool) -> bool:
    """Compile kernels and print a line for each variant.

    Args:
        capabilities: Architectures, as `by_capability` names them.
        kernels: Of `kernel_names`.
        quick: Only the first variant of each kernel.

    Returns:
        Whether all of them may run.
    """
    faulty = False
    for capability in capabilities:
        architecture = by_capability()[capability]
        variants = _chosen(kernel_variants(architecture), kernels, quick)
        while group := list(islice(variants, AT_ONCE)):
            for found in inspect_variants(group, architecture):
                faulty = faulty or found.faulty
                print(
                    f"{capability:>4} {found.kernel:29} {found.sizes:18} {found.dtype} warps {found.warps:2} "
                    f"registers {found.registers:3} spills {found.spills:3} shared {found.shared / KIB:5.1f} KiB "
                    f"asynchronous products {found.products:3} {found.verdict}",
                    flush=True,
                )
    return not faulty
