"""From an image of any size to a square of pixels."""

from __future__ import annotations

import math

from PIL import Image

MAX_SCALED_PIXELS = 2**26
"""An image that would have more pixels than these once its shorter side is scaled is cut before it is scaled."""


def center_crop(image: Image.Image, side: int) -> Image.Image:
    """ADM's centre crop (Dhariwal & Nichol, 2021): the middle square of the image at ``side`` x ``side`` pixels.

    The image is halved by averaging while its shorter side is at least twice ``side``, which keeps fine detail from
    aliasing; a bicubic resize then brings the shorter side to ``side``; what stands over on the longer side is cut
    off, half at either end.

    Of a very long image only the middle is scaled: 1 x 60,000 pixels at a side of 256 would be 4 billion on the way.
    Pillow may then take rows and columns in the other order and round otherwise between them: by two levels at most.
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    if size[0] * size[1] > MAX_SCALED_PIXELS:
        (first, width, x), (second, height, y) = (
            _middle(length, scaled, start, side)
            for length, scaled, start in zip(image.size, size, (left, top), strict=True)
        )
        image = image.crop((first, second, first + width, second + height))
        return image.resize((side, side), Image.Resampling.BICUBIC, box=(x[0], y[0], x[1], y[1]))
    image = image.resize(size, Image.Resampling.BICUBIC)
    return image.crop((left, top, left + side, top + side))


def _middle(length: int, scaled: int, start: int, side: int) -> tuple[int, int, tuple[float, float]]:
    """What of an axis decides on the pixels ``start`` to ``start + side`` of the scaled one.

    Returns:
        Its first pixel, how many they are, and where in them the wanted part begins and ends.
    """
    pitch = length / scaled
    margin = math.ceil(2 * max(pitch, 1.0)) + 1  # a bicubic kernel reaches two pixels of the coarser grid
    begin, end = start * pitch, (start + side) * pitch
    first, last = max(0, math.floor(begin) - margin), min(length, math.ceil(end) + margin)
    return first, last - first, (begin - first, end - first)
