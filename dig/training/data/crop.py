"""From an image of any size to a square of pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def center_crop(image: Image.Image, side: int) -> Image.Image:
    """ADM's centre crop (Dhariwal & Nichol, 2021): the middle square of the image at ``side`` x ``side`` pixels.

    The image is halved by averaging while its shorter side is at least twice ``side``, which keeps fine detail from
    aliasing; a bicubic resize then brings the shorter side to ``side``; what stands over on the longer side is cut
    off, half at either end.
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def read_pixels(path: str | bytes, side: int, channels: int) -> NDArray[np.uint8]:
    """Decode one image file and crop it: (channels, side, side), RGB or grey.

    The orientation tag of cameras is ignored, as in ADM and DiT.

    Raises:
        Exception: Whatever Pillow raises on a file that is no image or is damaged: OSError mostly, but not only.
    """
    with Image.open(path) as image:
        pixels = np.asarray(center_crop(image.convert("RGB" if channels == 3 else "L"), side))
    return (pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)).copy()
