"""What every data set here offers: batches of samples by index, mirrored or not, and the names of the classes.

Shapes: B samples, C channels, H rows, W columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class DataError(ValueError):
    """Data cannot be used as it is; the message names the file or folder and says what to do."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Some samples of a data set.

    Attributes:
        x: (B, C, H, W) float32: pixels in [-1, 1], or latents, scaled already.
        y: (B,) int64 labels.
        unreadable: File name → reason, for every file among them that another one replaces.
    """

    x: Tensor
    y: Tensor
    unreadable: Mapping[str, str] = field(default_factory=dict)


class DataSet(ABC):
    """Labelled images or latents, read by index.

    Attributes:
        sample_shape: (C, H, W) of one sample.
        class_names: Name of each label, 0 first.
        mirror: Whether training shows each sample mirrored half of the time.
        in_memory: Whether all samples are in RAM, so that reading a batch is not worth a worker process.
        name: What the samples are and where they came from, for messages.
    """

    sample_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    mirror: bool
    in_memory: bool
    name: str

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are."""

    @abstractmethod
    def fetch(self, indices: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> Samples:
        """Read samples.

        Args:
            indices: (B,), each at least 0 and below the length.
            mirrored: (B,), which of them to mirror left to right.

        Raises:
            DataError: The samples, and those that could replace them, cannot be read.
        """

    def fetch_readable(self, indices: NDArray[np.int64]) -> Samples:
        """Read samples, none mirrored, and leave out those that cannot be read instead of letting others stand in.

        For measuring: a replacement would be counted twice.

        Args:
            indices: (B,), each at least 0 and below the length.

        Returns:
            At most B samples, in the order of the indices, and the names of what is missing.

        Raises:
            DataError: The data set is damaged as a whole.
        """
        return self.fetch(indices, np.zeros(len(indices), dtype=np.bool_))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One sample, not mirrored: (C, H, W) float32 and its label."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not among the {len(self)} samples of {self.name}")
        samples = self.fetch(np.array([index], dtype=np.int64), np.zeros(1, dtype=np.bool_))
        return samples.x[0], int(samples.y[0])

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self.class_names)

    def describe(self) -> str:
        """One line for people: ``idx files in data: 60,000 samples of 1x32x32, 10 classes, never mirrored``."""
        shape = "x".join(map(str, self.sample_shape))
        mirrored = "mirrored half of the time" if self.mirror else "never mirrored"
        return f"{self.name}: {len(self):,} samples of {shape}, {self.num_classes} classes, {mirrored}"


def pixels_to_unit(pixels: Tensor) -> Tensor:
    """Uint8 pixels to float32 in [-1, 1]: 0 is -1, 255 is 1, exactly."""
    return pixels.float().div_(127.5).sub_(1.0)


def mirror_where(x: Tensor, mirrored: NDArray[np.bool_]) -> Tensor:
    """Turn left and right of the chosen ones of (B, C, H, W)."""
    if not mirrored.any():
        return x
    return torch.where(torch.from_numpy(mirrored).view(-1, 1, 1, 1), x.flip(-1), x)
