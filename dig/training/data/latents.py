"""Reading latent shards: whether a shard's file is what its record says, and the data set.

Shapes: n images of a shard; C, h, w channels, rows and columns of a latent; B samples.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dig.memory import check_memory
from dig.training.data.base import DataError, DataSet, Samples
from dig.training.data.files import sha256_of, told_by_start
from dig.training.data.shards import REDO, STORAGE_DTYPES, Encoding, ShardRecord, Storage, read_index

MAX_BYTES_IN_MEMORY = 4 * 2**30
"""Shards of at most so many bytes in all are held in RAM unless the caller says otherwise."""

_TENSORS = ("labels", "latents", "mirrored", "sources")
_STORED: dict[Storage, str] = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}  # as safetensors writes it


def check_shard(
    folder: Path, encoding: Encoding, number: int, record: ShardRecord, *, checksum: bool = True
) -> str | None:
    """What is wrong with a shard's file, or None: its checksum, then what its tensors are, and labels and sources."""
    path = folder / record.file
    try:
        if checksum and sha256_of(path) != record.sha256:
            return f"{path} is damaged: its checksum is not the index's{told_by_start(path)}"
        with safe_open(path, framework="pt") as file:
            wrong = _check_tensors(file, encoding, number, record)
            return wrong and f"{path} is damaged: {wrong}"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"cannot read {path}: {error.strerror or error}"
    except SafetensorError as error:
        return f"{path} is damaged: {' '.join(str(error).split())[:200]}"


def _check_tensors(file: Any, encoding: Encoding, number: int, record: ShardRecord) -> str | None:
    names = tuple(sorted(file.keys()))
    if names != _TENSORS:
        return f"it holds {', '.join(names)[:100] or 'nothing'} instead of {', '.join(_TENSORS)}"
    latent = (_STORED[encoding.dtype], [record.count, *record.shape])
    kinds = {
        "latents": latent,
        "mirrored": latent,
        "labels": ("I64", [record.count]),
        "sources": ("I64", [record.count]),
    }
    for name, (dtype, shape) in kinds.items():
        part = file.get_slice(name)
        if (part.get_dtype(), list(part.get_shape())) != (dtype, shape):
            return f"its {name} are {part.get_dtype()} {part.get_shape()} instead of {dtype} {shape}"
    if record.count == 0:
        return None
    labels, sources, places = file.get_tensor("labels"), file.get_tensor("sources"), encoding.sources(number)
    if labels.min() < 0 or labels.max() >= len(encoding.class_names):
        return f"it has the label {labels.min() if labels.min() < 0 else labels.max()} of {len(encoding.class_names)}"
    if sources[0] < places.start or sources[-1] >= places.stop or not bool((sources.diff() > 0).all()):
        return "its sources are not those of its place in the listing"
    return None


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
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(
                lambda pair: check_shard(self.folder, self.encoding, *pair, checksum=verify), enumerate(self._records)
            )
            wrong = [what for what in found if what]
        if wrong:
            raise DataError(f"{'; '.join(wrong[:5])}{' and more' if len(wrong) > 5 else ''}; {REDO}")
        self._records = [record for record in self._records if record.count]
        if not self._records:
            raise DataError(f"{self.folder} holds no latents: none of the encoded images could be read")
        self.class_names = self.encoding.class_names
        self.sample_shape = self._records[0].shape
        self._starts = np.cumsum([0, *(record.count for record in self._records)])
        self._open: dict[int, Any] = {}
        self._labels = torch.cat([self._shard(number).get_tensor("labels") for number in range(len(self._records))])
        if in_memory is None:
            in_memory = self._bytes() <= MAX_BYTES_IN_MEMORY
        self.in_memory = in_memory
        self._held = self._hold() if in_memory else None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _bytes(self) -> int:
        """Of all latents, as they are and mirrored."""
        return 2 * len(self) * math.prod(self.sample_shape) * STORAGE_DTYPES[self.encoding.dtype].itemsize

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files stay with their process

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            path = self.folder / self._records[number].file
            try:
                self._open[number] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise DataError(f"cannot read {path} ({error}); {REDO}") from None
        return self._open[number]

    def _hold(self) -> Tensor:
        """(2, length, C, h, w) in the stored dtype: as they are, then mirrored."""
        check_memory({self.name: self._bytes()}, device="cpu", advice="read them from the disk: in_memory=False")
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
        x = x.float()
        if not bool(x.isfinite().all()):
            bad = int(indices[int((~x.isfinite()).flatten(1).any(1).nonzero()[0])])
            file = self._records[int(np.searchsorted(self._starts, bad, side="right")) - 1].file
            raise DataError(f"{self.folder / file} holds latents that are not finite; remove it, and {REDO}")
        return Samples(x=x, y=self._labels[chosen])
