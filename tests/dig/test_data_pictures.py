"""Every kind of pixel that an image file may hold, sizes that ask for too much, and files that are something else."""

from __future__ import annotations

import errno
import logging
import math
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from dig.training.data import DataError, ImageFolder, crop, open_dataset
from dig.training.data.crop import center_crop
from dig.training.data.files import shown, told_by_start
from dig.training.data.pictures import _eight_bits
from tests.dig.test_data_images import make_folder

RAMP = np.arange(256).reshape(16, 16)
"""Every grey level once, in a square of the size that it is read at, so that cropping changes nothing."""


def read(path: Path, channels: int = 1) -> np.ndarray:
    """The grey levels (16, 16) that a data set reads from the one image of a class; all channels are the same."""
    x = ImageFolder(path.parent.parent, image_size=16, channels=channels).fetch_readable(np.zeros(1, dtype=np.int64)).x
    levels = ((x[0].numpy() + 1) * 127.5).round().astype(int)
    assert (levels == levels[:1]).all()
    return levels[0]


def reason(path: Path) -> str:
    (why,) = (
        ImageFolder(path.parent.parent, image_size=16).fetch_readable(np.zeros(1, dtype=np.int64)).unreadable.items()
    )
    assert why[0] == f"a/{path.name}"
    return why[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data" / "a").mkdir(parents=True)
    return tmp_path / "data" / "a"


def write_tiff(
    path: Path, data: bytes, *, bits: int, white_is_zero: bool = False, kind: int = 1, order: str = "<"
) -> Path:
    """A bare grey TIFF of 16 x 16; ``kind`` is 1 for unsigned, 2 for signed, 3 for floating-point numbers."""
    entries = [(256, 3, 16), (257, 3, 16), (258, 3, bits), (259, 3, 1), (262, 3, 0 if white_is_zero else 1)]
    entries += [(273, 4, 8), (277, 3, 1), (278, 3, 16), (279, 4, len(data)), (339, 3, kind)]
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data)) + data
    table = struct.pack(f"{order}H", len(entries))
    for tag, size, value in entries:
        table += struct.pack(f"{order}HHI", tag, size, 1)
        table += struct.pack(f"{order}HH", value, 0) if size == 3 else struct.pack(f"{order}I", value)
    path.write_bytes(head + table + bytes(4))
    return path


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled(folder: Path, suffix: str, channels: int) -> None:
    Image.fromarray((RAMP * 257).astype(np.uint16)).save(folder / f"x.{suffix}")
    assert (read(folder / f"x.{suffix}", channels) == RAMP).all()


def test_eight_bits_with_a_sign_are_refused_by_name(folder: Path) -> None:
    path = write_tiff(folder / "x.tif", RAMP.astype(np.uint8).tobytes(), bits=8, kind=2)
    assert "signed integers" in reason(path)
    assert (read(write_tiff(path, RAMP.astype(np.uint8).tobytes(), bits=8)) == RAMP).all()


def test_sixteen_bits_are_rounded(folder: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 2**16, (16, 16), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "x.png")
    assert (read(folder / "x.png") == np.floor(deep / 257 + 0.5)).all()


def test_other_depths_are_scaled_by_their_format(folder: Path) -> None:
    """A PGM names its white, a TIFF its bits, and which end is white."""
    pgm = folder / "x.pgm"
    pgm.write_bytes(b"P5 16 16 1023\n" + (RAMP * 1023 // 255).astype(">u2").tobytes())
    assert (read(pgm) == RAMP).all()
    pgm.unlink()
    deep = RAMP.astype(np.uint16) * 257
    tiff = folder / "x.tif"
    assert (read(write_tiff(tiff, deep.astype(">u2").tobytes(), bits=16, order=">")) == RAMP).all()
    inverted = (65535 - deep).astype("<u2").tobytes()
    assert (read(write_tiff(tiff, inverted, bits=16, white_is_zero=True)) == RAMP).all()
    twelve = (RAMP * 4095 // 255).ravel()
    pairs = zip(twelve[::2], twelve[1::2], strict=True)
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    assert (read(write_tiff(tiff, packed, bits=12)) == RAMP).all()


@pytest.mark.parametrize(
    ("data", "bits", "kind", "word"),
    [
        ((RAMP / 255).astype("<f4"), 32, 3, "floating-point"),
        ((RAMP * 2**23).astype("<i4"), 32, 2, "32-bit or signed"),
        ((RAMP * 2**24).astype("<u4"), 32, 1, "32-bit or signed"),
        ((RAMP * 128).astype("<i2"), 16, 2, "32-bit or signed"),
    ],
)
def test_pixels_without_a_white_are_refused_by_name(
    folder: Path, data: np.ndarray, bits: int, kind: int, word: str
) -> None:
    path = write_tiff(folder / "x.tif", data.tobytes(), bits=bits, kind=kind)
    assert word in reason(path)
    assert "convert it to 8 or 16 bits" in reason(path)


def test_float_pgm_is_refused(folder: Path) -> None:
    (folder / "x.pgm").write_bytes(b"Pf\n16 16\n-1.0\n" + (RAMP / 255).astype("<f4").tobytes())
    assert "floating-point" in reason(folder / "x.pgm")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *((mode, "png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *((mode, "tif") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")),
    ],
)
def test_every_mode_keeps_its_levels(folder: Path, mode: str, suffix: str, channels: int) -> None:
    levels = np.where(RAMP > 127, 255, 0) if mode == "1" else RAMP
    grey = Image.fromarray(levels.astype(np.uint8))
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(grey.convert("RGB"), *profiles, outputMode="LAB")
        assert image is not None
    else:
        image = (grey.convert("RGB") if mode in ("RGBX", "CMYK", "YCbCr") else grey).convert(mode)
    image.save(folder / f"x.{suffix}")
    x = ImageFolder(folder.parent, image_size=16, channels=channels)[0][0]
    assert np.abs(((x.numpy() + 1) * 127.5).round() - levels).max() <= (2 if mode in ("LAB", "YCbCr") else 0)


@pytest.mark.parametrize("mode", ["La", "RGBa", "HSV", "PA"])
@pytest.mark.parametrize("wanted", ["L", "RGB"])
def test_modes_that_pillow_makes_while_it_reads(mode: str, wanted: str) -> None:
    """Of those multiplied with their transparency, the colour before."""
    image = Image.new(mode, (2, 2), {"La": (50, 128), "RGBa": (50, 50, 50, 128), "HSV": (0, 0, 100), "PA": 0}[mode])
    found = np.asarray(_eight_bits(image, wanted)).astype(int)
    assert np.abs(found - (0 if mode == "PA" else 100)).max() <= 1


def test_transparency_is_dropped_as_published_code_does(folder: Path) -> None:
    """ADM and DiT call ``convert("RGB")``: the colour beneath stays. No warning for palettes with transparency."""
    colour = Image.new("RGBA", (16, 16), (200, 100, 50, 0))
    colour.putpixel((0, 0), (1, 2, 3, 255))
    colour.save(folder / "0.png")
    colour.quantize(4).save(folder / "1.png", transparency=bytes([0, 128, 255, 255]))
    Image.fromarray(RAMP.astype(np.uint8)).save(folder / "2.png", transparency=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ImageFolder(folder.parent, image_size=16).fetch_readable(np.arange(3)).x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x, path in zip(found, sorted(folder.iterdir()), strict=True):
            with Image.open(path) as image:
                expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
            assert (((x.numpy() + 1) * 127.5).round() == expected).all()


def test_first_frame_and_no_turning(folder: Path) -> None:
    """Of an animation the first frame; the orientation tag of cameras is ignored."""
    frames = [Image.fromarray(np.full((16, 16), level, dtype=np.uint8)) for level in (40, 200)]
    frames[0].save(folder / "x.png", save_all=True, append_images=frames[1:])
    assert (read(folder / "x.png") == 40).all()
    (folder / "x.png").unlink()
    turned = Image.fromarray(RAMP.astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "x.png", exif=exif)
    assert (read(folder / "x.png") == RAMP).all()


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 50_000)])
def test_thin_images_are_cut_before_they_are_scaled(
    folder: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "x.png")
    made: list[int] = []
    scale = Image.Image.resize

    def noted(image: Image.Image, to: tuple[int, int], *given: Any, **named: Any) -> Image.Image:
        made.append(math.prod(to))
        return scale(image, to, *given, **named)

    monkeypatch.setattr(Image.Image, "resize", noted)
    x = ImageFolder(folder.parent, image_size=256)[0][0]
    assert made == [256 * 256]  # Scaled whole, the first has 4 billion pixels: 15.7 GiB, and 88 s.
    assert x.shape == (3, 256, 256)
    # One pixel of the long axis is 256 of the crop, whose middle is the image's.
    if 1 in size:
        levels = (x[0].numpy() + 1) * 127.5
        across = levels[:, 0] if size[0] > 1 else levels[0]
        assert (levels == (across[:, None] if size[0] > 1 else across[None])).all()
        # From the centre of pixel 29,999 to that of 30,000.
        assert np.abs(across[[0, -1]] - pixels.ravel()[29_999:30_001]).max() <= 2


@pytest.mark.parametrize("size", [(3, 200), (200, 3), (7, 333), (5, 1001), (37, 999), (4000, 70), (64, 4000), (1, 2)])
@pytest.mark.parametrize("side", [16, 33])
def test_cutting_first_changes_rounding_alone(
    size: tuple[int, int], side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    whole = np.asarray(center_crop(Image.fromarray(pixels), side)).astype(int)
    monkeypatch.setattr(crop, "MAX_SCALED_PIXELS", 0)
    cut = np.asarray(center_crop(Image.fromarray(pixels), side)).astype(int)
    assert np.abs(whole - cut).max() <= 2


def test_decompression_bombs_are_unreadable_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (40, 40)).save(folder / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    assert "exceeds limit" in reason(folder / "x.png")
    # Below twice the limit Pillow warns only. In a process of its own: pytest shows every warning.
    code = (
        "import sys; from PIL import Image; Image.MAX_IMAGE_PIXELS = 1000; from dig.training.data import ImageFolder; "
        "print(ImageFolder(sys.argv[1], image_size=16)[0][0].shape)"
    )
    command = [sys.executable, "-c", code, str(folder.parent)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("torch.Size([3, 16, 16])\n", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n", "a Git-LFS pointer: git lfs pull"),
        (b"\n<!DOCTYPE html><title>404</title>", "an HTML page: the download went wrong"),
        (b"", "it is empty"),
        (bytes(300), "begins with zeros"),
        (b"PK\x03\x04zip", "a zip archive"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_what_a_file_is_instead(folder: Path, content: bytes, message: str) -> None:
    (folder / "x.png").write_bytes(content)
    assert message in reason(folder / "x.png")


def test_pipes_links_and_lost_files_are_unreadable(folder: Path) -> None:
    os.mkfifo(folder / "x.png")
    assert reason(folder / "x.png") == "not an ordinary file"
    (folder / "x.png").unlink()
    (folder / "x.png").symlink_to(folder / "nothing")
    assert reason(folder / "x.png") == "No such file or directory"


def test_files_that_are_left_out_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder(tmp_path / "data", {"a": 3, "b": 2})
    with caplog.at_level(logging.WARNING):
        open_dataset(root, image_size=8)
    assert not caplog.records
    for name in ("a/x.gif", "a/y.GIF", "b/z.avif", "b/notes.txt", "b/plain", "loose.gif"):
        (root / name).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        data = open_dataset(root, image_size=8)
    assert len(data) == 5
    (record,) = caplog.records
    assert record.getMessage().startswith(f"left out of {root}, because of names that do not end like an image's: 6 (")
    assert "(.gif: 3, .txt: 1, no suffix: 1, .avif: 1), such as loose.gif, a/x.gif, a/y.GIF;" in record.getMessage()


def test_a_class_of_other_suffixes_alone_says_which_are_read(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"a": 1, "b": 0})
    (root / "b" / "x.gif").write_bytes(b"")
    with pytest.raises(DataError, match=r"classes without images in .*: b; add images \(names that end in \.bmp, "):
        ImageFolder(root)


@pytest.mark.parametrize("name", ["new\nline", "escape\x1b[31m", b"latin-\xe9"])
def test_class_names_that_cannot_be_printed_are_refused(tmp_path: Path, name: str | bytes) -> None:
    root = make_folder(tmp_path / "data", {"a": 1})
    os.rename(root / "a", os.path.join(os.fsencode(root), os.fsencode(name)))
    with pytest.raises(DataError, match="has a name that cannot be printed") as caught:
        ImageFolder(root)
    assert str(caught.value).isprintable()


def test_other_class_names_are_kept(tmp_path: Path) -> None:
    names = {"a\xa0b", "👩\u200d🔬", "[x", "é", "日本", " ", "a,b", "null"}
    assert set(ImageFolder(make_folder(tmp_path / "data", dict.fromkeys(names, 1))).class_names) == names


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_what_the_machine_lacks_is_not_blamed_on_the_file(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replacing it would make the run unrepeatable."""

    def fails(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("dig.training.data.folder.read_pixels", fails)
    data = ImageFolder(make_folder(tmp_path / "data", {"a": 2}), image_size=8)
    with pytest.raises(DataError, match=r"cannot read .*a/0\.png at the moment: (Too many open|not enough memory)"):
        data.fetch_readable(np.arange(2))


def test_names_are_shown_without_what_moves_the_cursor(tmp_path: Path) -> None:
    assert shown("a[b]é/x.png") == "a[b]é/x.png"
    assert shown("a\n\x1b[2J\udce9") == r"a\n\x1b[2J\udce9"
    assert told_by_start(tmp_path) == "; it is no ordinary file"
    assert told_by_start(tmp_path / "none") == ""


def test_readable_ones_alone(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"a": 3, "b": 2})
    (root / "a" / "1.png").write_bytes(b"junk")
    data = ImageFolder(root, image_size=8)
    found = data.fetch_readable(np.arange(5))
    assert list(found.unreadable) == ["a/1.png"]
    assert found.y.tolist() == [0, 0, 1, 1]
    assert torch.equal(found.x[1], data[2][0])
    for path in root.glob("*/*"):
        path.write_bytes(b"")
    none = ImageFolder(root, image_size=8).fetch_readable(np.arange(5))
    assert none.x.shape == (0, 3, 8, 8)
    assert len(none.unreadable) == 5


def test_sizes_beyond_the_memory_are_refused_first(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"a": 1})
    with pytest.raises(ValueError, match=r"GiB are needed \(an image of 9999999x9999999 .* choose a smaller"):
        ImageFolder(root, image_size=9_999_999)
