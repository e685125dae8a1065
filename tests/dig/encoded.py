"""Latent shards of a few small images, for the tests of encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dig.training.data import encode

SIDE = 16
COUNTS = {"cat": 7, "dog": 6}
OPTIONS: dict[str, Any] = {"image_size": SIDE, "shard_size": 4, "batch_size": 3, "dtype": "fp32"}


def run(images: Path, out: Path, vae: Path, **options: Any) -> Any:
    return list(encode(images, out, **({"vae": str(vae), **OPTIONS} | options)))[-1]


def contents(folder: Path) -> dict[str, bytes]:
    """All but the locks, which stay."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}
