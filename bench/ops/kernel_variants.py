"""Every kernel of `dig.ops` as an architecture's tile choices have it compiled: what `bench.ops.registers` compiles.

Sizes are those of DiG-S and DiG-XL, and for the recurrence heads of 36, which its kernels pad.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dig.ops.tiles import KIB, Architecture
from dig.ops.tiles.choices import GlaTiles

RANK = 16
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
WIDTHS = (384, 1152)
UNASKED = 48 * KIB
"""Shared memory that every GPU gives a program: the bound of kernels that only exchange sums between warps."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kernel and what it is compiled for.

    Attributes:
        function: The kernel.
        sizes: What says which variant this is.
        dtype: ``bf16`` or ``fp32``, of its tensors.
        shared: Bytes of shared memory that a program may take: what the tile choices count with.
        constants: Its compile-time arguments.
        options: Triton's; those that are None are left to it.
        fp32: Tensors that are in fp32 whatever the dtype.
        numbers: Arguments that are numbers, beside strides and those that Triton is told not to specialize.
        blocks: Of each argument that is a tensor descriptor, the shape of a tile.
        lists: Of each argument that is a tuple of tensors, their dtype and number.
    """

    function: Any
    sizes: str
    dtype: str
    shared: int
    constants: Mapping[str, Any]
    options: Mapping[str, int | None]
    fp32: frozenset[str] = frozenset()
    numbers: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    lists: Mapping[str, tuple[str, int]] = field(default_factory=dict)


def kernel_variants(architecture: Architecture) -> Iterator[Variant]:
    """Those of every operation."""
    yield from recurrence_variants(architecture)
    yield from scan_variants(architecture)
    yield from product_variants(architecture)
    yield from gradient_variants(architecture)
    yield from norm_variants(architecture)
    yield from srem_variants(architecture)
    yield from swiglu_variants(architecture)
    yield from weight_variants(architecture)
    yield from modulation_variants(architecture)


def _recurrences(architecture: Architecture) -> Iterator[tuple[int, int, torch.dtype, GlaTiles]]:
    """What is chosen for the heads of every entry of the table, and the choices for few programs that it has."""
    for K, V, of in architecture.gla:
        tiles = architecture.gla_tiles(K, V, of)
        for each in (tiles, tiles.few):
            if each is not None:
                yield K, V, of, each


def recurrence_variants(architecture: Architecture) -> Iterator[Variant]:
    """Every kernel that works on chunks, at every entry of the table, forward and backward."""
    from dig.ops.gla import kernels, kernels_backward, kernels_rounds, kernels_walk, launches

    for K, V, of, tiles in _recurrences(architecture):
        dtype = DTYPES[of]
        padded = {"KP": 1 << (K - 1).bit_length(), "VP": 1 << (V - 1).bit_length()}
        shape = {"K": K, "V": V, **padded, "C": tiles.chunk, "PRECISION": "tf32x3" if dtype == "fp32" else "tf32"}
        levels = {"LEVELS": tiles.chunk.bit_length() - 4}
        low_rank = {"R": RANK, "RP": RANK, "LOGITS": True}
        plain = {"R": 0, "RP": 16, "LOGITS": False}
        walk = (kernels_walk.walk_kernel, tiles.walk_warps, tiles.walk_registers)
        walks: list[Any] = []
        # A whole head, and a segment of one.
        for chunks, segment in ((tiles.walk_chunks, 0), (tiles.segment_chunks, tiles.segment_chunks)):
            rounds = {"ROUNDS": launches.walk_rounds(tiles, chunks), "SEGMENT": segment}
            walks += [(walk, rounds | low_rank | {"KEEP": keep}) for keep in (False, True) if chunks]
            walks += [((*walk[:2], None), rounds | plain | {"LOGITS": True, "KEEP": True})] if chunks else []
        if tiles.segment_chunks:
            states = (kernels_walk.segment_state_kernel, tiles.segment_warps, None)
            walks += [
                (states, {"SEGMENT": tiles.segment_chunks} | form) for form in (low_rank, plain | {"LOGITS": True})
            ]
        in_rounds, in_parts = kernels_rounds.gradient_rounds_kernel, kernels_rounds.output_backward_parts_kernel
        gradient_kernel = in_rounds if tiles.gradient_rounds else kernels_backward.gradient_kernel
        gradient = (gradient_kernel, tiles.gradient_warps, tiles.gradient_registers)
        in_rounds_scans = ({"SCAN": False}, {"SCAN": True}) if tiles.gradient_scan_chunks else ({"SCAN": False},)
        forms = in_rounds_scans if tiles.gradient_rounds else (levels,)
        output_backward = (
            in_parts if tiles.output_backward_parts else kernels_backward.output_backward_kernel,
            tiles.output_backward_warps, tiles.output_backward_registers,
        )  # fmt: skip
        for (function, warps, registers), constants in (
            ((kernels.local_state_kernel, tiles.local_warps, None), low_rank | {"STATES": True, "GRADIENT": False}),
            ((kernels.local_state_kernel, tiles.local_warps, None), low_rank | {"STATES": False, "GRADIENT": False}),
            ((kernels.local_state_kernel, tiles.local_warps, None), plain | {"STATES": True, "GRADIENT": True}),
            ((kernels.output_kernel, tiles.output_warps, tiles.output_registers), levels | {"NORM_GATE": True}),
            ((kernels.output_kernel, tiles.output_warps, None), levels | {"NORM_GATE": False}),
            *walks,
            (output_backward, levels | {"REBUILD": True}),
            *((gradient, form | low_rank) for form in forms),
            (gradient, forms[0] | plain),
            *(((*gradient[:2], None), form | plain) for form in forms[1:]),
        ):
            heads = {
                name: 0 if name == "d_h" and constants.get("R") else K if name[0] in "qkd" else V
                for name in function.arg_names
                if name.endswith("_h")
            }
            yield Variant(
                function=function,
                sizes=f"K {K} V {V} C {tiles.chunk}",
                dtype=dtype,
                shared=(tiles.walk_shared_memory if function is walk[0] else tiles.shared_memory)(K, V, of),
                constants=shape | constants | heads,
                options={"num_warps": warps, "maxnreg": registers},
                fp32=frozenset({"sums", "decays", "own", "weight", "dweight", "decay_bias", "dbias"}),
                numbers={"scale": "fp32", "eps": "fp32", "inverse_normalizer": "fp32"},
            )


def scan_variants(architecture: Architecture) -> Iterator[Variant]:
    """The scan over chunks, for as many as each of its forms takes in a round."""
    from dig.ops.gla import kernels, launches

    for K, V, of, tiles in _recurrences(architecture):
        shape = {"K": K, "V": V, "KP": 1 << (K - 1).bit_length(), "C": tiles.chunk}
        for function, N in (
            (kernels.short_scan_kernel, min(tiles.short_chunks, tiles.short_steps)),
            (kernels.scan_kernel, tiles.scan_groups * tiles.scan_steps),
        ):
            short = function is kernels.short_scan_kernel
            yield Variant(
                function=function,
                sizes=f"K {K} V {V} C {tiles.chunk}",
                dtype=DTYPES[of],
                shared=UNASKED,
                constants=shape | (launches.short_scan_sizes if short else launches.scan_sizes)(tiles, N, V, of),
                options={"num_warps": tiles.short_warps if short else tiles.scan_warps},
                fp32=frozenset({"sums"}),
            )


def product_variants(architecture: Architecture) -> Iterator[Variant]:
    """SwiGLU's GEMMs, for DiG-S and DiG-XL; the latter also with the next block's weights cast in it."""
    from dig.ops.swiglu import product_kernels, products

    choices = architecture.products
    masters = [(3 * 1152 + RANK, 1152), (576, RANK), (2 * 3072, 1152), (1152, 1152), (1152, 3072)]
    casts = {"masters": ("fp32", 5), "gates": ("fp32", 2), "copies": ("bf16", 5)}
    alone = dict.fromkeys(casts, ("bf16", 1))
    shares = products.shares_of(masters, 2, share=choices.share, programs=768, steps=18) or {}
    for D, F, table, lists, constants in (
        (384, 1024, choices.narrow, alone, products.NO_SHARES),
        (1152, 3072, choices.wide, alone, products.NO_SHARES),
        (1152, 3072, choices.wide, casts, shares),
        (384, 1024, choices.few, alone, products.NO_SHARES),
        (1152, 3072, choices.few, alone, products.NO_SHARES),
    ):
        for which, tiles in table.items():
            up = which != "down"
            tile, tokens = (tiles.rows, tiles.columns), (tiles.rows, tiles.depth)
            weight = (tiles.columns, tiles.depth) if up else (tiles.depth, tiles.columns)
            sizes = {"D": D, "F": F, "BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth, "GROUP": tiles.group}
            shape: dict[str, Any] = {**sizes, "PRECISION": "tf32"}
            yield Variant(
                function=product_kernels.up_swiglu_kernel if up else product_kernels.down_swiglu_backward_kernel,
                sizes=f"D {D} F {F}" + (" casts" if lists is casts else ""),
                dtype="bf16",
                shared=tiles.shared_memory(which),
                constants=shape | constants | {"KEEP": which == "up"} if up else shape,
                options=tiles.options,
                blocks=dict.fromkeys(("gate_up", "dgate_up", "hidden"), tile)
                | {"x": tokens, "dout": tokens, "weight": weight},
                lists=lists,
            )


def gradient_variants(architecture: Architecture) -> Iterator[Variant]:
    """Weights' gradients in one launch, of DiG-S."""
    from dig.ops.weight_gradients.kernels import grouped_product_kernel

    tiles, D, F = architecture.gradients, 384, 1024
    if tiles is None:
        return
    sizes = ((D, F), (2 * F, D), (D, D), (3 * D + RANK, D))
    shape = {f"{name}{i}": size for i, pair in enumerate(sizes) for name, size in zip("NK", pair, strict=True)}
    yield Variant(
        function=grouped_product_kernel,
        sizes=f"D {D} F {F}",
        dtype="bf16",
        shared=tiles.shared_memory(),
        constants=shape | {"BN": tiles.rows, "BK": tiles.columns, "BM": tiles.depth},
        options=tiles.options,
        fp32=frozenset(f"gradient{i}" for i in range(4)),
        blocks={f"dy{i}": (tiles.depth, tiles.rows) for i in range(4)}
        | {f"x{i}": (tiles.depth, tiles.columns) for i in range(4)},
    )


def norm_variants(architecture: Architecture) -> Iterator[Variant]:
    """Adaptive norm forward and backward, with all that a block asks of it."""
    from dig.ops.adaln import kernels
    from dig.ops.adaln.fused import parts_of

    for D in WIDTHS:
        for of, dtype in DTYPES.items():
            tiles = architecture.adaln_tiles(D, of)
            shape: dict[str, Any] = {"D": D, "NORM": "rms"}
            for function, constants, warps in (
                (
                    kernels.norm_modulate_kernel,
                    {"PARTS": parts_of(D, tiles.part), "R": tiles.rows, "RESIDUAL": True},
                    tiles.warps,
                ),
                (
                    kernels.norm_modulate_backward_kernel,
                    {"PARTS": parts_of(D, tiles.backward_part), "R": tiles.backward_rows}
                    | {"ADD": True, "BRANCH": True, "REBUILD": True},
                    tiles.backward_warps,
                ),
                *(
                    (kernels.norm_modulate_finish_kernel, {**tiles.sums(partials), "BRANCH": True}, tiles.sum_warps)
                    for partials in (tiles.sum_least_rows, tiles.sum_rows)
                ),
            ):
                yield Variant(
                    function=function,
                    sizes=f"D {D}",
                    dtype=dtype,
                    shared=UNASKED,
                    constants=shape | constants,
                    options={"num_warps": warps},
                    fp32=frozenset({"stats", "partials", "weight", "dweight"}),
                    numbers={"eps": "fp32", "B": "i32"},
                )


def srem_variants(architecture: Architecture) -> Iterator[Variant]:
    """SREM's convolution forward and backward, gated."""
    from dig.ops.srem import kernels

    D = WIDTHS[0]
    for (which, of), tiles in architecture.srem.items():
        shape = {"D": D, "X_T": D, "BRANCH_T": D, "GATED": True, "PACKED": of == torch.bfloat16}
        shape |= {"W": tiles.width, "G": tiles.groups, "BD": tiles.channels}
        forward = which == "forward"
        yield Variant(
            function=kernels.srem_forward_kernel if forward else kernels.srem_backward_kernel,
            sizes=f"D {D}",
            dtype=DTYPES[of],
            shared=UNASKED,
            constants=shape if forward else shape | {"SUM_ONLY": False},
            options={"num_warps": tiles.warps, "maxnreg": tiles.registers},
            fp32=frozenset({"weight", "bias", "sums"}),
        )


def swiglu_variants(architecture: Architecture) -> Iterator[Variant]:
    """SwiGLU by itself, forward and backward."""
    from dig.ops.swiglu import kernels

    F = 1024
    for of, tiles in architecture.swiglu.items():
        shape = {"F": F, "ROWS": tiles.elements // tiles.columns, "COLS": tiles.columns}
        for function, constants in ((kernels.swiglu_kernel, {}), (kernels.swiglu_backward_kernel, {"HIDDEN": True})):
            yield Variant(
                function=function,
                sizes=f"F {F}",
                dtype=DTYPES[of],
                shared=UNASKED,
                constants=shape | constants,
                options={"num_warps": tiles.warps},
                numbers={"stride": "i32", "dhidden_stride": "i32"},
            )


def weight_variants(architecture: Architecture) -> Iterator[Variant]:
    """Casts of a block's weights and the products that read each weight once, at once and by few programs."""
    from dig.ops.condition import kernels as condition
    from dig.ops.weights import kernels

    D, weights = WIDTHS[1], architecture.weights
    shape = {"SIZES": (D * D,) * 2, "COLUMNS": (1, D), "UNGATED": 1}
    casts = {"weights": ("fp32", 2), "gates": ("fp32", 2), "copies": ("bf16", 2)}
    vectors = {"weights": ("fp32", 2), "biases": ("fp32", 2)}
    embedding = {"D": D, "HALF": 128, "RATE": -0.07, "ROWS": architecture.condition.rows, "BLOCK": 128}
    finish = {"D": D, "ROWS": architecture.condition.rows, "BLOCK": architecture.condition.columns}
    found: list[tuple[Any, str, dict[str, Any], int, dict[str, tuple[str, int]]]] = [
        *(
            (kernels.prepare_kernel, name, shape | {"BLOCK": tiles.elements}, tiles.warps, casts)
            for name, tiles in (("at once", weights.copy), ("few", weights.copy_few))
        ),
        *(
            (
                kernels.matrix_vector_kernel,
                name,
                {"M": D, "ROWS": tiles.rows, "BLOCK": tiles.columns},
                tiles.warps,
                vectors,
            )
            for name, tiles in (("at once", weights.vector), ("few", weights.vector_few))
        ),
        (
            kernels.gated_weight_gradient_kernel,
            "",
            {"M": D, "BLOCK": weights.gradient_columns},
            weights.gradient_warps,
            {},
        ),
        (condition.embed_timestep_kernel, "", embedding, architecture.condition.warps, {}),
        (condition.finish_condition_kernel, "", finish, architecture.condition.warps, {}),
    ]
    for function, name, constants, warps, lists in found:
        yield Variant(
            function=function,
            sizes=f"D {D} {name}".rstrip(),
            dtype="fp32",
            shared=UNASKED,
            constants=constants,
            options={"num_warps": warps},
            numbers={"N": "i32"},
            lists=lists,
        )


def modulation_variants(architecture: Architecture) -> Iterator[Variant]:
    """adaLN's linear layer for a full tile of images."""
    from dig.ops.modulation import kernels

    D, tiles = WIDTHS[1], architecture.modulation_tiles()
    gradient = {"ROWS": tiles.gradient_rows, "COLS": tiles.gradient_columns}
    for function, constants in (
        (kernels.modulation_kernel, {"ROWS": tiles.rows, "COLS": tiles.columns, "IMAGES": tiles.images}),
        (kernels.weight_gradient_kernel, gradient | {"IMAGES": tiles.inner_images, "STEPS": 1}),
        (kernels.condition_gradient_kernel, gradient | {"ROWS": tiles.share_rows, "IMAGES": tiles.images, "STEPS": 14}),
    ):
        yield Variant(
            function=function,
            sizes=f"D {D}",
            dtype="fp32",
            shared=tiles.shared_memory(),
            constants={"M": D} | constants,
            options={"num_warps": tiles.warps, "num_stages": tiles.stages},
            numbers={"B": "i32", "N": "i32"},
        )
