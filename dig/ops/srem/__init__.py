r"""SREM's 3x3 depth-wise convolution (arXiv 2405.18428, section 3.3), without moving a token.

The paper convolves the grid of tokens after every block, then flips the sequence and, after every second block,
transposes the grid, so that the next block scans in another direction. All of a block but the recurrence and this
convolution works token by token, so the tokens may as well stay in raster order. With :math:`P` the permutation from
raster order to a block's scan order and :math:`*` the convolution of the folded grid,

.. math:: P^{-1}(w * P x) = w' * x

where :math:`w'` is :math:`w` with its taps transposed (for a transposed scan) and rotated by 180 degrees (for a
reversed one): a neighbour in the scanned grid is a neighbour in the raster grid, only in another direction, and zero
padding surrounds both alike.

The gated residual before it is fused in, :math:`y = w' * (x + gate \cdot branch) + b`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dig.ops.first_call import from_triton
from dig.ops.srem.reference import oriented, reference_srem
from dig.scan import ScanOrder

__all__ = ["IMPLEMENTATIONS", "oriented", "reference_srem", "srem"]


class Implementation(Protocol):
    """What every entry of `IMPLEMENTATIONS` is called like; for the arguments, see `srem`."""

    def __call__(
        self,
        x: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        *,
        grid: tuple[int, int],
        order: ScanOrder,
    ) -> Tensor:
        """(B, T, D)."""


@from_triton
def _triton_srem() -> Implementation:
    from dig.ops.srem.fused import fused_srem

    return fused_srem


IMPLEMENTATIONS: dict[str, Implementation] = {"reference": reference_srem, "triton": _triton_srem}


def srem(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    grid: tuple[int, int],
    order: ScanOrder,
    implementation: str,
) -> Tensor:
    """Add a gated branch to the tokens and convolve the grid, in raster order before and after.

    Args:
        x: Tokens (B, T, D) in raster order.
        branch: (B, T, D), what the half of a block before this one computed; None for the convolution alone.
        gate: (B, D), what the branch is multiplied with; None with ``branch=None``.
        weight: (D, 1, 3, 3), the kernel of the grid as the block's scan folds it: the model's parameter.
        bias: (D,).
        grid: (rows, columns) of the image, with T = rows·columns.
        order: The block's scan order, which decides how the taps are turned.
        implementation: ``reference`` (PyTorch, any device) or ``triton`` (NVIDIA GPUs; see
            `dig.ops.srem.fused.fused_srem`).

    Returns:
        (B, T, D) in x's dtype. The sum ``x + gate * branch`` is rounded to x's dtype before it is convolved, as in a
        model that stores it.

    Raises:
        ValueError: Unknown implementation, or shapes that do not fit together; the message names the argument.
        MissingPackageError: Triton was asked for and is not installed.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
    check_shapes(x, branch, gate, weight, bias, grid)
    return IMPLEMENTATIONS[implementation](x, branch, gate, weight, bias, grid=grid, order=order)


def check_shapes(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, weight: Tensor, bias: Tensor, grid: tuple[int, int]
) -> None:
    """Raise ValueError unless the shapes are those of `srem`."""
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x must be (B, T, D), none of them 0; got {tuple(x.shape)}")
    B, T, D = x.shape
    if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != T:
        raise ValueError(f"grid must be (rows, columns) with rows·columns = {T}, x's tokens; got {tuple(grid)}")
    if (branch is None) != (gate is None):
        raise ValueError(f"gate must be given with branch, and without it be None; got {gate}")
    shapes = {
        "branch": (branch, (B, T, D)),
        "gate": (gate, (B, D)),
        "weight": (weight, (D, 1, 3, 3)),
        "bias": (bias, (D,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}")
