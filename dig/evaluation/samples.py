"""Samples, as ``sample`` and others write them: an npz file or a folder of PNG files, read without belief."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dig.memory import check_memory
from dig.sampling.files import ABOUT
from dig.sampling.folder import read_png
from dig.training.data.base import DataError
from dig.training.data.files import told_by_start

MAX_ABOUT = 2**24
"""Bytes of text that a file may say of itself."""


def read_samples(path: Path) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """The images (N, H, W, 3) of an npz file or a folder of PNG files, and what it says of them ({} if nothing).

    Raises:
        ValueError: It holds no images, is damaged, or more than fits into memory.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        why = "it is no file" if path.exists() else "it does not exist"
        raise DataError(f"cannot read {path}: {why}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "latents.npy" in names:
                raise DataError(f"{path} holds latents; sample again with --vae to get images")
            if "arr_0.npy" not in names:
                raise DataError(f"{path} holds no arr_0; it is no file of samples")
            images = _read_images(path, archive)
            if "arr_1.npy" in names:
                _check_labels(path, archive, len(images))
            return images, _read_about(path, archive) if "about.npy" in names else {}
    except (DataError, MemoryError):
        raise
    except ValueError as error:
        raise DataError(f"cannot read {path}: {error}") from None
    # BadZipFile, zlib's error, EOFError, NotImplementedError, RuntimeError (encrypted), struct's error, OSError, ...
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"cannot read {path}: {reason}{told_by_start(path)}; is it cut off or damaged?") from None


def _read_folder(folder: Path) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """All PNG files of a folder and the folders in it, in the order of their names."""
    paths = sorted(path for path in folder.rglob("*.png") if not path.name.startswith("."))
    if not paths:
        raise DataError(f"{folder} holds no PNG files; python -m dig sample --images writes them")
    images: NDArray[np.uint8] | None = None
    for number, path in enumerate(paths):
        try:
            image = read_png(path)
        # A file's bytes make Pillow's decoders raise nearly anything.
        except Exception as error:
            raise DataError(f"cannot read {path}: {' '.join(str(error).split())[:200]}{told_by_start(path)}") from None
        if images is None:
            total = len(paths) * image.nbytes
            check_memory({f"the images of {folder}": total}, device="cpu", advice="evaluate fewer with --count")
            images = np.empty((len(paths), *image.shape), dtype=np.uint8)
        if image.shape != images.shape[1:]:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (image.shape, images.shape[1:])]
            raise DataError(f"{path} is {sizes[0]}, and {paths[0].name} {sizes[1]}; all must be of one size")
        images[number] = image
    assert images is not None
    about = folder / ABOUT
    try:
        said = _as_object(about.read_bytes()[:MAX_ABOUT], about) if about.is_file() else {}
    except OSError as error:
        raise DataError(f"cannot read {about}: {error.strerror}") from None
    return images, said


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the first axis runs fastest, and type of the array that follows."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"its arrays are of version {version}, which holds no images")


def _read_images(path: Path, archive: zipfile.ZipFile) -> NDArray[np.uint8]:
    info = archive.getinfo("arr_0.npy")
    with archive.open(info) as stream:
        shape, fortran, dtype = _header(stream)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
            raise DataError(f"{path} must hold images as (N, H, W, 3) uint8; got {shape} {dtype}")
        count = math.prod(shape)
        if count == 0:
            raise DataError(f"{path} holds no images: {shape}")
        if info.file_size - stream.tell() != count:
            raise DataError(f"{path} announces {count:,} bytes of images and holds another number; it is damaged")
        total = count * 3 // shape[3]
        check_memory({f"the images of {path}": total}, device="cpu", advice="cut the file into several")
        values = np.empty(count, dtype=np.uint8)
        _fill(values, stream)
    images = values.reshape(shape, order="F" if fortran else "C")
    return images if shape[3] == 3 else images.repeat(3, axis=3)


def _check_labels(path: Path, archive: zipfile.ZipFile, images: int) -> None:
    """Raise DataError unless there is a label for each image."""
    with archive.open("arr_1.npy") as stream:
        shape, _, _ = _header(stream)
    if shape != (images,):
        raise DataError(f"{path} must hold a label (arr_1) for each of its {images:,} images; got {shape}")


def _fill(values: NDArray[np.uint8], stream: IO[bytes]) -> None:
    """Read all of a stream, which must hold just as many bytes; its checksum is compared at its end."""
    done = 0
    while part := stream.read(min(2**24, len(values) - done)):
        values[done : done + len(part)] = np.frombuffer(part, dtype=np.uint8)
        done += len(part)
    if done < len(values):
        raise EOFError("its images are cut off")


def _read_about(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    info = archive.getinfo("about.npy")
    if info.file_size > MAX_ABOUT:
        raise DataError(f"{path} says {info.file_size:,} bytes of itself; it is no file of python -m dig sample")
    with archive.open(info) as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
    if array.dtype.kind != "U" or array.ndim:
        raise DataError(f"what {path} says of itself (about) must be text; got {array.shape} {array.dtype}")
    return _as_object(str(array), path)


def _as_object(text: str | bytes, path: Path) -> dict[str, Any]:
    """What a file says of its samples. Raises DataError where that is no object of JSON."""
    try:
        about = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"what {path} says of itself (about) is no JSON: {error}") from None
    if not isinstance(about, dict):
        raise DataError(f"what {path} says of itself (about) must be an object; got {type(about).__name__}")
    return about


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")
