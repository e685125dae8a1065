"""Which samples a step sees: a pure function of the step, so that the step number is all that a resumed run needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dig.training.data.draws import draw_mirrored, epoch_permutation


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The samples of one step on one rank.

    Attributes:
        epochs: (B,) which pass over the data each sample belongs to; a batch may span the end of an epoch.
        indices: (B,) index of each sample.
        mirrored: (B,) the coin that says whether a data set that mirrors shows it mirrored.
    """

    epochs: NDArray[np.int64]
    indices: NDArray[np.int64]
    mirrored: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """An endless stream of batches over shuffled epochs.

    The epochs lie end to end, each a permutation of its own; a step takes the next ``world_size * batch_size`` samples,
    and rank r the r-th ``batch_size`` of those. So every sample is seen exactly once an epoch, by whatever rank; no
    sample is dropped or padded; and the samples of a step depend on the product of the two sizes alone.

    Attributes:
        length: Samples in the data set.
        batch_size: Samples a step, on each rank.
        seed: Of the shuffling and the mirroring.
        rank: Of this process, 0 to ``world_size - 1``.
        world_size: How many processes share a step.
    """

    length: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError on a field that no order may have."""
        for name in ("length", "batch_size", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be at least 0 and below the world size {self.world_size}; got {self.rank}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative; got {self.seed}")

    @property
    def samples_per_step(self) -> int:
        """Samples a step, on all ranks together."""
        return self.batch_size * self.world_size

    def epoch(self, step: int) -> float:
        """Passes over the data that lie behind the start of ``step``."""
        return step * self.samples_per_step / self.length

    def select(self, step: int) -> Selection:
        """The samples of ``step``, 0 being the first."""
        if step < 0:
            raise ValueError(f"step must not be negative; got {step}")
        first = step * self.samples_per_step + self.rank * self.batch_size
        epochs, places = np.divmod(np.arange(first, first + self.batch_size, dtype=np.int64), self.length)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = epoch_permutation(self.seed, int(epoch), self.length)[places[here]]
        return Selection(epochs=epochs, indices=indices, mirrored=draw_mirrored(self.seed, epochs, indices))
