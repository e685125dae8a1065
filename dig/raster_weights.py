"""A block's weights by name, and what its passes on this project's kernels take of them.

One launch a block casts the weights to the GEMMs' dtype and, with one image, multiplies them by the gates. That needs
no tokens, so it can precede the block: `Ahead`.

Shapes: B batch, T tokens, D width, R rank of the decay gate, F inner width of SwiGLU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dig.ops.linear import without_autocast
from dig.ops.modulation import modulation, modulation_backward, modulation_gradients, takes
from dig.ops.side_stream import Part
from dig.ops.swiglu.products import fuses_cast, project_up_preparing
from dig.ops.weights import matrix_vector, matrix_vectors, prepare_weights
from dig.scan import ScanOrder


class Products(NamedTuple):
    """The weights of a block's five GEMMs: its parameters, or their copies as the GEMMs take them.

    Those that can take a gate come last, as `dig.ops.weights.prepare_weights` asks for.

    Attributes:
        in_proj: (3D + R, D).
        decay_weight: (D/2, R).
        gate_proj: (2F, D).
        o_proj: (D, D); takes the first gate where gates are folded.
        down_proj: (D, F); takes the second.
    """

    in_proj: Tensor
    decay_weight: Tensor
    gate_proj: Tensor
    o_proj: Tensor
    down_proj: Tensor


class BlockWeights(NamedTuple):
    """A block's parameters; None where a variant has none. In the backward pass, their gradients.

    Attributes:
        in_proj: As of `Products`, as are the other four.
        decay_weight: As there.
        gate_proj: As there.
        o_proj: As there.
        down_proj: As there.
        decay_bias: (D/2,).
        head_norm: (D/H,).
        norm1: (D,) or None.
        norm2: (D,) or None.
        conv_weight: (D, 1, 3, 3) or None.
        conv_bias: (D,) or None.
        adaln_weight: (6D, D).
        adaln_bias: (6D,).
    """

    in_proj: Tensor
    decay_weight: Tensor
    gate_proj: Tensor
    o_proj: Tensor
    down_proj: Tensor
    decay_bias: Tensor
    head_norm: Tensor
    norm1: Tensor | None
    norm2: Tensor | None
    conv_weight: Tensor | None
    conv_bias: Tensor | None
    adaln_weight: Tensor
    adaln_bias: Tensor

    @property
    def products(self) -> Products:
        """The weights of the products among them."""
        return Products(self.in_proj, self.decay_weight, self.gate_proj, self.o_proj, self.down_proj)


class LargeGradients(NamedTuple):
    """Memory that gradients of a block's large weights are wanted in; None where they may lie anywhere.

    Attributes:
        in_proj: As of `Products`, as are the next three.
        gate_proj: As there.
        o_proj: As there.
        down_proj: As there.
        adaln_weight: (6D, D).
    """

    in_proj: Tensor | None = None
    gate_proj: Tensor | None = None
    o_proj: Tensor | None = None
    down_proj: Tensor | None = None
    adaln_weight: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a block takes from its weights and the condition, none of it from the tokens.

    Attributes:
        modulation: (B, 6D), adaLN's output.
        products: The weights of the products in the tokens' dtype, gates folded in where they are.
    """

    modulation: Tensor
    products: Products


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a block's passes take beside tensors.

    Attributes:
        norm: ``rms`` or ``layer``.
        heads: H.
        grid: (rows, columns) of the image's tokens.
        order: In which the recurrence walks them.
    """

    norm: str
    heads: int
    grid: tuple[int, int]
    order: ScanOrder


def settings_of(norm: str, heads: int, grid: tuple[int, int], order: ScanOrder) -> Settings:
    """The same `Settings` each time: every block asks in every step."""
    # torch.compile warns of a cache, and looks into what it holds.
    find = _settings.__wrapped__ if torch.compiler.is_compiling() else _settings
    return find(norm, heads, grid, order)


@functools.lru_cache(maxsize=1024)
def _settings(norm: str, heads: int, grid: tuple[int, int], order: ScanOrder) -> Settings:
    return Settings(norm=norm, heads=heads, grid=grid, order=order)


class FusedCast:
    """The weights of a block that are cast in the one before, in its up-projection GEMM: `project_up_preparing`.

    Args:
        products: The later block's.
        modulation: The later block's (1, 6D), which has the gates that go into its weights.

    Attributes:
        prepared: What comes of them; None until the earlier block has run.
    """

    def __init__(self, products: Products, modulation: Tensor) -> None:
        self._products, self._modulation = products, modulation
        self.prepared: Prepared | None = None

    @staticmethod
    def fits(products: Products, h: Tensor) -> bool:
        """Whether such weights are cast in the up-projection GEMM of tokens like h (B, T, D)."""
        return fuses_cast(h, products.down_proj.shape[1], products, 2)

    def project_up(self, h: Tensor, weight: Tensor) -> Tensor:
        """SwiGLU's result (B, T, F) from h (B, T, D) and the earlier block's weight (2F, D); fills in ``prepared``."""
        gates = gates_of_one_image(self._modulation)
        hidden, *copies = project_up_preparing(h, weight, self._products, gates)
        self.prepared = Prepared(modulation=self._modulation, products=Products._make(copies))
        return hidden


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """What a model has computed for a block before it calls it, beside the block's own arguments.

    Attributes:
        weights: The block's, whose modules nobody must see called.
        activated: (B, D), the condition after its SiLU.
        prepared: Of the block; None where it is still to be computed.
        fused_cast: Of the block after it, whose weights this one casts; None without.
        in_place: Whether nobody else reads the tokens that the block is given, so that it may overwrite them.
        part: The block's, of a backward pass whose side work runs on from block to block; None where each block's ends
            with it, because weights and ``activated`` are not `dig.raster_gradients.Gathered`.
    """

    weights: BlockWeights
    activated: Tensor
    prepared: Prepared | None = None
    fused_cast: FusedCast | None = None
    in_place: bool = False
    part: Part | None = None


def gates_of_one_image(modulation: Tensor) -> list[Tensor]:
    """Both gates (D,) of a modulation (1, 6D), as `dig.ops.weights.prepare_weights` takes them."""
    _, _, gate1, _, _, gate2 = modulation.chunk(6, dim=1)
    return [gate1[0], gate2[0]]


def modulation_of(weights: BlockWeights, c: Tensor, programs: int | None = None) -> Tensor:
    """A block's modulation (B, 6D) without a gradient; c and programs as of `prepare_block`."""
    with torch.no_grad():
        if c.shape[0] == 1:
            return matrix_vector(weights.adaln_weight, c[0], weights.adaln_bias, programs).unsqueeze(0)
        return adaln(c, weights.adaln_weight, weights.adaln_bias)


def modulations_of(weights: Sequence[BlockWeights], c: Tensor) -> Tensor:
    """The modulations (L, 6D) of L blocks for one image, c (1, D), without a gradient: in one launch."""
    with torch.no_grad():
        return matrix_vectors([w.adaln_weight for w in weights], c[0], [w.adaln_bias for w in weights])


def prepare_block(
    weights: BlockWeights,
    c: Tensor,
    dtype: torch.dtype,
    *,
    fold_gates: bool,
    programs: int | None = None,
    modulation: Tensor | None = None,
) -> Prepared:
    """Compute a block's modulation, and its weights in the dtype of its products; without a gradient.

    Args:
        weights: The block's.
        c: (B, D), the condition after its SiLU.
        dtype: Of the products.
        fold_gates: Whether the two output projections are multiplied by their gates, which takes B = 1.
        programs: At most so many of each kernel, so that others can run beside it; all at once without.
        modulation: (B, 6D), where it is there already.
    """
    modulation = modulation_of(weights, c, programs) if modulation is None else modulation
    gates = gates_of_one_image(modulation) if fold_gates else []
    with torch.no_grad():
        products = cast_products(weights.products, gates, dtype, programs)
    return Prepared(modulation=modulation, products=products)


def adaln(c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """An adaLN layer in its weights' own dtype, whatever autocast says: c (B, D) after its SiLU to (B, N D).

    One product of a vector and a matrix: reading the matrix is all the work, and a copy of it in another dtype would
    take as long again.
    """
    if takes(weight):
        return modulation.recorded(c, weight, bias)
    with without_autocast(c.device):
        return F.linear(c.to(weight.dtype), weight, bias)


def adaln_backward(
    dmodulation: Tensor, c: Tensor, weight: Tensor, dweight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of c, weight and bias of `adaln`; the weight's may be written into dweight, if given."""
    if takes(weight):
        if dweight is not None:
            return modulation_gradients(dmodulation, c, weight, dweight)
        return modulation_backward(dmodulation, c, weight)
    with without_autocast(c.device):
        dmodulation = dmodulation.to(weight.dtype)
        dweight = torch.mm(dmodulation.T, c.to(weight.dtype))
        return torch.mm(dmodulation, weight).to(c.dtype), dweight, dmodulation.sum(0)


def cast_products(
    products: Products, gates: Sequence[Tensor], dtype: torch.dtype, programs: int | None = None
) -> Products:
    """`prepare_weights`, of those that aren't there already as they have to be."""
    weights = list(products)
    ungated = len(weights) - len(gates)
    todo = [i for i, weight in enumerate(weights) if i >= ungated or weight.dtype != dtype]
    if todo:
        copies = prepare_weights([weights[i] for i in todo], list(gates), dtype, programs)
        for i, copy in zip(todo, copies, strict=True):
            weights[i] = copy
    return Products._make(weights)
