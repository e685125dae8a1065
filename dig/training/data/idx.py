"""MNIST's idx files, Fashion-MNIST's too, compressed with gzip or not."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import IO, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from dig.memory import check_memory
from dig.training.data.base import DataError, DataSet, Samples, mirror_where, pixels_to_unit
from dig.training.data.checks import check_whole
from dig.training.data.files import told_by_start

Split = Literal["train", "test"]

_PREFIXES: dict[Split, str] = {"train": "train", "test": "t10k"}
_UINT8 = 0x08

FASHION_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
# SHA-256 of Fashion-MNIST's label files, decompressed: MNIST's files have the same names.
_FASHION_LABELS = frozenset(
    {
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    }
)


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed while they are read."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if compressed else path.open("rb")


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes.

    The format: two zero bytes, the type (0x08 is uint8), the number of dimensions, each dimension's size as a
    big-endian 32-bit integer, then the values, the last dimension running fastest.

    Args:
        path: The file, compressed with gzip or not.
        dimensions: How many dimensions it must have: 3 for images, 1 for labels.

    Raises:
        DataError: The file cannot be read, is cut off, or is something else; the message says which.
    """
    try:
        with _open(path) as stream:
            return _read_values(path, stream, dimensions)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged or cut off: {error}; fetch it again") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _read_values(path: Path, stream: IO[bytes], dimensions: int) -> NDArray[np.uint8]:
    header = stream.read(4 + 4 * dimensions)
    if len(header) < 4 or header[:2] != b"\0\0":
        got = f"it must start with two zero bytes; got {header[:4].hex(' ')!r}"
        raise DataError(f"{path} is no idx file: {got}{told_by_start(path)}")
    if header[2] != _UINT8:
        raise DataError(f"{path} holds values of type {header[2]:#04x}; only unsigned bytes (0x08) are read")
    if header[3] != dimensions:
        kind = {1: "labels", 3: "grey images"}.get(dimensions, "data")
        raise DataError(f"{path} has {header[3]} dimensions; {kind} have {dimensions}")
    if len(header) < 4 + 4 * dimensions:
        raise DataError(f"{path} is cut off inside its header")
    shape = tuple(int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4))
    expected = math.prod(shape)
    announced = f"{' x '.join(map(str, shape))} = {expected:,} values"
    # Before they are read: four bytes can announce more than any machine has, and a few more unpack to it.
    check_memory({f"{path}, {announced}": expected}, device="cpu", advice="is the file damaged?")
    content = stream.read(expected + 1)
    if len(content) != expected:
        more = " or more" if len(content) > expected else ""
        raise DataError(
            f"{path} announces {announced} but holds {len(content):,}{more}; it is cut off or damaged: fetch it again"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def find_idx(folder: Path, stem: str) -> Path | None:
    """``folder/stem`` in one of the spellings in use: ``-ubyte`` or ``.ubyte``, with ``.gz`` or without."""
    for spelling in (stem, stem.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            path = folder / (spelling + suffix)
            if path.is_file():
                return path
    return None


def holds_idx(folder: Path) -> bool:
    """Whether a folder holds a split of MNIST's layout."""
    return any(find_idx(folder, f"{prefix}-images-idx3-ubyte") for prefix in _PREFIXES.values())


class IdxImages(DataSet):
    """Grey images of MNIST's layout, padded with black to a square, all in RAM.

    They are not mirrored unless asked: a mirrored digit is none, and Fashion-MNIST's shoes all point to the left, so
    that mirrored ones would not be of the data's distribution.

    Args:
        folder: Holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` (and the same for ``t10k``), ``.gz`` too.
        split: ``train``, or ``test`` for the t10k files.
        image_size: Side of the square in pixels; at least that of the images.
        channels: 1, or 3 equal ones.
        mirror: Whether training mirrors half of the images.
        class_names: Name of each label. Default: Fashion-MNIST's, where the labels are Fashion-MNIST's; else digits.

    Raises:
        DataError: A file is missing, damaged, or does not fit the other.
    """

    in_memory = True

    def __init__(
        self,
        folder: str | Path,
        *,
        split: Split = "train",
        image_size: int = 32,
        channels: int = 1,
        mirror: bool = False,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        if split not in _PREFIXES:
            raise ValueError(f"split must be one of {', '.join(_PREFIXES)}; got {split!r}")
        check_whole("image_size", image_size, least=1)
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3; got {channels}")
        self.name = f"idx files ({split}) in {folder}"
        self.mirror = mirror
        self.sample_shape = (channels, image_size, image_size)
        paths = []
        for stem in (f"{_PREFIXES[split]}-images-idx3-ubyte", f"{_PREFIXES[split]}-labels-idx1-ubyte"):
            path = find_idx(Path(folder), stem)
            if path is None:
                raise DataError(f"{folder} has no {stem} (nor {stem}.gz), which the split {split!r} needs")
            paths.append(path)
        images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
        count, rows, columns = images.shape
        if count != len(labels):
            raise DataError(f"{paths[0]} holds {count:,} images but {paths[1]} {len(labels):,} labels")
        if count == 0 or rows == 0 or columns == 0:
            raise DataError(f"{paths[0]} holds no image")
        if max(rows, columns) > image_size:
            raise DataError(f"{paths[0]} holds images of {rows}x{columns}, larger than image_size {image_size}")
        needs = {f"{count:,} images, padded to {image_size}x{image_size}": count * image_size**2}
        check_memory(needs, device="cpu", advice="choose a smaller --image-size")
        digest = hashlib.sha256(b"\0\0\x08\x01" + count.to_bytes(4, "big") + labels.tobytes()).hexdigest()
        names = class_names or (FASHION_NAMES if digest in _FASHION_LABELS else None)
        names = names or tuple(map(str, range(max(10, int(labels.max()) + 1))))
        if labels.max() >= len(names):
            raise DataError(f"{paths[1]} has the label {labels.max()}, but there are only {len(names)} class names")
        self.class_names = names
        top, left = (image_size - rows) // 2, (image_size - columns) // 2
        self._pixels = torch.zeros(count, 1, image_size, image_size, dtype=torch.uint8)
        self._pixels[:, 0, top : top + rows, left : left + columns] = torch.from_numpy(images.copy())
        self._labels = torch.from_numpy(labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self._labels)

    def fetch(self, indices: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> Samples:
        """Slice the images; see `DataSet.fetch`."""
        chosen = torch.from_numpy(indices)
        x = mirror_where(pixels_to_unit(self._pixels[chosen]), mirrored)
        # A copy of its own for each channel, so that writing into one does not write into all.
        return Samples(x=x.repeat(1, self.sample_shape[0], 1, 1), y=self._labels[chosen])
