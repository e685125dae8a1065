"""What the compiler makes of the kernels with matrix products: registers, spills, products. Needs no GPU.

    python -m bench ops registers

compiles every such kernel of `dig.ops` at every entry of its table of tiles, for compute capability 9.0, and reads the
machine code with cuobjdump, both of which come with Triton. Exit status 1 if a kernel keeps registers in memory
(spills) while it uses asynchronous matrix products, or if the code shows the following fault.

**The fault.** Hopper's asynchronous products (HGMMA) find their operands by 64-bit descriptors, which are computed in
the 63 registers that a warp's threads share: the low word as a base and an offset, the high word as the carry and a
constant. Where those registers are short, ptxas 12.8 has been seen to hand two products the same base, which it also
reads as the 0 of the high word::

    UIADD3   UR14, UP0, UR4, 0x40          low words of two descriptors, of different tensors
    UIADD3   UR18, UP1, UR4, 0x40
    UIADD3.X UR15, UR4, -0x7fffffe0, UP0   their high words

The products then read other memory than they should, with no error or with an illegal address. PTX is right, the
interpreter is right, and so is memcheck where the wrong address happens to exist. `wrong_descriptors` looks for a carry
added to the very register that the low word was computed from.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

CAPABILITY = 90
RANK = 16
FP32_POINTERS = frozenset({"sums", "own", "weight", "dweight", "decay_bias", "dbias"})
NUMBERS = {"scale": "fp32", "eps": "fp32", "inverse_normalizer": "fp32"}


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
        products: Asynchronous matrix products (HGMMA) in the code.
        wrong: Instructions that `wrong_descriptors` or `hasty_accesses` found.
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
        """Whether this must not run."""
        return bool(self.wrong) or (self.products > 0 and self.spills > 0)


def wrong_descriptors(sass: str) -> tuple[str, ...]:
    """Instructions of a listing that add a low word's carry to the register of that low word's base: see above."""
    carries: dict[str, tuple[str, int]] = {}
    written: dict[str, int] = {}
    wrong = []
    for number, line in enumerate(sass.splitlines()):
        match = re.search(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", line)
        if match is None:
            continue
        instruction = match.group(2).strip()
        high = re.match(r"UIADD3\.X UR\d+, (UR\d+), \S+, URZ, (UP\d),", instruction)
        if high and high.group(2) in carries:
            base, at = carries[high.group(2)]
            if high.group(1) == base and written.get(base, -1) < at:
                wrong.append(f"{match.group(1)}: {instruction}")
        target = re.match(r"(?:@!?U?P\d )?(?:U|R2UR)\S* (UR\d+)", instruction)
        if target:
            written[target.group(1)] = number
        low = re.match(r"UIADD3 UR\d+, (UP\d), (UR\d+), 0x[0-9a-f]+, URZ", instruction)
        if low:
            carries[low.group(1)] = (low.group(2), number)
    return tuple(wrong)


def hasty_accesses(sass: str) -> tuple[str, ...]:
    """Instructions of a kernel that may be launched early (`dig.ops.chain`) and touch memory before it has waited."""
    hasty: list[str] = []
    for match in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass):
        if "ACQBULK" in match.group(2):
            return tuple(hasty)
        if re.search(r"\b(LDG|STG|LD\.E|ST\.E|ATOM|RED|UTMA|UBLKCP)", match.group(2)):
            hasty.append(f"{match.group(1)}: {match.group(2).strip()}")
    return ("it never waits",)


def _compile(
    function: Any,
    *,
    sizes: str,
    dtype: str,
    constants: dict[str, Any],
    options: dict[str, Any],
    blocks: Any = None,
    lists: Any = None,
) -> Compiled:
    """The kernel as Triton compiles it for aligned arguments, which is how the models call it.

    Args:
        function: The kernel.
        sizes: Goes into the result.
        dtype: Of its tensors.
        constants: Its compile-time arguments.
        options: Triton's; those that are None are left to it.
        blocks: Of each argument that is a tensor descriptor, the shape of a tile.
        lists: Of each argument that is a tuple of tensors, their dtype and number.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = constants | ({"CHAINED": True} if "CHAINED" in function.arg_names else {})
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], constexprs[(i,)] = "constexpr", constants[name]
            continue
        if blocks and name in blocks:
            signature[name] = f"tensordesc<{dtype}{list(blocks[name])}>"
            continue
        if lists and name in lists:
            of, number_of = lists[name]
            signature[name] = (f"*{of}",) * number_of
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(number_of)}
            continue
        is_stride = re.fullmatch(r"\w+_[bt]", name) is not None
        number = NUMBERS.get(name, "i32" if is_stride or function.params[i].do_not_specialize else None)
        signature[name] = number or ("*fp32" if name in FP32_POINTERS else f"*{dtype}")
        if number is None or is_stride:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    given = {name: value for name, value in options.items() if value is not None}
    compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=given)
    cubin = compiled.asm["cubin"]
    usage = re.search(r"REG:(\d+)", _listing(cubin, "-res-usage"))
    sass = _listing(cubin, "-sass")
    return Compiled(
        kernel=function.__name__,
        sizes=sizes,
        dtype=dtype,
        warps=given["num_warps"],
        registers=int(usage.group(1)) if usage else 0,
        spills=sass.count("STL"),
        shared=compiled.metadata.shared,
        products=sass.count("HGMMA"),
        wrong=wrong_descriptors(sass) + (hasty_accesses(sass) if "CHAINED" in constants else ()),
    )


def _listing(cubin: bytes, option: str) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_products() -> Iterator[Compiled]:
    """Compile the kernels of SwiGLU's products, for DiG-S and DiG-XL; the latter also with weights that ride along."""
    from dig.ops.swiglu import product_kernels, products

    masters = [(3 * 1152 + RANK, 1152), (576, RANK), (2 * 3072, 1152), (1152, 1152), (1152, 3072)]
    riding = {"masters": ("fp32", 5), "gates": ("fp32", 2), "copies": ("bf16", 5)}
    alone = dict.fromkeys(riding, ("bf16", 1))
    for D, F, table, lists, shares in (
        (384, 1024, products.NARROW, alone, products.NO_SHARES),
        (1152, 3072, products.WIDE, alone, products.NO_SHARES),
        (1152, 3072, products.WIDE, riding, products.shares_of(masters, 2, programs=768, steps=18)),
    ):
        for which, tiles in table.items():
            up = which != "down"
            function = product_kernels.up_swiglu_kernel if up else product_kernels.down_swiglu_backward_kernel
            tile, tokens = (tiles.rows, tiles.columns), (tiles.rows, tiles.depth)
            weight = (tiles.columns, tiles.depth) if up else (tiles.depth, tiles.columns)
            blocks = dict.fromkeys(("gate_up", "dgate_up", "hidden"), tile)
            blocks |= {"x": tokens, "dout": tokens, "weight": weight}
            shape = {"D": D, "F": F, "BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth, "GROUP": tiles.group}
            yield _compile(
                function,
                sizes=f"D {D} F {F}" + (" riding" if lists is riding else ""),
                dtype="bf16",
                constants=shape | (shares or {}) | {"KEEP": which == "up"} if up else shape,
                options=tiles.options,
                blocks=blocks,
                lists=lists,
            )


def compile_recurrence() -> Iterator[Compiled]:
    """Compile every kernel that works on chunks, at every entry of the table, forward and backward."""
    from dig.ops.gla import kernels, kernels_backward
    from dig.ops.gla.tiles import TILES

    for (K, V, of), tiles in TILES[CAPABILITY // 10].items():
        dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[of]
        padded = {"KP": 1 << (K - 1).bit_length(), "VP": 1 << (V - 1).bit_length()}
        shape = {"K": K, "V": V, **padded, "C": tiles.chunk, "PRECISION": "tf32x3" if dtype == "fp32" else "tf32"}
        levels = {"LEVELS": tiles.chunk.bit_length() - 4}
        low_rank = {"R": RANK, "RP": RANK, "LOGITS": True}
        plain = {"R": 0, "RP": 16, "LOGITS": False}
        gradient = (kernels_backward.gradient_kernel, tiles.gradient_warps, tiles.gradient_registers)
        output_backward = (
            kernels_backward.output_backward_kernel, tiles.output_backward_warps, tiles.output_backward_registers
        )  # fmt: skip
        for (function, warps, registers), constants in (
            ((kernels.local_state_kernel, tiles.local_warps, None), low_rank | {"STATES": True, "GRADIENT": False}),
            ((kernels.local_state_kernel, tiles.local_warps, None), low_rank | {"STATES": False, "GRADIENT": False}),
            ((kernels.local_state_kernel, tiles.local_warps, None), plain | {"STATES": True, "GRADIENT": True}),
            ((kernels.output_kernel, tiles.output_warps, tiles.output_registers), levels | {"NORM_GATE": True}),
            ((kernels.output_kernel, tiles.output_warps, None), levels | {"NORM_GATE": False}),
            (output_backward, levels | {"REBUILD": True}),
            (gradient, levels | low_rank),
            (gradient, levels | plain),
        ):
            heads = {
                name: 0 if name == "d_h" and constants.get("R") else K if name[0] in "qkd" else V
                for name in function.arg_names
                if name.endswith("_h")
            }
            yield _compile(
                function,
                sizes=f"K {K} V {V}",
                dtype=dtype,
                constants=shape | constants | heads,
                options={"num_warps": warps, "maxnreg": registers},
            )


def report() -> bool:
    """Compile everything and print a line for each kernel; whether all of them may run."""
    faulty = False
    for found in chain(compile_recurrence(), compile_products()):
        faulty = faulty or found.faulty
        verdict = "; ".join(found.wrong) or ("spills beside asynchronous products" if found.faulty else "ok")
        print(
            f"{found.kernel:27} {found.sizes:18} {found.dtype} warps {found.warps} "
            f"registers {found.registers:3} spills {found.spills:3} shared {found.shared / 1024:5.1f} KiB "
            f"HGMMA {found.products:3} {verdict}",
            flush=True,
        )
    return not faulty
