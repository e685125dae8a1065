"""Latent shards: what they hold, their index, and reading them.

A folder of shards holds, for each shard k, ``shard-0000k.safetensors`` and its record ``shard-0000k.json``, and, once
all are there, ``index.json``, which joins the records. A shard's tensors are ``latents`` and ``mirrored``, both
(n, C, h, w) and scaled already, and ``labels`` and ``sources``, (n,) int64: the label and the place in the listing of
each image.

Shapes: n images of a shard; C, h, w channels, rows and columns of a latent; B samples.
"""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dig.training.data.base import DataError, DataSet, Samples
from dig.training.data.files import sha256_of

SCHEMA = 1
INDEX_NAME = "index.json"
LATENT_SCALE = 0.18215
"""Multiplied with a latent of Stable Diffusion's VAE, so that its values have about unit variance (Rombach et al.)."""

Storage = Literal["fp16", "bf16", "fp32"]
STORAGE_DTYPES: dict[Storage, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

MAX_BYTES_IN_MEMORY = 4 * 2**30
"""Shards of at most so many bytes in all are held in RAM unless the caller says otherwise."""

_REDO = "run encode again with the same options: it redoes what is missing or damaged"


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What the latents are: two folders with equal encodings hold the same latents.

    Attributes:
        listing_sha256: Of the names of the encoded files, in order.
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
        """Raise ValueError on a field that no encoding may have."""
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.dtype not in get_args(Storage):
            raise ValueError(f"dtype must be one of {', '.join(get_args(Storage))}; got {self.dtype!r}")
        for name in ("images", "image_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative; got {self.seed}")

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.images // self.shard_size)

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
        """Take the shape as JSON gives it."""
        object.__setattr__(self, "shape", tuple(self.shape))


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


def read_json(path: Path) -> tuple[Encoding, list[ShardRecord]]:
    """Read what `to_json` wrote.

    Raises:
        DataError: The file cannot be read or is something else.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        if content["schema"] != SCHEMA:
            raise DataError(f"{path} has the schema {content['schema']!r}, this version reads {SCHEMA}; encode again")
        return Encoding(**content["encoding"]), [ShardRecord(**record) for record in content["shards"]]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is not an index of latent shards ({type(error).__name__}: {error})") from None


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
    encoding = read_json(found[0])[0]
    records = []
    for number in range(encoding.shards):
        path = folder / record_name(number)
        if not path.is_file():
            raise DataError(f"{folder} is not finished: {len(found)} of {encoding.shards} shards are there; {_REDO}")
        theirs, own = read_json(path)
        if theirs != encoding:
            raise DataError(f"{path} is of another encoding ({'; '.join(encoding.differences(theirs))}); {_REDO}")
        records += own
    return encoding, records


def read_index(folder: Path) -> tuple[Encoding, list[ShardRecord]]:
    """The index of a folder; where several ranks wrote it and none joined the records, they are joined here.

    Raises:
        DataError: There is no index, or see `join_records`.
    """
    path = folder / INDEX_NAME
    return read_json(path) if path.is_file() else join_records(folder)


def check_shard(folder: Path, record: ShardRecord) -> str | None:
    """What is wrong with a shard's file, or None."""
    path = folder / record.file
    try:
        return None if sha256_of(path) == record.sha256 else f"{path} is damaged: its checksum is not the index's"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"cannot read {path}: {error.strerror}"


class LatentShards(DataSet):
    """Latents that encode wrote.

    Args:
        folder: Holds the shards.
        mirror: Whether training takes the mirrored image's latent half of the time.
        in_memory: Whether to hold all in RAM. Default: where they are at most `MAX_BYTES_IN_MEMORY`.
        verify: Whether to read all shards first and compare checksums, some seconds for each 10 GB.

    Attributes:
        encoding: What the latents are.

    Raises:
        DataError: A shard is missing or damaged, or encode has not finished.
    """

    def __init__(
        self, folder: str | Path, *, mirror: bool = True, in_memory: bool | None = None, verify: bool = True
    ) -> None:
        self.folder = Path(folder)
        self.name = f"latents in {self.folder}"
        self.mirror = mirror
        self.encoding, self._records = read_index(self.folder)
        if verify:
            with ThreadPoolExecutor(4) as pool:
                wrong = [what for what in pool.map(lambda r: check_shard(self.folder, r), self._records) if what]
            if wrong:
                raise DataError(f"{'; '.join(wrong[:5])}{' and more' if len(wrong) > 5 else ''}; {_REDO}")
        self._records = [record for record in self._records if record.count]
        if not self._records:
            raise DataError(f"{self.folder} holds no latents: none of the encoded images could be read")
        self.class_names = self.encoding.class_names
        self.sample_shape = self._records[0].shape
        self._starts = np.cumsum([0, *(record.count for record in self._records)])
        self._open: dict[int, Any] = {}
        labels = [self._shard(number).get_tensor("labels") for number in range(len(self._records))]
        self._labels = torch.cat(labels)
        if len(self._labels) != self._starts[-1]:
            raise DataError(f"{self.folder} holds {len(self._labels)} labels for {self._starts[-1]} latents; {_REDO}")
        if in_memory is None:
            width = STORAGE_DTYPES[self.encoding.dtype].itemsize
            in_memory = 2 * len(self) * int(np.prod(self.sample_shape)) * width <= MAX_BYTES_IN_MEMORY
        self.in_memory = in_memory
        self._held = self._hold() if in_memory else None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files stay with their process

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            path = self.folder / self._records[number].file
            try:
                self._open[number] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise DataError(f"cannot read {path} ({error}); {_REDO}") from None
        return self._open[number]

    def _hold(self) -> Tensor:
        """(2, length, C, h, w) in the stored dtype: as they are, then mirrored."""
        held = torch.empty(2, len(self), *self.sample_shape, dtype=STORAGE_DTYPES[self.encoding.dtype])
        for number in range(len(self._records)):
            shard = self._shard(number)
            rows = slice(self._starts[number], self._starts[number + 1])
            held[0, rows], held[1, rows] = shard.get_tensor("latents"), shard.get_tensor("mirrored")
        self._open.clear()
        return held

    def fetch(self, indices: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> Samples:
        """Read latents; see `DataSet.fetch`. A mirrored one is the mirrored image's, not the latent turned around."""
        chosen = torch.from_numpy(indices)
        if self._held is not None:
            x = self._held[torch.from_numpy(mirrored.astype(np.int64)), chosen]
        else:
            numbers = np.searchsorted(self._starts, indices, side="right") - 1
            x = torch.stack(
                [
                    self._shard(int(number)).get_slice("mirrored" if turned else "latents")[int(index - start)]
                    for number, index, start, turned in zip(
                        numbers, indices, self._starts[numbers], mirrored, strict=True
                    )
                ]
            )
        return Samples(x=x.float(), y=self._labels[chosen])
