"""``python -m dig`` with models small enough for a test: ``python -m tests.dig.tiny train ...``.

Any DiG is one of two blocks and width 64 here; everything else is as it is.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import baselines.declared
from baselines.dit import DiT, DiTConfig
from dig import declared, registry
from dig.cli import app
from dig.family import Family
from dig.model import DiG, DiGConfig


def build(size: str, **arguments: Any) -> DiG:
    return DiG(DiGConfig(depth=2, width=64, heads=2, **arguments))


TINY = replace(declared.DIG, build=build)


def build_dit(size: str, **arguments: Any) -> DiT:
    return DiT(DiTConfig(depth=2, width=64, heads=2, **arguments))


TINY_DIT = replace(baselines.declared.DIT, build=build_dit)


@contextmanager
def using(family: Family) -> Iterator[None]:
    """Within, this family is what its name stands for."""
    before = registry.families()[family.name]
    registry._families[family.name] = family
    try:
        yield
    finally:
        registry._families[family.name] = before


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes(), mtime=0))


def make_fashion(folder: Path, train: int = 300, test: int = 100, side: int = 28) -> Path:
    """Idx files as Fashion-MNIST's: bright shapes on black, whose place and size tell the class."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.Generator(np.random.Philox(0))
    for prefix, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % 10
        images = np.zeros((count, side, side), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            top, left = 2 + 2 * (label % 5) + random.integers(3), 3 + 8 * (label // 5) + random.integers(3)
            image[top : top + 6 + label, left : left + 9] = random.integers(120, 256, size=(6 + label, 9))[
                : side - top, : side - left
            ]
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return folder


def make_class_folders(folder: Path, names: tuple[str, ...], each: int = 4, side: int = 32) -> Path:
    """Pictures in colour in a folder a class, no two alike."""
    random = np.random.Generator(np.random.Philox(1))
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = random.integers(256, size=(side, side, 3), dtype=np.uint8)
            pixels[: side // 2] = 20 * label
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def make_vae(folder: Path, halvings: int = 1) -> Path:
    """A VAE of random weights that halves the sides once or more, saved as diffusers saves it."""
    import diffusers

    torch.manual_seed(3)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * (halvings + 1),
        up_block_types=("UpDecoderBlock2D",) * (halvings + 1),
        block_out_channels=(8,) * (halvings + 1),
        norm_num_groups=4,
    )
    model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    with using(TINY):
        app(prog_name="python -m dig")
