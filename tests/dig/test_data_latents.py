"""What a folder of latents says of itself is checked: index, records, headers, tensors. Made by hand, without a VAE."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from dig.training.data import DataError, Encoding, LatentShards, open_dataset
from dig.training.data.shards import ShardRecord, record_name, shard_name, to_json
from tests.dig.tiny import make_fashion

SHAPE = (4, 2, 2)
COUNTS = (4, 3, 2)
"""Of ten images in shards of four; one of the second shard could not be read."""
REDO = "run encode again"


def tensors(number: int, count: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(number)
    return {
        "labels": torch.arange(count) % 2,
        "latents": torch.randn(count, *SHAPE, generator=draw).half(),
        "mirrored": torch.randn(count, *SHAPE, generator=draw).half(),
        "sources": torch.arange(count) + 4 * number,
    }


def write(folder: Path, spoil: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None) -> Path:
    """Three shards with their records and the index; ``spoil`` changes the tensors of the second, checksum included."""
    folder.mkdir(exist_ok=True)
    encoding = Encoding(
        listing_sha256="0" * 64, images=10, class_names=("cat", "dog"), image_size=16, vae="v", vae_sha256="1" * 64,
        scale=0.18215, dtype="fp16", seed=0, shard_size=4,
    )  # fmt: skip
    records = []
    for number, count in enumerate(COUNTS):
        content = tensors(number, count)
        if number == 1:
            spoil(content)
        data = save(content)
        (folder / shard_name(number)).write_bytes(data)
        unreadable = {"cat/7.png": "junk"} if number == 1 else {}
        records.append(
            ShardRecord(
                file=shard_name(number), count=count, shape=SHAPE, sha256=hashlib.sha256(data).hexdigest(),
                unreadable=unreadable,
            )
        )  # fmt: skip
        (folder / record_name(number)).write_bytes(to_json(encoding, records[-1:]))
    (folder / "index.json").write_bytes(to_json(encoding, records))
    return folder


def test_what_is_whole_is_read(tmp_path: Path) -> None:
    data = open_dataset(write(tmp_path / "latents"))
    assert isinstance(data, LatentShards)
    assert (len(data), data.class_names, data.sample_shape) == (9, ("cat", "dog"), SHAPE)
    assert torch.equal(data[4][0], tensors(1, 3)["latents"][0].float())
    (tmp_path / "latents" / "index.json").unlink()
    assert len(LatentShards(tmp_path / "latents")) == 9


HUGE = 10**30

FIELDS: list[tuple[tuple[Any, ...], Any]] = [
    *((("shards", 1, "count"), value) for value in (None, 0, 2, -1, True, 3.0, "3", [3], HUGE)),
    *(
        (("shards", 1, "shape"), value)
        for value in (None, [4, 2], [4, 2, 3], [4, 0, 2], "422", [4, 2, 2.0], [HUGE] * 3)
    ),
    *((("shards", 1, "file"), value) for value in (None, "", "../index.json", shard_name(0), 7, "/dev/zero")),
    *((("shards", 1, "sha256"), value) for value in (None, "", "0" * 63, 5)),
    *((("shards", 1, "unreadable"), value) for value in (None, [], {"a": 1}, {}, {"a": "x", "b": "y"})),
    (("shards", 1), None),
    (("shards",), []),
    (("shards",), {}),
    (("count",), None),
    (("count",), 8),
    (("count",), True),
    (("schema",), 2),
    (("encoding",), None),
    (("encoding",), []),
    *((("encoding", "scale"), value) for value in (0, 0.0, -1.0, None, "1", True, float("nan"), float("inf"))),
    *((("encoding", "images"), value) for value in (9, 11, 0, None, 10.0, HUGE)),
    *((("encoding", "shard_size"), value) for value in (3, 5, 0, None)),
    *(
        (("encoding", "class_names"), value)
        for value in ([], ["cat"], ["cat", "cat"], ["cat", ""], ["cat", 3], None, "cd")
    ),
    *((("encoding", "dtype"), value) for value in ("fp32", "int8", None, [])),
    *((("encoding", "seed"), value) for value in (-1, 2**63, None, 0.5)),
    (("encoding", "image_size"), 0),
    (("encoding", "vae"), None),
    (("encoding", "vae_sha256"), "x"),
    (("encoding", "listing_sha256"), None),
    (("encoding", "surprise"), 1),
]


@pytest.mark.parametrize(("place", "value"), FIELDS)
@pytest.mark.parametrize("verify", [True, False])
def test_index_is_not_believed(tmp_path: Path, place: tuple[Any, ...], value: Any, verify: bool) -> None:
    folder = write(tmp_path / "latents")
    content = json.loads((folder / "index.json").read_text())
    entry = content
    for key in place[:-1]:
        entry = entry[key]
    entry[place[-1]] = value
    (folder / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"index\.json|shard-0000") as caught:
        LatentShards(folder, verify=verify)
    assert "\n" not in str(caught.value)
    assert REDO in str(caught.value) or "encode again" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"7", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"<html>404</html>", b'{"schema": 1}', b"9" * 5000],
)
def test_other_files_under_the_name_of_the_index(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path / "latents")
    for name in ("index.json", "shard-00001.json"):
        write(folder)
        (folder / name).write_bytes(content)
        if name != "index.json":
            (folder / "index.json").unlink()
        with pytest.raises(DataError, match=f"{name} is not an index of latent shards") as caught:
            LatentShards(folder)
        assert "\n" not in str(caught.value)


def change(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    def spoil(content: dict[str, torch.Tensor]) -> None:
        content[name] = make(content[name]).contiguous()

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("labels", lambda x: x + 2), "it has the label 3 of 2"),
        (change("labels", lambda x: x - 1), "it has the label -1 of 2"),
        (change("labels", lambda x: x[:2]), r"its labels are I64 \[2\] instead of I64 \[3\]"),
        (change("labels", lambda x: x.float()), "its labels are F32"),
        (change("latents", lambda x: x[:2]), r"its latents are F16 \[2, 4, 2, 2\] instead of F16 \[3, 4, 2, 2\]"),
        (change("latents", lambda x: x.float()), "its latents are F32"),
        (change("mirrored", lambda x: x[:, :3]), "its mirrored are"),
        (change("mirrored", lambda x: x.to(torch.float8_e4m3fn)), "its mirrored are F8_E4M3"),
        (change("sources", lambda x: x - 4), "its sources are not those of its place"),
        (change("sources", lambda x: x.flip(0)), "its sources are not those of its place"),
        (lambda content: content.pop("sources"), "it holds labels, latents, mirrored instead of"),
        (lambda content: content.update(more=torch.zeros(1)), "it holds labels, latents, mirrored, more, sources"),
    ],
)
def test_tensors_are_not_believed(tmp_path: Path, spoil: Callable[..., Any], message: str) -> None:
    """Their checksum is right: whoever wrote them wrote the index too."""
    folder = write(tmp_path / "latents", spoil)
    for options in ({}, {"verify": False}, {"in_memory": False}):
        with pytest.raises(DataError, match=rf"shard-00001\.safetensors is damaged: {message}.*{REDO}"):
            LatentShards(folder, **options)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_named(tmp_path: Path, in_memory: bool, value: float) -> None:
    def spoil(content: dict[str, torch.Tensor]) -> None:
        content["latents"][1, 0, 0, 0] = value

    data = LatentShards(write(tmp_path / "latents", spoil), in_memory=in_memory)
    with pytest.raises(DataError, match=r"shard-00001\.safetensors holds latents that are not finite"):
        data.fetch(np.array([0, 5, 8]), np.zeros(3, dtype=bool))
    assert data.fetch(np.array([0, 5, 8]), np.ones(3, dtype=bool)).x.isfinite().all()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08\0\0\0\0\0\0\0{}      ",
        b"\xff" * 8 + b"{}",
        (2**40).to_bytes(8, "little") + b"{",
        b"<!DOCTYPE html>",
        b"\x02\0\0\0\0\0\0\0[]",
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_other_files_under_the_name_of_a_shard(tmp_path: Path, content: bytes, verify: bool) -> None:
    folder = write(tmp_path / "latents")
    (folder / shard_name(1)).write_bytes(content)
    with pytest.raises(DataError, match=rf"shard-00001\.safetensors is damaged.*{REDO}") as caught:
        LatentShards(folder, verify=verify)
    assert "\n" not in str(caught.value)


def test_two_kinds_of_data_in_a_folder_are_refused(tmp_path: Path) -> None:
    make_fashion(write(tmp_path / "latents"), train=10, test=10)
    with pytest.raises(DataError, match="holds both latent shards and idx files"):
        open_dataset(tmp_path / "latents")


def test_folders_and_strange_names(tmp_path: Path) -> None:
    folder = write(tmp_path / "latents")
    (folder / shard_name(1)).unlink()
    (folder / shard_name(1)).mkdir()
    with pytest.raises(DataError, match=r"cannot read .*shard-00001\.safetensors"):
        LatentShards(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "shard-x.json").write_text("{}")
    with pytest.raises(DataError, match=r"shard-x\.json has not the name of a shard's record; remove it"):
        open_dataset(tmp_path / "other")
