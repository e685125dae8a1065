"""A GPU architecture: what its hardware has, and what was chosen for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from dig.ops.tiles.choices import (
    GlaTiles,
    ModulationTiles,
    NormTiles,
    SremPass,
    SremTiles,
    SwigluTiles,
    VectorTiles,
    WeightTiles,
)
from dig.ops.tiles.passes import PassChoices
from dig.ops.tiles.products import GradientTiles, ProductChoices, ProductPass, ProductTiles

KIB = 1024
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Facts of an architecture, and the tile choices of every operation on it.

    Attributes:
        name: NVIDIA's.
        capability: The compute capability, (major, minor); None for what is no GPU.
        shared_memory: Bytes that a program (block) may have; None: no limit.
        early_launch: Whether a kernel can start while the one before it ends (programmatic dependent launch).
        descriptors: Whether TMA reads tiles by tensor descriptors.
        gla: (K, V, dtype) → tile choices, of each dtype the narrowest heads first.
        adaln: (D, dtype of x) → tile choices.
        srem: (pass, dtype of x) → tile choices.
        swiglu: dtype → tile choices.
        products: Of SwiGLU's GEMMs. They read tiles by descriptors: without those, all are apart.
        gradients: Of weights' gradients in one launch, which reads tiles by descriptors too; None: each is a GEMM.
        weights: Of casts of weights and what else reads each weight once.
        condition: Of the condition's two products.
        passes: Which of its ways a block's pass takes.
    """

    name: str
    capability: tuple[int, int] | None
    shared_memory: int | None
    early_launch: bool
    descriptors: bool
    gla: Mapping[tuple[int, int, torch.dtype], GlaTiles]
    adaln: Mapping[tuple[int, torch.dtype], NormTiles]
    srem: Mapping[tuple[SremPass, torch.dtype], SremTiles]
    swiglu: Mapping[torch.dtype, SwigluTiles]
    products: ProductChoices
    gradients: GradientTiles | None
    weights: WeightTiles
    condition: VectorTiles
    passes: PassChoices

    def __post_init__(self) -> None:
        if not self.descriptors and (self.products.narrow or self.products.wide or self.products.few or self.gradients):
            raise ValueError(f"products must be apart on {self.name}: its kernels need tensor descriptors")

    def gla_tiles(self, K: int, V: int, dtype: torch.dtype) -> GlaTiles:
        """Of the first entry for heads at least as wide, or the widest; of a smaller chunk where that doesn't fit.

        Where a program that walks a head's chunks doesn't fit, none does: the forward pass is three launches.

        Raises:
            ValueError: Not even the smallest chunk fits into shared memory.
        """
        return self._once(("gla", K, V, dtype), lambda: self._choose_gla(K, V, dtype))

    def _choose_gla(self, K: int, V: int, dtype: torch.dtype) -> GlaTiles:
        entries = {(k, v): tiles for (k, v, of), tiles in self.gla.items() if of == dtype}
        tiles = next((tiles for (k, v), tiles in entries.items() if k >= K and v >= V), list(entries.values())[-1])
        few = None if tiles.few is None else self._fitting_gla(tiles.few, K, V, dtype)
        return replace(self._fitting_gla(tiles, K, V, dtype), few=few)

    def _fitting_gla(self, tiles: GlaTiles, K: int, V: int, dtype: torch.dtype) -> GlaTiles:
        while not self._fits(tiles.shared_memory(K, V, dtype)):
            if tiles.chunk == 16:
                raise ValueError(
                    f"gated linear attention with heads of K = {K} and V = {V} in {dtype} needs "
                    f"{tiles.shared_memory(K, V, dtype) / KIB:g} KiB of shared memory a block; {self} has "
                    f"{(self.shared_memory or 0) / KIB:g}: use backend 'reference' or 'fla', or narrower heads"
                )
            tiles = replace(tiles, chunk=tiles.chunk // 2)
        walks = self._fits(tiles.walk_shared_memory(K, V, dtype))
        return tiles if walks else replace(tiles, walk_chunks=0, segment_chunks=0)

    def adaln_tiles(self, D: int, dtype: torch.dtype) -> NormTiles:
        """Of the next wider entry, or the widest."""
        return self._once(("adaln", D, dtype), lambda: self._choose_adaln(D, dtype))

    def _choose_adaln(self, D: int, dtype: torch.dtype) -> NormTiles:
        widths = [width for width, of in self.adaln if of == dtype]
        return self.adaln[min((width for width in widths if width >= D), default=max(widths)), dtype]

    def product_tiles(self, which: ProductPass, M: int, D: int, F: int) -> ProductTiles | None:
        """Of a GEMM over M tokens of width D; None where a GEMM and a pass of their own do better, or must do.

        F is SwiGLU's inner width.
        """
        return self._once((which, M, D, F), lambda: self._choose_products(which, M, D, F))

    def _choose_products(self, which: ProductPass, M: int, D: int, F: int) -> ProductTiles | None:
        few = self.products.least_tokens > M
        tiles = self.products.few.get(which) if few else self.products.tiles(which, D)
        if tiles is None or F % tiles.columns or not self._fits(tiles.shared_memory(which)):
            return None
        too_many = few and tiles.programs(M, F) > self.products.few_programs
        return None if too_many else tiles

    def gradient_tiles(self, M: int, D: int) -> GradientTiles | None:
        """Of a block's weights' gradients over M tokens of width D; None where each is a GEMM by itself."""
        tiles = self.gradients
        if tiles is None or not tiles.least_tokens:
            return None
        return tiles if tiles.least_tokens <= M and tiles.most_width >= D else None

    def modulation_tiles(self) -> ModulationTiles:
        """Of adaLN's linear layer for a batch; with fewer loads in flight where those don't fit.

        Raises:
            ValueError: Not even one load fits into shared memory.
        """
        return self._once(("modulation",), self._choose_modulation)

    def _choose_modulation(self) -> ModulationTiles:
        tiles = self.weights.modulation
        while not self._fits(tiles.shared_memory()):
            if tiles.stages == 1:
                raise ValueError(
                    f"adaLN's linear layer for a batch needs {tiles.shared_memory() / KIB:g} KiB of shared memory a "
                    f"block; {self} has {(self.shared_memory or 0) / KIB:g}: use backend 'reference'"
                )
            tiles = replace(tiles, stages=tiles.stages - 1)
        return tiles

    def _once(self, asked: tuple[object, ...], choose: Callable[[], T]) -> T:
        """What is chosen, kept by what was asked for: every launch asks."""
        # Not a field: it is no fact of the architecture, and no copy of this may have it.
        known: dict[Any, Any] = self.__dict__.setdefault("_chosen", {})
        found = known.get(asked, known)
        if found is known:
            found = known[asked] = choose()
        chosen: T = found
        return chosen

    @property
    def plans(self) -> dict[Any, Any]:
        """What follows for whole passes from these choices, by what it was asked for; for `dig.raster_plan`."""
        plans: dict[Any, Any] = self.__dict__.setdefault("_plans", {})
        return plans

    def forget(self) -> None:
        """Choose anew from now on: a table has changed."""
        for kept in ("_chosen", "_plans"):
            self.__dict__.pop(kept, None)

    def _fits(self, shared_memory: int) -> bool:
        return self.shared_memory is None or shared_memory <= self.shared_memory

    def __str__(self) -> str:
        return self.name if self.capability is None else f"{self.name} ({'.'.join(map(str, self.capability))})"
