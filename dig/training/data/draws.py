"""Random numbers as a pure function of what they are for, so that no generator's state has to be saved.

A counter-based generator: SplitMix64's finaliser (Steele, Lea & Flood, 2014), applied once for each counter. It is
plain 64-bit arithmetic, hence the same on every machine and with every version of numpy.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Purpose = Literal["order", "mirror", "noise", "time", "label"]

_PURPOSES: dict[Purpose, int] = {"order": 1, "mirror": 2, "noise": 3, "time": 4, "label": 5}
_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses nothing
_MASK = (1 << 64) - 1


def draw_bits(seed: int, purpose: Purpose, *counters: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for each place of the counters, which broadcast against each other.

    For a fixed seed, purpose and all counters but the last, different last counters give different bits.
    """
    state = np.zeros(1, dtype=np.uint64)
    for counter in (seed, _PURPOSES[purpose], *counters):
        word = np.atleast_1d(counter if isinstance(counter, np.ndarray) else np.uint64(counter & _MASK))
        state = _mix(state + _GAMMA * (word.astype(np.uint64) + np.uint64(1)))
    return state


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64-bit words in which every bit of z changes every bit of the result."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


# A batch that spans the end of an epoch needs two.
@lru_cache(maxsize=2)
def epoch_permutation(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """(length,) every index below ``length`` once, in the order that belongs to the seed and the epoch."""
    keys = draw_bits(seed, "order", epoch, np.arange(length, dtype=np.int64))
    order = np.argsort(keys, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def draw_mirrored(seed: int, epochs: NDArray[np.int64], indices: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(B,) whether each sample is mirrored in its epoch: a fair coin for every (seed, epoch, index)."""
    return (draw_bits(seed, "mirror", epochs, indices) >> np.uint64(63)).astype(np.bool_)


def draw_uniform(seed: int, purpose: Purpose, *counters: int | NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1), a multiple of 2^-53, for each place of the counters: see `draw_bits`."""
    return (draw_bits(seed, purpose, *counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def noise_seed(seed: int, index: int, mirrored: bool) -> int:
    """Seed of the generator that the latent of one image is sampled with, below 2^63."""
    return int(draw_bits(seed, "noise", int(mirrored), index)[0] >> np.uint64(1))
