"""Files of samples are not believed: cut, changed, hostile, or something else under their name."""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dig.evaluation.samples import read_samples


def npz(path: Path, **entries: bytes | np.ndarray) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            buffer = io.BytesIO(content if isinstance(content, bytes) else b"")
            if isinstance(content, np.ndarray):
                np.save(buffer, content)
            archive.writestr(f"{name}.npy", buffer.getvalue())
    return path


def header(shape: str, descr: str = "'|u1'", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text.encode()


IMAGES = np.random.default_rng(1).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"arr_0": IMAGES[:0]}, "holds no images"),
        ({"arr_0": IMAGES[:, :0]}, "holds no images"),
        ({"arr_0": IMAGES[..., :2]}, "must hold images as"),
        ({"arr_0": IMAGES.astype(np.int8)}, "must hold images as"),
        ({"arr_0": IMAGES[0]}, "must hold images as"),
        ({"arr_1": np.arange(5)}, "holds no arr_0"),
        ({"latents": IMAGES.astype(np.float32)}, "holds latents"),
        ({"arr_0": b""}, "cannot read"),
        ({"arr_0": b"no array at all"}, "cannot read"),
        ({"arr_0": header("(5, 4, 4, 3)") + bytes(239)}, "announces 240 bytes of images and holds another number"),
        ({"arr_0": header("(5, 4, 4, 3)") + bytes(241)}, "announces 240 bytes of images and holds another number"),
        ({"arr_0": header("(10**15, 4, 4, 3)")}, "cannot read"),
        ({"arr_0": header("(1000000000000000, 4, 4, 3)")}, "holds another number"),
        ({"arr_0": header("(-5, 4, 4, 3)") + bytes(240)}, "announces -240"),
        ({"arr_0": header("(5, 4, 4, 3)", "'|O'")}, "must hold images as"),
        ({"arr_0": header("(5, 4, 4, 3)", "[('a', '|u1')]")}, "must hold images as"),
        ({"arr_0": header("(5, 4, 4, 3)", "'nonsense'")}, "cannot read"),
        ({"arr_0": header("(5, 4, 4, 3)", version=b"\x09\x00")}, "cannot read"),
        ({"arr_0": header("__import__('os').abort()")}, "cannot read"),
        ({"arr_0": IMAGES, "about": np.array("no JSON")}, "is no JSON"),
        ({"arr_0": IMAGES, "about": np.array("[1]")}, "must be an object; got list"),
        ({"arr_0": IMAGES, "about": np.array('{"a": NaN}')}, "is no JSON: NaN"),
        ({"arr_0": IMAGES, "about": np.array("[" * 100_000)}, "is no JSON"),
        ({"arr_0": IMAGES, "about": np.array(7)}, "must be text"),
        ({"arr_0": IMAGES, "about": np.array(["{}"])}, "must be text"),
        ({"arr_0": IMAGES, "about": np.array(b"{}")}, "must be text"),
    ],
)
def test_hostile_arrays(tmp_path: Path, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_samples(npz(tmp_path / "s.npz", **entries))
    assert "s.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"<html></html>", "it is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x93NUMPY\x01\x00", "it is an .npy array"),
        (b"PK\x03\x04" + bytes(100), "it is a zip archive"),
        (b"\x1f\x8b", "compressed with gzip"),
    ],
)
def test_other_files_under_the_name_of_samples(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read .*s\.npz: .*{message}"):
        read_samples(tmp_path / "s.npz")


@pytest.mark.parametrize("compressed", [False, True])
def test_cut_and_changed_files_of_samples(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "s.npz"
    (np.savez_compressed if compressed else np.savez)(path, arr_0=IMAGES)
    assert np.array_equal(read_samples(path)[0], IMAGES)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cannot read .*s\.npz"):
            read_samples(path)
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=r"s\.npz"):
        read_samples(path)


def test_places_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place, message in (
        (tmp_path, "holds no PNG files"),
        (tmp_path / "pipe", "it is no file"),
        (tmp_path / "x", "not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            read_samples(place)


def test_either_order_of_axes_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", arr_0=np.asfortranarray(IMAGES))
    assert np.array_equal(read_samples(tmp_path / "s.npz")[0], IMAGES)


def test_more_samples_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "s.npz", arr_0=IMAGES)
    monkeypatch.setattr("dig.memory.available_memory", lambda device: 239)
    with pytest.raises(ValueError, match="cut the file into several"):
        read_samples(tmp_path / "s.npz")
