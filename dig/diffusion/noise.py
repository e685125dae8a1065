"""The normal noise of sampling and of training: a function of (seed, sample, step), so that no batch split changes it.

numpy's Philox is a counter-based generator (Salmon et al., SC 2011): the key is (seed, sample), the counter's top word
the step, so each number has an address and any of them can be drawn first. PyTorch's CPU generator would not do: it
keeps only the low 32 bits of its seed, and of 50,000 samples two would share their noise in one run of four.

Numbers are drawn on the CPU, in fp32, whatever device samples: 0.05 ms for 4096 of them on one core. Drawn ahead for
a CUDA graph they take 4 bytes × (steps - 1) × values of the sample: for 250 steps of DDPM, 4.1 MB a sample at a latent
of 4×32×32 and 65 MB at 4×128×128, which is what bounds the batch there. Deterministic samplers need none of it, and a
loop that is not captured takes the steps' noise one at a time.

Shapes: B batch, ``shape`` that of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

WORDS = 2**64
"""Seeds and numbers of samples are below this: a word of the generator's key."""


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal x_T of the samples of those indices: (B, *shape) fp32 on the CPU.

    Args:
        seed: 0 to 2^64 - 1.
        indices: Number of each sample in the whole run, whatever batch it is drawn in.
        shape: Shape of one sample.
    """
    return _draw(seed, indices, shape, 0)


def step_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...], step: int) -> Tensor:
    """Standard normal noise that the sampler's step (0 is the first) adds: (B, *shape) fp32 on the CPU."""
    return _draw(seed, indices, shape, 1 + step)


def training_noise(seed: int, numbers: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of the training samples of those numbers: (B, *shape) fp32 on the CPU.

    Args:
        seed: 0 to 2^64 - 1.
        numbers: Which sample of the whole run each is, counted over all steps: never the same twice.
        shape: Shape of one sample.
    """
    return _draw(seed, numbers, shape, 0, use=1)


def _draw(seed: int, indices: Sequence[int], shape: tuple[int, ...], stream: int, use: int = 0) -> Tensor:
    """(B, *shape) of the stream: 0 is x_T, 1 + i the noise of step i; ``use`` is 0 in sampling, 1 in training."""
    if not 0 <= seed < WORDS or (len(indices) and not 0 <= min(indices) <= max(indices) < WORDS):
        raise ValueError(f"the seed and the numbers of samples must be 0 to 2^64 - 1; got the seed {seed}")
    drawn = np.empty((len(indices), *shape), dtype=np.float32)
    counter = np.array([0, 0, use, stream], dtype=np.uint64)
    for row, index in zip(drawn, indices, strict=True):
        # As words: numpy takes a list with a number from 2^63 up through fp64, where neighbouring seeds are one.
        philox = np.random.Philox(key=np.array([seed, index], dtype=np.uint64), counter=counter)
        np.random.Generator(philox).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(drawn)
