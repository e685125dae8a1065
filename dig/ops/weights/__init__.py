"""What a product needs of a layer's fp32 weights: copies in its dtype, rows gated, and the gradients of that.

Autocast casts every weight by a launch of its own. Here a block's weights take one launch together. A gate that acts
on a layer's output, ``y = gate ⊙ (W x)``, can act on the rows of W instead when one condition serves all tokens; then
neither ``W x`` nor its gradient is a tensor of T rows that anything has to read or write.

**Beside GEMMs.** A program of cuBLAS takes a whole SM, and starts on none that another kernel's programs still come to.
So a cast by many small programs takes turns with the GEMMs instead of running beside them. Limited to few programs,
both kernels here keep to as many SMs and leave the others alone. Each program then walks over its share, with enough
loads in flight to be worth its SM.

Shapes: N rows and M columns of a weight.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from dig.ops.launch import Launch, empty, launch_context
from dig.ops.library import operation
from dig.ops.tiles import for_device
from dig.ops.tiles.choices import CopyTiles, WeightTiles
from dig.ops.weights.kernels import gated_weight_gradient_kernel, matrix_vector_kernel, prepare_kernel
from dig.ops.whole import ceil_div, power_of_two


@functools.lru_cache(maxsize=1024)
def prepare_launch(tiles: CopyTiles, shapes: tuple[torch.Size, ...], ungated: int, programs: int | None) -> Launch:
    """`prepare_kernel`'s: on the weights, their gates or what stands for these, and the copies."""
    sizes = tuple(shape.numel() for shape in shapes)
    # Elements of each weight that one of its gate serves.
    columns = tuple(1 if i < ungated else shape[-1] for i, shape in enumerate(shapes))
    blocks = sum(ceil_div(size, tiles.elements) for size in sizes)
    return Launch(
        prepare_kernel, (blocks if programs is None else min(programs, blocks),), (), tuples=(len(shapes),) * 3,
        SIZES=sizes, COLUMNS=columns, UNGATED=ungated, BLOCK=tiles.elements, num_warps=tiles.warps,
    )  # fmt: skip


@operation("dig::prepare_weights")
def prepare_weights(
    weights: Sequence[Tensor], gates: Sequence[Tensor], dtype: torch.dtype, programs: int | None = None
) -> list[Tensor]:
    """Copies of the weights (N, M) in ``dtype``, the rows of the last ones multiplied by gates of N elements, one each.

    Everything is contiguous. The products with the gates are rounded once, from fp32. With ``programs`` the kernel has
    at most so many, and leaves the card's other SMs alone.
    """
    weights, gates = [weight.contiguous() for weight in weights], [gate.contiguous() for gate in gates]
    copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    ungated = len(weights) - len(gates)
    device = weights[0].device
    tiles = for_device(device).weights.copy_for(programs)
    kernel = prepare_launch(tiles, tuple([weight.shape for weight in weights]), ungated, programs)
    # A pointer that a kernel does not touch can be anything.
    factors = (*weights[:ungated], *gates)
    launch_context(device).start(kernel, *weights, *factors, *copies)
    return copies


@prepare_weights.register_fake
def _(
    weights: Sequence[Tensor], gates: Sequence[Tensor], dtype: torch.dtype, programs: int | None = None
) -> list[Tensor]:
    return [empty(weight, dtype) for weight in weights]


@operation("dig::matrix_vectors")
def matrix_vectors(
    weights: Sequence[Tensor], vector: Tensor, biases: Sequence[Tensor], programs: int | None = None
) -> Tensor:
    """``weight vector + bias`` of L layers, (L, N) in the weights' dtype, summed in fp32.

    Weights are (N, M), all of one shape and dtype, vector (M,), biases (N,).
    Reading the matrices is all the work, which cuBLAS' kernel for fp32 does at little more than half of a copy's rate.
    ``programs``: for each layer, as of `prepare_weights`.
    """
    shape, dtype = weights[0].shape, weights[0].dtype
    if any(weight.shape != shape or weight.dtype != dtype for weight in weights):
        raise ValueError(f"all weights must be of one shape and dtype; the first is {tuple(shape)}, {dtype}")
    weights, biases = [weight.contiguous() for weight in weights], [bias.contiguous() for bias in biases]
    N, M = shape
    out = torch.empty(len(weights), N, dtype=dtype, device=vector.device)
    tiles = for_device(vector.device).weights.vector_for(programs)
    blocks = ceil_div(N, tiles.rows)
    with launch_context(vector.device) as launch:
        launch(
            matrix_vector_kernel, (blocks if programs is None else min(programs, blocks), len(weights)),
            (tuple(weights), vector.contiguous(), tuple(biases), out), (N,),
            M=M, ROWS=tiles.rows, BLOCK=min(tiles.columns, power_of_two(M)), num_warps=tiles.warps,
        )  # fmt: skip
    return out


@matrix_vectors.register_fake
def _(weights: Sequence[Tensor], vector: Tensor, biases: Sequence[Tensor], programs: int | None = None) -> Tensor:
    return torch.empty(len(weights), len(weights[0]), dtype=weights[0].dtype, device=vector.device)


def matrix_vector(weight: Tensor, vector: Tensor, bias: Tensor, programs: int | None = None) -> Tensor:
    """`matrix_vectors` of one layer: (N,)."""
    product: Tensor = matrix_vectors([weight], vector, [bias], programs)
    return product[0]


def gated_gradients(
    product: Tensor, weight: Tensor, gate: Tensor, dgate: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`gated_weight_gradient`, whose second is written into dgate, if given."""
    product, weight, gate = product.contiguous(), weight.contiguous(), gate.contiguous()
    dweight, dgate = empty(weight), empty(gate) if dgate is None else dgate
    kernel = gradient_launch(for_device(weight.device).weights, weight.shape)
    launch_context(weight.device).start(kernel, product, weight, gate, dweight, dgate)
    return dweight, dgate


@operation("dig::gated_weight_gradient")
def gated_weight_gradient(product: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight (N, M) and gate (N elements) from ``product = d^T x``, d that of ``gate ⊙ (W x)``.

    ``dW = gate ⊙ product`` by rows and ``dgate_i = sum_j W_ij product_ij``; product (N, M) in fp32.
    """
    return gated_gradients(product, weight, gate)


@functools.lru_cache(maxsize=1024)
def gradient_launch(tiles: WeightTiles, shape: torch.Size) -> Launch:
    """`gated_weight_gradient_kernel`'s: on product, weight (N, M), gate, and the gradients of the last two."""
    N, M = shape
    return Launch(
        gated_weight_gradient_kernel, (N,), (),
        M=M, BLOCK=min(tiles.gradient_columns, power_of_two(M)), num_warps=tiles.gradient_warps,
    )  # fmt: skip


@gated_weight_gradient.register_fake
def _(product: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return empty(weight), empty(gate)
