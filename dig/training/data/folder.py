"""A folder of class folders, ImageNet's layout: ``root/n01440764/n01440764_10026.JPEG``."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dig.memory import check_memory
from dig.training.data.base import DataError, DataSet, Samples, mirror_where, pixels_to_unit
from dig.training.data.checks import check_whole
from dig.training.data.files import shown, told_by_start
from dig.training.data.pictures import read_pixels

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"})

MAX_UNREADABLE_RUN = 100
"""So many unreadable files one after the other end the run: that is a lost disk, not a damaged image."""

_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's categories of what moves a cursor, ends a line or is no text."""

# These speak of this machine at this moment, not of the file: replacing it by another would make the run unrepeatable.
_PASSING_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN})


class ImageFolder(DataSet):
    """Images by class folder. Labels number the folders in the order of their names, as code points.

    An image that cannot be decoded is replaced by the next readable one of the listing (after the last comes the
    first), label included. That depends on the files alone, so a resumed run sees the same; each is reported once.
    Files whose names do not end like an image's are left out, and a warning counts them.

    Raises:
        DataError: The folder has another layout, or a class has no image.
    """

    in_memory = False

    def __init__(self, root: str | Path, *, image_size: int = 256, channels: int = 3, mirror: bool = True) -> None:
        check_whole("image_size", image_size, least=1)
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3; got {channels}")
        # Its uint8 and its fp32 pixels.
        needs = {f"an image of {image_size}x{image_size}": 5 * channels * image_size**2}
        check_memory(needs, device="cpu", advice="choose a smaller --image-size")
        self.root = Path(root)
        self.name = f"images in {self.root}"
        self.sample_shape = (channels, image_size, image_size)
        self.mirror = mirror
        self.class_names, names, labels = _list_images(self.root)
        # Arrays, not lists: worker processes share their memory, where counting references would copy every string.
        self._names = np.array([os.fsencode(name) for name in names])
        self._labels = np.array(labels, dtype=np.int64)
        self._unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._labels)

    def file_name(self, index: int) -> str:
        """``class/file`` of a sample."""
        return os.fsdecode(bytes(self._names[index]))

    def label(self, index: int) -> int:
        """Label of a sample, without reading its image."""
        return int(self._labels[index])

    def listing_sha256(self) -> str:
        """Checksum of the file names in order: another listing, another meaning of the indices."""
        return hashlib.sha256(b"\0".join(self._names.tolist())).hexdigest()

    def read(self, index: int) -> NDArray[np.uint8] | None:
        """The image at ``index``, (C, H, W); None, with the reason kept, where it cannot be decoded.

        Raises:
            DataError: The machine, not the file, is why it cannot be read now.
        """
        if index in self._unreadable:
            return None
        channels, side, _ = self.sample_shape
        path = os.path.join(os.fsencode(self.root), bytes(self._names[index]))
        try:
            return read_pixels(path, side, channels)
        # Pillow's decoders raise nearly anything on damaged bytes: OSError, SyntaxError, ValueError, struct.error.
        except Exception as error:
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _PASSING_ERRORS):
                why = getattr(error, "strerror", None) or "not enough memory"
                raise DataError(
                    f"cannot read {shown(os.fsdecode(path))} at the moment: {why}; free what is short, or use fewer "
                    "--workers, and run the same command again"
                ) from None
            hint = told_by_start(path) if isinstance(error, UnidentifiedImageError) else ""
            self._unreadable[index] = _reason(error) + hint
            return None

    def reason(self, index: int) -> str:
        """Why the image at ``index`` could not be decoded."""
        return self._unreadable[index]

    def fetch(self, indices: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> Samples:
        """Decode and crop images; see `DataSet.fetch`."""
        pixels, labels, unreadable = [], [], {}
        for index in map(int, indices):
            chosen = index
            while (image := self.read(chosen)) is None:
                unreadable[self.file_name(chosen)] = self.reason(chosen)
                chosen = (chosen + 1) % len(self)
                if (chosen - index) % len(self) in (0, MAX_UNREADABLE_RUN):
                    raise self._lost(index, min(len(self), MAX_UNREADABLE_RUN))
            pixels.append(torch.from_numpy(image))
            labels.append(self.label(chosen))
        x = mirror_where(pixels_to_unit(torch.stack(pixels)), mirrored)
        return Samples(x=x, y=torch.tensor(labels, dtype=torch.int64), unreadable=unreadable)

    def fetch_readable(self, indices: NDArray[np.int64]) -> Samples:
        """Decode and crop images; see `DataSet.fetch_readable`."""
        images = [self.read(index) for index in map(int, indices)]
        pixels = [torch.from_numpy(image) for image in images if image is not None]
        labels = [self.label(int(i)) for i, image in zip(indices, images, strict=True) if image is not None]
        missing = [int(i) for i, image in zip(indices, images, strict=True) if image is None]
        return Samples(
            x=pixels_to_unit(torch.stack(pixels) if pixels else torch.empty(0, *self.sample_shape, dtype=torch.uint8)),
            y=torch.tensor(labels, dtype=torch.int64),
            unreadable={self.file_name(index): self.reason(index) for index in missing},
        )

    def _lost(self, first: int, count: int) -> DataError:
        return DataError(
            f"{count} images one after the other cannot be read, from {self.root / shown(self.file_name(first))} on "
            f"({self.reason(first)}); check the disk and the files"
        )


def _reason(error: Exception) -> str:
    """What is wrong with a file, without its path: that differs between machines, and stands beside it anyway."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or damaged at its start"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error) in (ValueError, OSError):
        return " ".join(str(error).split())
    return " ".join(f"{type(error).__name__}: {error}".split())


def is_image_name(name: str) -> bool:
    """Whether a file's name ends like an image's; hidden files are none."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(map(shown, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _list_images(root: Path) -> tuple[tuple[str, ...], list[str], list[int]]:
    """Class names, then ``class/file`` and label of every image, sorted by class, then by file."""
    folders, files = _scan(root)
    images = [name for name in files if is_image_name(name)]
    if not folders:
        found = f"images ({_some(images, 3)}) but no class folders" if images else "no class folders"
        raise DataError(f"{root} holds {found}; each class needs a folder of its own, as in {root}/cat/1.jpg")
    if images:
        raise DataError(
            f"{root} holds images beside its class folders ({_some(images)}); move them into the folder of their class"
        )
    names: list[str] = []
    labels: list[int] = []
    empty, nested = [], []
    others = [name for name in files if _is_picture(name)]
    for label, folder in enumerate(folders):
        inner, files = _scan(root / folder)
        images = [name for name in files if is_image_name(name)]
        others += [f"{folder}/{name}" for name in files if not is_image_name(name)]
        if inner:
            nested.append(f"{folder}/{inner[0]}")
        elif not images:
            empty.append(folder)
        names += [f"{folder}/{name}" for name in images]
        labels += [label] * len(images)
    if nested:
        hint = "" if names else f"; did you mean {root / folders[0]}?"
        raise DataError(
            f"the class folders of {root} hold folders ({_some(nested)}), but only images may be there{hint}"
        )
    if empty:
        raise DataError(
            f"classes without images in {root}: {_some(empty)}; add images (names that end in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}), or remove the folders"
        )
    for folder in folders:
        if any(unicodedata.category(one) in _UNPRINTABLE for one in folder):
            raise DataError(
                f"a class folder of {root} has a name that cannot be printed: {shown(folder)}; rename the folder"
            )
    if others:
        kinds = Counter(os.path.splitext(name)[1].lower() or "no suffix" for name in others).most_common(5)
        logger.warning(
            "left out of %s, because of names that do not end like an image's: %d (%s), such as %s; convert those that "
            "are images",
            root,
            len(others),
            ", ".join(f"{shown(suffix)}: {count}" for suffix, count in kinds),
            ", ".join(map(shown, others[:3])),
        )
    return tuple(folders), names, labels


def _is_picture(name: str) -> bool:
    """Whether a name ends like that of a picture which is not read here."""
    return os.path.splitext(name)[1].lower() in Image.registered_extensions() and not is_image_name(name)


def _scan(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the folders and of the files in a folder; hidden ones are left out."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from None
    folders = sorted(name for name, is_folder in found if is_folder)
    return folders, sorted(name for name, is_folder in found if not is_folder)
