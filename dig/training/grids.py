"""Grids of samples of a model in training, all of a run from the same noise, so that one watches them improve."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dig.diffusion import NotFiniteError, sample
from dig.layers import Backbone
from dig.sampling.images import make_grid, to_pixels
from dig.training.config import TrainConfig

logger = logging.getLogger(__name__)

COLUMNS, ROWS = 10, 4
SEED = 0


class _StopDrawingError(Exception):
    """The run is to stop, and not to finish its grid first."""


def draw_grid(
    config: TrainConfig,
    model: Backbone,
    *,
    decode: Callable[[Tensor], Tensor] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> NDArray[np.uint8] | None:
    """A column for each of the first ten classes, (rows, columns, 3) uint8.

    Args:
        config: The run.
        model: With averaged weights.
        decode: Latents to images; None in pixel space.
        stop: Asked after every step of sampling.

    Returns:
        None if ``stop`` said so, or with a warning if the samples are not finite: the training that they are of is.
    """
    columns = min(COLUMNS, config.model.num_classes)
    y = torch.arange(columns * ROWS, device=config.device) % columns

    def observe(_step: int, _x: Tensor) -> None:
        if stop():
            raise _StopDrawingError

    try:
        x = sample(
            model,
            y,
            sampler=config.grid_sampler,
            steps=config.grid_steps,
            # Where no label was ever dropped, the null label's embedding is its first noise.
            cfg_scale=config.grid_cfg if config.label_dropout else 1.0,
            cfg_channels="all",
            seed=SEED,
            dtype=torch.bfloat16 if config.dtype == "bf16" else None,
            observe=observe,
        )
        images = decode(x) if decode is not None else x
    except _StopDrawingError:
        return None
    except NotFiniteError as error:
        logger.warning("a grid is left out: %s", error)
        return None
    return make_grid(to_pixels(images), columns)
