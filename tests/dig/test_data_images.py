"""Crops, class folders, idx files, and telling them apart."""

from __future__ import annotations

import gzip
import itertools
import math
import multiprocessing
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dig.training.data import DataError, DataOrder, IdxImages, ImageFolder, Loader, open_dataset
from dig.training.data.crop import center_crop
from dig.training.data.folder import MAX_UNREADABLE_RUN


def box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def cubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resize_rows(pixels: np.ndarray, size: int, kernel: object, support: float) -> np.ndarray:
    """Resample axis 0 by the definition: a kernel stretched by the scale where it shrinks, weights summing to 1."""
    length = len(pixels)
    scale = length / size
    stretch = max(scale, 1.0)
    out = np.empty((size, *pixels.shape[1:]))
    for i in range(size):
        center = (i + 0.5) * scale
        first = max(0, int(center - support * stretch + 0.5))
        last = min(length, int(center + support * stretch + 0.5))
        weights = np.array([kernel((j + 0.5 - center) / stretch) for j in range(first, last)])  # type: ignore[operator]
        out[i] = np.tensordot(weights / weights.sum(), pixels[first:last].astype(float), 1)
    return np.clip(np.floor(out + 0.5), 0, 255)


def resize(pixels: np.ndarray, rows: int, columns: int, kernel: object, support: float) -> np.ndarray:
    narrow = resize_rows(pixels.swapaxes(0, 1), columns, kernel, support).swapaxes(0, 1)
    return resize_rows(narrow, rows, kernel, support)


def slow_crop(pixels: np.ndarray, side: int) -> np.ndarray:
    while min(pixels.shape[:2]) >= 2 * side:
        pixels = resize(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, box, 0.5)
    scale = side / min(pixels.shape[:2])
    pixels = resize(pixels, round(pixels.shape[0] * scale), round(pixels.shape[1] * scale), cubic, 2.0)
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (23, 61), (77, 35), (9, 12), (32, 32), (15, 130)])
def test_crop_is_adms(size: tuple[int, int]) -> None:
    """The definition, but for ties: Pillow rounds its weights to 22 bits, and each pass rounds to whole grey levels."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = np.asarray(center_crop(Image.fromarray(pixels), 16)).astype(int)
    assert ours.shape == (16, 16, 3)
    error = np.abs(ours - slow_crop(pixels, 16))
    assert error.max() <= 2
    assert error.mean() < 0.2


def make_folder(root: Path, counts: dict[str, int], side: int = 12) -> Path:
    draw = np.random.default_rng(1)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = draw.integers(0, 256, (side, side + 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_folder_lists_in_order_and_reads(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"b": 2, "a": 3})
    (root / "README.txt").write_text("not an image")
    (root / "a" / ".hidden.png").write_bytes(b"")
    data = ImageFolder(root, image_size=8)
    assert data.class_names == ("a", "b")
    assert [data.file_name(i) for i in range(len(data))] == ["a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.png"]
    x, y = data[3]
    assert y == 1
    assert x.shape == (3, 8, 8)
    assert x.dtype == torch.float32
    with Image.open(root / "b" / "0.png") as image:
        expected = np.asarray(center_crop(image, 8)).transpose(2, 0, 1) / 127.5 - 1
    assert np.allclose(x.numpy(), expected, atol=1e-6)
    turned = data.fetch(np.array([3, 3]), np.array([True, False])).x
    assert torch.equal(turned[0], x.flip(-1))
    assert torch.equal(turned[1], x)
    assert ImageFolder(root, image_size=8, channels=1)[0][0].shape == (1, 8, 8)


def test_grey_palette_and_alpha_images_become_rgb(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for i, mode in enumerate(("L", "P", "RGBA", "CMYK", "1")):
        Image.new(mode, (9, 9)).save(tmp_path / "c" / f"{i}.{'tiff' if mode == 'CMYK' else 'png'}")
    data = ImageFolder(tmp_path, image_size=8)
    samples = data.fetch(np.arange(5), np.zeros(5, dtype=bool))
    assert samples.x.shape == (5, 3, 8, 8)
    assert not samples.unreadable


def test_wrong_layouts_are_named(tmp_path: Path) -> None:
    flat = make_folder(tmp_path / "flat", {"x": 1}) / "x"
    with pytest.raises(DataError, match=r"images \(0\.png\) but no class folders"):
        open_dataset(flat)
    mixed = make_folder(tmp_path / "mixed", {"a": 1})
    Image.new("RGB", (4, 4)).save(mixed / "stray.JPEG")
    with pytest.raises(DataError, match=r"beside its class folders \(stray\.JPEG\)"):
        ImageFolder(mixed)
    empty = make_folder(tmp_path / "empty", {"a": 1, "b": 0, "c": 0})
    with pytest.raises(DataError, match=r"classes without images in .*empty: b, c;"):
        ImageFolder(empty)
    make_folder(tmp_path / "nested" / "train", {"a": 1})
    with pytest.raises(DataError, match=r"hold folders \(train/a\).*did you mean .*nested/train\?"):
        open_dataset(tmp_path / "nested")
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is a file"):
        open_dataset(mixed / "stray.JPEG")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"neither class folders .* nor idx files .* nor latent shards"):
        open_dataset(tmp_path / "text")


def spoil(root: Path) -> None:
    """a/1: text; a/2: cut off; b/1 (the last): empty."""
    (root / "a" / "1.png").write_text("no image")
    whole = (root / "a" / "2.png").read_bytes()
    (root / "a" / "2.png").write_bytes(whole[: len(whole) // 2])
    (root / "b" / "1.png").write_bytes(b"")


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_counted_logged_once_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    root = make_folder(tmp_path / "data", {"a": 4, "b": 2})
    spoil(root)
    data = ImageFolder(root, image_size=8, mirror=False)
    for bad, stand_in in ((1, 3), (2, 3), (5, 0)):
        x, y = data[bad]
        expected, label = data[stand_in]
        assert torch.equal(x, expected)
        assert y == label
    with Loader(ImageFolder(root, image_size=8), DataOrder(length=6, batch_size=4), workers=workers) as loader:
        for _ in range(6):
            next(loader)
        assert sorted(loader.unreadable) == ["a/1.png", "a/2.png", "b/1.png"]
    warned = [record.getMessage() for record in caplog.records if "cannot read" in record.getMessage()]
    assert len(warned) == 3
    assert any("a/1.png" in message and "(not an image" in message for message in warned)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_lost_disk_ends_the_run_by_name(tmp_path: Path, workers: int) -> None:
    root = make_folder(tmp_path / "data", {"a": 1})
    for i in range(MAX_UNREADABLE_RUN + 20):
        (root / "a" / f"z{i:03d}.png").write_bytes(b"junk")
    loader = Loader(
        ImageFolder(root, image_size=8), DataOrder(length=MAX_UNREADABLE_RUN + 21, batch_size=8), workers=workers
    )
    with pytest.raises(DataError, match=r"^100 images one after the other cannot be read, from .*z\d+\.png on"):
        list(itertools.islice(loader, 100))
    assert not multiprocessing.active_children()


def test_all_unreadable_ends(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"a": 2})
    for path in root.glob("a/*"):
        path.write_bytes(b"junk")
    with pytest.raises(DataError, match="2 images one after the other"):
        ImageFolder(root)[1]


def idx_bytes(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray, prefix: str = "train", zipped: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    for stem, values in (("images-idx3", images), ("labels-idx1", labels)):
        content = idx_bytes(values)
        name = f"{prefix}-{stem}-ubyte"
        (folder / (name + (".gz" if zipped else ""))).write_bytes(gzip.compress(content) if zipped else content)
    return folder


IMAGES = np.random.default_rng(2).integers(0, 256, (7, 28, 28), dtype=np.uint8)
LABELS = np.array([3, 1, 4, 1, 5, 9, 2], dtype=np.uint8)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_idx_reads_pads_and_repeats(tmp_path: Path, zipped: bool, channels: int) -> None:
    folder = write_idx(tmp_path / "idx", IMAGES, LABELS, "t10k", zipped)
    data = open_dataset(folder, split="test", channels=channels, image_size=None)
    assert isinstance(data, IdxImages)
    assert len(data) == 7
    assert data.class_names == tuple("0123456789")
    assert not data.mirror
    expected = np.full((7, channels, 32, 32), -1.0)
    expected[:, :, 2:30, 2:30] = IMAGES[:, None] / 127.5 - 1
    samples = data.fetch(np.arange(7), np.zeros(7, dtype=bool))
    assert np.allclose(samples.x.numpy(), expected, atol=1e-6)
    assert samples.x.max() <= 1
    assert samples.y.tolist() == LABELS.tolist()
    turned = data.fetch(np.arange(7), np.ones(7, dtype=bool)).x
    assert torch.equal(turned, samples.x.flip(-1))
    with pytest.raises(DataError, match="has no train-images-idx3-ubyte"):
        IdxImages(folder, split="train")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: raw[:-5], "is damaged or cut off"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:-1]), r"7 x 28 x 28 = 5,488 values but holds 5,487"),
        (lambda raw: gzip.decompress(raw) + b"x", r"but holds 5,489"),
        (lambda raw: b"GIF89a" + raw, "is no idx file"),
        (lambda raw: b"", "is no idx file"),
        (lambda raw: b"\0\0\x0d\x03" + bytes(12), "type 0x0d"),
        (lambda raw: b"\0\0\x08\x01" + bytes(4), "1 dimensions; grey images have 3"),
        (lambda raw: b"\0\0\x08\x03" + bytes(4), "cut off inside its header"),
        (lambda raw: b"\0\0\x08\x03" + bytes(12), "7 labels"),
        (lambda raw: raw[:12] + bytes(40) + raw[52:], "is damaged or cut off"),
        (lambda raw: raw + b"<html>", "is damaged or cut off"),
        (lambda raw: b"<!DOCTYPE html>", r"is no idx file.*; it is an HTML page: the download went wrong"),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", r"; it is a Git-LFS pointer: git lfs pull"),
        (lambda raw: b"\0\0\x08\x03" + b"\xff" * 12, r"GiB are needed \(.*4294967295 x 4294967295 x 4294967295"),
    ],
)
def test_spoilt_idx_is_refused(tmp_path: Path, spoil: object, message: str) -> None:
    folder = write_idx(tmp_path / "idx", IMAGES, LABELS)
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(spoil(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message) as caught:
        open_dataset(folder)
    assert path.name in str(caught.value)


def test_idx_sizes_that_cannot_be(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "idx", IMAGES, LABELS)
    for size in (0, -5):
        with pytest.raises(ValueError, match="image_size must be a whole number, at least 1"):
            IdxImages(folder, image_size=size)
    with pytest.raises(ValueError, match=r"GiB are needed \(7 images, padded to 9999999x9999999"):
        IdxImages(folder, image_size=9_999_999)


def test_idx_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "idx", IMAGES, LABELS[:-1])
    with pytest.raises(DataError, match=r"holds 7 images but .* 6 labels"):
        IdxImages(folder)
    write_idx(folder, IMAGES, LABELS)
    with pytest.raises(DataError, match="larger than image_size 16"):
        IdxImages(folder, image_size=16)
    with pytest.raises(DataError, match="label 9, but there are only 2 class names"):
        IdxImages(folder, class_names=("cat", "dog"))
    with pytest.raises(DataError, match=r"idx files, for which in_memory, verify cannot be chosen"):
        open_dataset(folder, verify=True, in_memory=True)


def test_describe(tmp_path: Path) -> None:
    data = IdxImages(write_idx(tmp_path / "idx", IMAGES, LABELS))
    assert data.describe().endswith("7 samples of 1x32x32, 10 classes, never mirrored")
    assert math.isclose(float(data[0][0].min()), -1)
