"""What a data set is, as one checksum: a run goes on with the data that it was begun with, wherever they lie now."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator

import numpy as np

from dig.training.data import DataSet, ImageFolder, LatentShards
from dig.training.data.shards import read_index

FILES = 256
"""So many files of a folder of images are read, evenly spread over it: all of a small one, seconds of a large one."""
SAMPLES_AT_ONCE = 1024


def data_sha256(dataset: DataSet) -> str:
    """SHA-256 that data sets share only if they hold the same, up to what is said here.

    Of latents it covers the encoding (with the VAE's own checksum, without its name) and the checksum of every shard,
    as the index has them; of a folder of images all names and the content of `FILES` files; of data in memory every
    sample; of any other data set `FILES` samples. Neither the path nor options of training (mirroring) are in it.

    Raises:
        DataError: The data can't be read.
    """
    digest = hashlib.sha256()
    for part in _parts(dataset):
        # With lengths, so that no two sequences of parts are the same bytes.
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def _parts(dataset: DataSet) -> Iterator[bytes]:
    yield json.dumps([len(dataset), dataset.sample_shape, dataset.class_names]).encode()
    if isinstance(dataset, LatentShards):
        encoding, records = read_index(dataset.folder)
        kept = [entry.name for entry in dataclasses.fields(encoding) if entry.compare]
        yield json.dumps([[name, getattr(encoding, name)] for name in kept]).encode()
        yield json.dumps([[record.count, record.sha256] for record in records]).encode()
    elif isinstance(dataset, ImageFolder):
        yield dataset.listing_sha256().encode()
        for index in _spread(len(dataset), FILES):
            try:
                yield (dataset.root / dataset.file_name(index)).read_bytes()
            except OSError as error:
                # Read or not must be the same next time; training reports it by name.
                yield f"{os.strerror(error.errno or 0)}".encode()
    else:
        indices = np.array(_spread(len(dataset), len(dataset) if dataset.in_memory else FILES), dtype=np.int64)
        for start in range(0, len(indices), SAMPLES_AT_ONCE):
            chosen = indices[start : start + SAMPLES_AT_ONCE]
            samples = dataset.fetch(chosen, np.zeros(len(chosen), dtype=np.bool_))
            yield samples.x.contiguous().numpy().tobytes()
            yield samples.y.contiguous().numpy().tobytes()


def _spread(length: int, count: int) -> list[int]:
    """At most ``count`` different indices below ``length``, evenly spread, both ends among them."""
    if count >= length:
        return list(range(length))
    return [i * (length - 1) // (count - 1) for i in range(count)]
