"""Samples as pictures: 8-bit pixels, a grid in one image, PNG files.

Shapes: N samples, C channels (1 or 3), H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dig.training.data.files import replacing


def to_pixels(x: Tensor) -> NDArray[np.uint8]:
    """(N, C, H, W) in [-1, 1], what is beyond cut off, to (N, H, W, 3) uint8; grey becomes three equal channels."""
    if x.shape[1] not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels; got {x.shape[1]}")
    pixels = ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def make_grid(pixels: NDArray[np.uint8], columns: int | None = None, gap: int = 2) -> NDArray[np.uint8]:
    """Lay out (N, H, W, 3) images row by row on white, ``gap`` pixels apart; about square if not told otherwise."""
    count, height, width, _ = pixels.shape
    if count == 0:
        raise ValueError("there are no images to lay out")
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


LABEL = 14
"""Rows of a label beneath a picture, and the size of its font."""


def enlarge(pixels: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """(N, H, W, 3) to (N, scale H, scale W, 3), each pixel a square."""
    if not 1 <= scale <= 64:
        raise ValueError(f"scale must be 1 to 64; got {scale}")
    return pixels.repeat(scale, axis=1).repeat(scale, axis=2)


def with_labels(pixels: NDArray[np.uint8], labels: Sequence[str]) -> NDArray[np.uint8]:
    """(N, H, W, 3) to (N, H + 14, W, 3): beneath each picture its label in black on white, cut to its width."""
    count, _, width, _ = pixels.shape
    font = ImageFont.load_default(LABEL - 3)
    strips = np.empty((count, LABEL, width, 3), dtype=np.uint8)
    for strip, label in zip(strips, labels, strict=True):
        text = label
        while len(text) > 1 and font.getlength(text) > width - 2:
            text = text.rstrip("…")[:-1] + "…"
        picture = Image.new("RGB", (width, LABEL), "white")
        ImageDraw.Draw(picture).text((1, 0), text, fill="black", font=font)
        strip[:] = np.asarray(picture)
    return np.concatenate([pixels, strips], axis=1)


def write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write (H, W, 3) uint8 as a PNG file, atomically."""
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
