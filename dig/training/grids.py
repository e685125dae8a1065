"""Grids of samples of a model in training, all of a run from the same noise, so that one watches them improve."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

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


class Grids:
    """A run's grids: when one is due, where it is written, and drawing it.

    Args:
        config: The run.
        folder: Of the run.
        decode: Latents (B, C, h, w), scaled, to images (B, 3, H, W). None in pixel space; with latents, there are then
            no grids.

    Attributes:
        folder: Of the grids.
    """

    def __init__(self, config: TrainConfig, folder: Path, decode: Callable[[Tensor], Tensor] | None = None) -> None:
        self.folder = folder / "samples"
        self._config = config
        self._decode = decode

    def due(self, step: int) -> bool:
        """Whether there is a grid after this step: there is none of latents that nothing decodes."""
        config = self._config
        drawable = config.data.latent_scale is None or self._decode is not None
        return config.grid_every > 0 and step % config.grid_every == 0 and drawable

    def path(self, step: int) -> Path:
        """Where the grid of a step is written."""
        return self.folder / f"step-{step:08d}.png"

    def draw(self, model: Backbone, *, stop: Callable[[], bool] = lambda: False) -> NDArray[np.uint8] | None:
        """A column for each of the first ten classes, (rows, columns, 3) uint8.

        Args:
            model: With averaged weights.
            stop: Asked after every step of sampling.

        Returns:
            None if ``stop`` said so, or with a warning if the samples are not finite: the training that they are of is.
        """
        config, decode = self._config, self._decode
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
