"""The moving average of the weights, whose decay rises at the beginning of a run.

With a fixed decay of 0.9999 the average of a run of 400 steps is still 96% the first weights, which draw noise. So the
decay of update n is ``min(decay, (1 + n) / (10 + n))``, as TensorFlow's ``ExponentialMovingAverage`` and its
descendants in diffusion have it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dig.training.config import TrainConfig

logger = logging.getLogger(__name__)

MUCH = 0.1
"""An average of more than this share of the first weights is worth a warning."""

MoveAverage = Callable[[Any, Any, Tensor], None]
"""(averages, weights, () how many updates the weights have had with this one): moves the averages on, in place."""


def moving_average(decay: float, *, warmup: bool) -> MoveAverage:
    """The update of averages towards weights.

    The decay is computed on the device, from the optimizer's own count of updates: a CUDA graph replays it, and a
    resumed run has it without a state of its own.

    Args:
        decay: At its highest.
        warmup: Whether it rises to that from 2/11; else it is the same in all updates.
    """
    if not warmup:
        update: MoveAverage = get_ema_multi_avg_fn(decay)
        return update

    @torch.no_grad()
    def move(averages: list[Tensor], weights: list[Tensor], updates: Tensor) -> None:
        kept = ((1 + updates) / (10 + updates)).clamp(max=decay)
        # weights + kept (averages - weights), in place: a copy of all weights would be memory.
        torch._foreach_sub_(averages, weights)
        torch._foreach_mul_(averages, kept)
        torch._foreach_add_(averages, weights)

    return move


def share_of_first_weights(steps: int, decay: float, *, warmup: bool) -> float:
    """How much of the average after so many steps is still the weights that training began with, 0 to 1."""
    if not warmup:
        return decay**steps
    share = 1.0
    for n in range(1, steps + 1):
        share *= min(decay, (1 + n) / (10 + n))
        if share < 1e-3:
            return 0.0
    return share


def warn_of_first_weights(config: TrainConfig) -> None:
    """Log a warning where a run's average will, at its last step, still be much of the first weights."""
    share = share_of_first_weights(config.steps, config.ema, warmup=config.ema_warmup)
    if share > MUCH:
        logger.warning(
            "at step %d the averaged weights, which grids and samples are drawn with, will be %.0f%% the %s: %s",
            config.steps,
            100 * share,
            "weights of --init" if config.init else "first ones",
            "take more steps, or sample with --weights raw"
            if config.ema_warmup
            else "a lower --ema, or --ema-warmup in a new folder, would be of use",
        )
