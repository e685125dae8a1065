"""Latent shards: what a folder of them says of itself, in a record a shard and an index.

A folder of shards holds, for each shard k, ``shard-0000k.safetensors`` and its record ``shard-0000k.json``, and, once
all are there, ``index.json``, which joins the records. A shard's tensors are ``latents`` and ``mirrored``, both
(n, C, h, w) and scaled already, and ``labels`` and ``sources``, (n,) int64: the label and the place in the listing of
each image.

Shapes: n images of a shard; C, h, w channels, rows and columns of a latent.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from dig.training.data.base import DataError
from dig.training.data.checks import check_between, check_names, check_sha256, check_shape, check_whole
from dig.training.data.files import told_by_start

SCHEMA = 1
INDEX_NAME = "index.json"
LATENT_SCALE = 0.18215
"""Multiplied with a latent of Stable Diffusion's VAE, so that its values have about unit variance (Rombach et al.)."""
SCALES = (1e-3, 1e3)
"""Between these lie the scales of latents, one over their standard deviation: beyond, data or its noise is nothing."""

Storage = Literal["fp16", "bf16", "fp32"]
STORAGE_DTYPES: dict[Storage, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

REDO = "run encode again with the same options: it redoes what is missing or damaged"


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What the latents are: two folders with equal encodings hold the same latents.

    Attributes:
        listing_sha256: Of the encoded files, names in order and contents, as far as `dig.training.identity` reads
            them.
        images: How many files were listed.
        class_names: Name of each label.
        image_size: Side of the cropped images in pixels.
        vae: The VAE as the user named it; the same weights under another name are the same encoding.
        vae_sha256: Of its weights.
        scale: What the sampled latents were multiplied with.
        dtype: How the latents are stored.
        seed: Of the sampling.
        shard_size: Images a shard, the last one's fewer; unreadable ones count.
    """

    listing_sha256: str
    images: int
    class_names: tuple[str, ...]
    image_size: int
    vae: str = field(compare=False)
    vae_sha256: str
    scale: float
    dtype: Storage
    seed: int
    shard_size: int

    def __post_init__(self) -> None:
        """Raise ValueError on a field that no encoding may have; fields may come from a file."""
        _as_tuple(self, "class_names")
        if self.dtype not in get_args(Storage):
            raise ValueError(f"dtype must be one of {', '.join(get_args(Storage))}; got {self.dtype!r}")
        for name in ("images", "image_size", "shard_size"):
            check_whole(name, getattr(self, name), least=1)
        check_whole("seed", self.seed, least=0)
        check_between("scale", self.scale, *SCALES)
        check_names("class_names", self.class_names)
        check_names("vae", (self.vae,))
        check_sha256("listing_sha256", self.listing_sha256)
        check_sha256("vae_sha256", self.vae_sha256)

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.images // self.shard_size)

    def sources(self, number: int) -> range:
        """Places in the listing of the images of a shard, the unreadable ones too."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, self.images))

    def differences(self, other: Encoding) -> list[str]:
        """``name: ours, theirs`` of every field that differs."""
        names = [entry.name for entry in dataclasses.fields(self) if entry.compare]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name}: {str(a)[:60]}, {str(b)[:60]}" for name, a, b in pairs if a != b]


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One finished shard.

    Attributes:
        file: Name of the shard's file.
        count: Images in it.
        shape: (C, h, w) of a latent.
        sha256: Of the file.
        unreadable: File name → reason, of the images that are missing from it.
    """

    file: str
    count: int
    shape: tuple[int, int, int]
    sha256: str
    unreadable: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError on a field that no shard may have; fields may come from a file."""
        _as_tuple(self, "shape")
        check_whole("count", self.count, least=0)
        check_shape("shape", self.shape)
        check_sha256("sha256", self.sha256)
        bad: Any = self.unreadable
        if not isinstance(bad, dict) or not all(isinstance(word, str) for pair in bad.items() for word in pair):
            raise ValueError(f"unreadable must name files and reasons; got {str(bad)[:60]}")


def _as_tuple(record: Encoding | ShardRecord, name: str) -> None:
    """Take a list, as JSON gives it."""
    value = getattr(record, name)
    object.__setattr__(record, name, tuple(value) if isinstance(value, list) else value)


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def record_name(number: int) -> str:
    """File name of a shard's record."""
    return f"shard-{number:05d}.json"


def to_json(encoding: Encoding, records: list[ShardRecord]) -> bytes:
    """A record (of one shard) or the index (of all), as JSON; equal content gives equal bytes."""
    content = {
        "schema": SCHEMA,
        "count": sum(record.count for record in records),
        "encoding": dataclasses.asdict(encoding),
        "shards": [dataclasses.asdict(record) for record in records],
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def read_json(path: Path, numbers: range | None = None) -> tuple[Encoding, list[ShardRecord]]:
    """Read what `to_json` wrote.

    Args:
        path: The file.
        numbers: The shards that it must speak of. Default: all of the encoding.

    Raises:
        DataError: The file cannot be read, is something else, or contradicts itself.
    """
    try:
        content: Any = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise TypeError("it holds no object")
        if content["schema"] != SCHEMA:
            raise DataError(f"{path} has the schema {content['schema']!r}, this version reads {SCHEMA}; encode again")
        encoding = Encoding(**content["encoding"])
        records = [ShardRecord(**record) for record in content["shards"]]
        _check_records(encoding, records, range(encoding.shards) if numbers is None else numbers, content["count"])
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        told = told_by_start(path) if isinstance(error, ValueError) else ""
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(f"{path} is not an index of latent shards{told} ({why}); remove it, and {REDO}") from None
    return encoding, records


def _check_records(encoding: Encoding, records: list[ShardRecord], numbers: range, count: object) -> None:
    """Raise ValueError where records don't fit the encoding, each other, or their sum."""
    if len(records) != len(numbers):
        raise ValueError(f"it lists {len(records)} shards instead of {len(numbers)}")
    for number, record in zip(numbers, records, strict=True):
        if record.file != shard_name(number):
            raise ValueError(f"shard {number} is {shard_name(number)}; got {str(record.file)[:60]!r}")
        there, listed = record.count + len(record.unreadable), len(encoding.sources(number))
        if there != listed:
            raise ValueError(f"{record.file} accounts for {there} images of {listed}")
        if record.shape != records[0].shape:
            raise ValueError(f"{record.file} holds {record.shape}, but {records[0].file} {records[0].shape}")
    if isinstance(count, bool) or count != sum(record.count for record in records):
        raise ValueError(f"count must be the sum of the shards'; got {str(count)[:60]}")


def holds_latents(folder: Path) -> bool:
    """Whether a folder was written by encode, finished or not."""
    return (folder / INDEX_NAME).is_file() or any(folder.glob("shard-*.json"))


def join_records(folder: Path) -> tuple[Encoding, list[ShardRecord]]:
    """The encoding and the records of all shards, from the records alone.

    Raises:
        DataError: Shards are missing or of different encodings.
    """
    found = sorted(folder.glob("shard-*.json"))
    if not found:
        raise DataError(f"{folder} holds no latent shards")
    encoding, _ = read_record(folder, _number(found[0]))
    records: list[ShardRecord] = []
    for number in range(encoding.shards):
        path = folder / record_name(number)
        if not path.is_file():
            raise DataError(f"{folder} is not finished: {len(found)} of {encoding.shards} shards are there; {REDO}")
        theirs, record = read_record(folder, number)
        if theirs != encoding:
            raise DataError(f"{path} is of another encoding ({'; '.join(encoding.differences(theirs))}); {REDO}")
        if records and record.shape != records[0].shape:
            raise DataError(f"{path} is of latents of another shape than {records[0].file}; remove it, and {REDO}")
        records.append(record)
    return encoding, records


def read_record(folder: Path, number: int) -> tuple[Encoding, ShardRecord]:
    """The record of one shard.

    Raises:
        DataError: See `read_json`.
    """
    encoding, (record,) = read_json(folder / record_name(number), range(number, number + 1))
    return encoding, record


def _number(path: Path) -> int:
    """Of the shard that a record is of, by its name."""
    found = re.fullmatch(r"shard-(\d{5,9})\.json", path.name)
    if found is None:
        raise DataError(f"{path} has not the name of a shard's record; remove it")
    return int(found.group(1))


def read_index(folder: Path) -> tuple[Encoding, list[ShardRecord]]:
    """The index of a folder; where several ranks wrote it and none joined the records, they are joined here.

    Raises:
        DataError: There is no index, or see `join_records`.
    """
    path = folder / INDEX_NAME
    return read_json(path) if path.is_file() else join_records(folder)
