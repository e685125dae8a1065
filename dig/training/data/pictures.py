"""From an image file to 8-bit pixels: every kind of pixel that Pillow opens, or a reason why not."""

from __future__ import annotations

import errno
import os
import stat
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dig.training.data.crop import center_crop

# Pillow looks at what a file holds, not at its name. Of all that it can open these are rasters that it decodes itself;
# for EPS it would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "PPM", "WEBP", "TIFF", "JPEG2000")
_SAMPLE_FORMAT, _UNSIGNED = 339, 1
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0

# Above twice this size Pillow refuses an image, which is then unreadable like any other; below it only warns.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_pixels(path: str | bytes, side: int, channels: int) -> NDArray[np.uint8]:
    """Decode one image file and crop it: (channels, side, side), RGB or grey.

    Of an animation the first frame. The orientation tag of cameras is ignored, and so are colour profiles and
    transparency, as in ADM and DiT.

    Raises:
        Exception: Whatever Pillow raises on a file that is no image or is damaged: OSError mostly, but not only.
        ValueError: It holds pixels of which nobody can say which value is white.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
        raise OSError(errno.EINVAL, "not an ordinary file")
    with Image.open(path, formats=_FORMATS) as image:
        pixels = np.asarray(center_crop(_eight_bits(image, "RGB" if channels == 3 else "L"), side))
    return (pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)).copy()


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """The image in mode RGB or L.

    Pillow's own conversion clips pixels of more than 8 bits instead of scaling them, and has none for some modes.
    """
    # Nothing here asks for it, and Pillow would warn that it is lost.
    image.info.pop("transparency", None)
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep(image).convert(mode)
    formats = getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, _UNSIGNED)
    if set(formats if isinstance(formats, tuple) else (formats,)) != {_UNSIGNED}:  # which Pillow reads as if it were
        raise ValueError("its pixels are signed integers, and nothing says which is white; convert it to 8 or 16 bits")
    if image.mode in ("La", "RGBa"):  # multiplied with their transparency
        image = image.convert(image.mode.upper())
    elif image.mode == "LAB":
        image = image.convert("RGB")
    return image.convert(mode)


def _from_deep(image: Image.Image) -> Image.Image:
    """An image of one channel of more than 8 bits to mode L, its format's range to 0 to 255."""
    tags = getattr(image, "tag_v2", {})
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        bits = tags.get(_BITS_PER_SAMPLE, 16)
        white = 2 ** (bits[0] if isinstance(bits, tuple) else bits) - 1
    elif image.format in ("PNG", "PPM") and image.mode != "F":
        white = 2**16 - 1  # Pillow has scaled a PGM's own
    else:
        kind = {"F": "floating-point numbers", "I": "32-bit or signed integers"}.get(image.mode, "deep integers")
        raise ValueError(f"its pixels are {kind}, and nothing says which is white; convert it to 8 or 16 bits")
    values = np.asarray(image).astype(np.int32)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # which Pillow heeds for 8 bits alone
        values = white - values
    return Image.fromarray(((values * 510 + white) // (2 * white)).clip(0, 255).astype(np.uint8))
