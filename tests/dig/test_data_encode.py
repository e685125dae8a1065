"""Encoding to latent shards: what they hold, interruption, ranks, damage."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dig.training.data import (
    LATENT_SCALE,
    DataError,
    DataOrder,
    ImageFolder,
    LatentShards,
    Loader,
    open_dataset,
)
from dig.training.data.draws import noise_seed
from dig.training.data.shards import read_index
from tests.dig.encoded import SIDE, contents, run

diffusers = pytest.importorskip("diffusers")


def test_round_trip(whole: Path, images: Path, vae: Path) -> None:
    """Each latent is what diffusers itself samples for that image alone."""
    data = open_dataset(whole)
    assert isinstance(data, LatentShards)
    source = ImageFolder(images, image_size=SIDE)
    assert len(data) == len(source) == 13
    assert data.class_names == ("cat", "dog")
    assert data.sample_shape == (4, 8, 8)
    model = diffusers.AutoencoderKL.from_pretrained(vae)
    for index in range(13):
        pixels, label = source[index]
        for mirrored in (False, True):
            generator = torch.Generator().manual_seed(noise_seed(0, index, mirrored))
            with torch.no_grad():
                posterior = model.encode((pixels.flip(-1) if mirrored else pixels)[None]).latent_dist
                expected = posterior.sample(generator) * 0.18215
            samples = data.fetch(np.array([index]), np.array([mirrored]))
            assert torch.allclose(samples.x, expected, atol=1e-5)
            assert not torch.allclose(samples.x, posterior.mean * 0.18215, atol=1e-3)
            assert samples.y.item() == label


def test_index_says_what_the_latents_are(whole: Path, vae: Path) -> None:
    index = json.loads((whole / "index.json").read_text())
    assert index["count"] == 13
    assert [shard["count"] for shard in index["shards"]] == [4, 4, 4, 1]
    encoding = index["encoding"]
    assert encoding["class_names"] == ["cat", "dog"]
    assert (encoding["image_size"], encoding["vae"]) == (SIDE, str(vae))
    assert (encoding["scale"], encoding["dtype"]) == (LATENT_SCALE, "fp32")
    assert load_file(whole / "shard-00001.safetensors")["sources"].tolist() == [4, 5, 6, 7]


def test_in_memory_and_from_disk_are_the_same(whole: Path) -> None:
    order = DataOrder(length=13, batch_size=5)
    held, read = LatentShards(whole, in_memory=True), LatentShards(whole, in_memory=False)
    assert (held.in_memory, read.in_memory) == (True, False)
    with Loader(held, order) as one, Loader(read, order, workers=2) as other:
        for _ in range(6):
            a, b = next(one), next(other)
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.y, b.y)


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_storage(tmp_path: Path, whole: Path, images: Path, vae: Path, name: str, dtype: torch.dtype) -> None:
    run(images, tmp_path / "out", vae, dtype=name)
    with safe_open(tmp_path / "out" / "shard-00000.safetensors", framework="pt") as shard:
        stored = shard.get_tensor("latents")
    assert stored.dtype == dtype
    assert torch.equal(stored, load_file(whole / "shard-00000.safetensors")["latents"].to(dtype))
    assert LatentShards(tmp_path / "out")[0][0].dtype == torch.float32


KILLED_AT_RENAME = """
import os, signal, sys
from dig.training.data import encode

seen, rename = 0, os.replace

def replace(*paths):
    global seen
    seen += 1
    if seen == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*paths)

os.replace = replace
list(encode(sys.argv[1], sys.argv[2], vae=sys.argv[3], image_size=16, shard_size=4, batch_size=3, dtype="fp32"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("rename", [3, 6, 9])
def test_killed_and_resumed_is_the_same(tmp_path: Path, whole: Path, images: Path, vae: Path, rename: int) -> None:
    """SIGKILL while a shard (3), a shard's record (6) and the index (9) have been written but not put in place."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED_AT_RENAME, str(images), str(out), str(vae), str(rename)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    finished = list(out.glob("shard-*.json"))
    assert len(finished) == (rename - 1) // 2
    assert list(out.glob(".*.tmp"))
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*") if path.with_suffix(".json").exists()}
    if rename < 9:
        with pytest.raises(DataError, match=rf"is not finished: {len(finished)} of 4 shards"):
            open_dataset(out)
    last = run(images, out, vae)
    assert last.skipped == len(finished)
    assert last.joined
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert contents(out) == contents(whole)


def test_ranks_write_their_own_shards(tmp_path: Path, whole: Path, images: Path, vae: Path) -> None:
    out = tmp_path / "out"
    # Rank 0 is done first: it cannot join the index.
    assert not run(images, out, vae, rank=0, world_size=2).joined
    assert sorted(path.name for path in out.glob("*.safetensors")) == [f"shard-0000{k}.safetensors" for k in (0, 2)]
    with pytest.raises(DataError, match="not finished: 2 of 4"):
        LatentShards(out)
    run(images, out, vae, rank=1, world_size=2)
    assert not (out / "index.json").exists()
    assert read_index(out) == read_index(whole)
    data, alone = LatentShards(out), LatentShards(whole)
    assert all(torch.equal(data[i][0], alone[i][0]) for i in range(13))
    assert run(images, out, vae).skipped == 4
    assert contents(out) == contents(whole)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, r"shard-00001\.safetensors is damaged: its checksum"),
        (lambda path: os.truncate(path, 100), r"shard-00001\.safetensors is damaged"),
        (Path.unlink, r"shard-00001\.safetensors is missing"),
    ],
)
def test_damaged_shard_is_refused_then_redone(
    tmp_path: Path,
    whole: Path,
    images: Path,
    vae: Path,
    damage: Callable[[Path], None],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, content in contents(whole).items():
        (out / name).write_bytes(content)
    damage(out / "shard-00001.safetensors")
    with pytest.raises(DataError, match=message + ".*run encode again"):
        open_dataset(out)
    with caplog.at_level(logging.WARNING):
        last = run(images, out, vae)
    assert "the shard is made again" in caplog.text
    assert last.skipped == 3
    assert contents(out) == contents(whole)


def test_spoilt_records_are_refused_and_redone(tmp_path: Path, whole: Path, images: Path, vae: Path) -> None:
    out = tmp_path / "out"
    run(images, out, vae)
    for spoilt, message in (
        (b"{", "is not an index of latent shards"),
        (b'{"schema": 99}', "schema 99"),
        (b'{"schema": 1}', "is not an index of latent shards"),
    ):
        (out / "index.json").write_bytes(spoilt)
        with pytest.raises(DataError, match=message):
            open_dataset(out)
    (out / "shard-00002.json").write_bytes(b"[]")
    assert run(images, out, vae).skipped == 3
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "seed: 1, 0"),
        ({"dtype": "fp16"}, "dtype"),
        ({"shard_size": 5}, "shard_size"),
        ({"scale": 1.0}, "scale"),
    ],
)
def test_other_options_do_not_mix(whole: Path, images: Path, vae: Path, change: dict[str, Any], field: str) -> None:
    before = contents(whole)
    with pytest.raises(DataError, match=rf"another encoding \(.*{field}"):
        run(images, whole, vae, **change)
    assert contents(whole) == before


def test_moved_vae_is_the_same_vae(tmp_path: Path, whole: Path, images: Path, vae: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "vae").symlink_to(vae)
    assert run(images, whole, tmp_path / "pipeline").skipped == 4


def test_bad_image_is_left_out_and_named(tmp_path: Path, whole: Path, images: Path, vae: Path) -> None:
    root = tmp_path / "images"
    for name, content in ((path.relative_to(images), path.read_bytes()) for path in images.glob("*/*")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "cat" / "5.png").write_bytes(b"junk")
    (root / "dog" / "5.png").write_bytes(b"junk")  # alone in the last shard
    last = run(root, tmp_path / "out", vae)
    assert list(last.unreadable) == ["cat/5.png", "dog/5.png"]
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [shard["count"] for shard in index["shards"]] == [4, 3, 4, 0]
    assert list(index["shards"][1]["unreadable"]) == ["cat/5.png"]
    data, all_images = LatentShards(tmp_path / "out"), LatentShards(whole)
    assert len(data) == 11
    for index, source in enumerate([0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]):
        assert torch.allclose(data[index][0], all_images[source][0], atol=1e-6)
        assert data[index][1] == all_images[source][1]
