"""What a product needs of a layer's fp32 weights: copies in its dtype, rows gated, and the gradients of that.

Autocast casts every weight by a launch of its own. Here a block's weights take one launch together. A gate that acts
on a layer's output, ``y = gate ⊙ (W x)``, can act on the rows of W instead when one condition serves all tokens; then
neither ``W x`` nor its gradient is a tensor of T rows that anything has to read or write.

**Beside matrix products.** A program of cuBLAS' takes a multiprocessor whole, and starts on none where another kernel's
programs still come and go. A copy of many small programs therefore takes turns with the products instead of running
beside them. Told to take few programs, both kernels here keep to as many multiprocessors and leave the others alone:
each program walks over its share, with enough loads in flight to be worth its multiprocessor.

Shapes: N rows and M columns of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from dig.ops.launch import empty, on_device
from dig.ops.weights.kernels import gated_weight_gradient_kernel, matrix_vector_kernel, prepare_kernel

WIDE = (4096, 8)
"""Elements that a program copies at a time, and its warps."""
FEW = (16384, 32)
"""The same for at most `FEW_PROGRAMS`, each with a multiprocessor to itself: 64 KiB in flight."""
FEW_PROGRAMS = 64
VECTOR_WIDE = (8, 512, 4)
"""Rows and columns that a program multiplies by a vector at a time, and its warps: 32 elements of each thread's are
read together.
"""
VECTOR_FEW = (32, 512, 16)
"""The same for at most `FEW_PROGRAMS`. A row is a warp's in both, so the sums are added in one order."""


def _few(programs: int | None) -> bool:
    return programs is not None and programs <= FEW_PROGRAMS


@torch.library.custom_op("dig::prepare_weights", mutates_args=())
def prepare_weights(
    weights: Sequence[Tensor], gates: Sequence[Tensor], dtype: torch.dtype, programs: int | None = None
) -> list[Tensor]:
    """Copies of the weights (N, M) in ``dtype``, the rows of the last ones multiplied by gates (N,), one each.

    Everything is contiguous. The products with the gates are rounded once, from fp32. With ``programs`` the kernel has
    at most so many, and leaves the card's other multiprocessors alone.
    """
    weights, gates = [weight.contiguous() for weight in weights], [gate.contiguous() for gate in gates]
    copies = [empty(weight, dtype) for weight in weights]
    sizes = tuple(weight.numel() for weight in weights)
    ungated = len(weights) - len(gates)
    columns = tuple(1 if i < ungated else weight.shape[-1] for i, weight in enumerate(weights))
    elements, warps = FEW if _few(programs) else WIDE
    blocks = sum(triton.cdiv(size, elements) for size in sizes)
    # A pointer that a kernel does not touch can be anything.
    factors = (*weights[:ungated], *gates)
    with on_device(weights[0].device):
        prepare_kernel[(blocks if programs is None else min(programs, blocks),)](
            tuple(weights), factors, tuple(copies), SIZES=sizes, COLUMNS=columns, UNGATED=ungated, BLOCK=elements,
            num_warps=warps,
        )  # fmt: skip
    return copies


@prepare_weights.register_fake
def _(
    weights: Sequence[Tensor], gates: Sequence[Tensor], dtype: torch.dtype, programs: int | None = None
) -> list[Tensor]:
    return [empty(weight, dtype) for weight in weights]


@torch.library.custom_op("dig::matrix_vectors", mutates_args=())
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
    rows, columns, warps = VECTOR_FEW if _few(programs) else VECTOR_WIDE
    blocks = triton.cdiv(N, rows)
    with on_device(vector.device):
        matrix_vector_kernel[(blocks if programs is None else min(programs, blocks), len(weights))](
            tuple(weights), vector.contiguous(), tuple(biases), out, N,
            M=M, ROWS=rows, BLOCK=min(columns, triton.next_power_of_2(M)), num_warps=warps,
        )  # fmt: skip
    return out


@matrix_vectors.register_fake
def _(weights: Sequence[Tensor], vector: Tensor, biases: Sequence[Tensor], programs: int | None = None) -> Tensor:
    return torch.empty(len(weights), len(weights[0]), dtype=weights[0].dtype, device=vector.device)


def matrix_vector(weight: Tensor, vector: Tensor, bias: Tensor, programs: int | None = None) -> Tensor:
    """`matrix_vectors` of one layer: (N,)."""
    product: Tensor = matrix_vectors([weight], vector, [bias], programs)
    return product[0]


@torch.library.custom_op("dig::gated_weight_gradient", mutates_args=())
def gated_weight_gradient(product: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight (N, M) and gate (N,) from ``product = d^T x``, d being the gradient of ``gate ⊙ (W x)``.

    ``dW = gate ⊙ product`` by rows and ``dgate_i = sum_j W_ij product_ij``; product (N, M) in fp32.
    """
    product, weight, gate = product.contiguous(), weight.contiguous(), gate.contiguous()
    dweight, dgate = empty(weight), empty(gate)
    N, M = weight.shape
    with on_device(weight.device):
        gated_weight_gradient_kernel[(N,)](
            product, weight, gate, dweight, dgate, M=M, BLOCK=min(1024, triton.next_power_of_2(M)), num_warps=4
        )
    return dweight, dgate


@gated_weight_gradient.register_fake
def _(product: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return empty(weight), empty(gate)
