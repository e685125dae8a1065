"""Encoding to latent shards: what they hold, interruption, ranks, damage."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save
from typer.testing import CliRunner

from dig.locks import LockedError
from dig.packages import MissingPackageError, require
from dig.training.data import (
    LATENT_SCALE,
    DataError,
    DataOrder,
    ImageFolder,
    LatentShards,
    Loader,
    encode,
    open_dataset,
)
from dig.training.data.draws import noise_seed
from dig.training.data.encode_command import encode_command
from dig.training.data.encoding import Progress
from dig.training.data.latents import read_index
from tests.dig.test_data_images import make_folder
from tests.dig.tiny import make_vae

diffusers = pytest.importorskip("diffusers")

SIDE = 16
COUNTS = {"cat": 7, "dog": 6}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images") / "data", COUNTS, side=20)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, images: Path, vae: Path) -> Path:
    """Four shards of 13 images, made without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "latents"
    assert run(images, out, vae).joined
    return out


def run(images: Path, out: Path, vae: Path, **options: Any) -> Any:
    return list(encode(images, out, **({"vae": str(vae), **OPTIONS} | options)))[-1]


OPTIONS: dict[str, Any] = {"image_size": SIDE, "shard_size": 4, "batch_size": 3, "dtype": "fp32"}


def contents(folder: Path) -> dict[str, bytes]:
    """All but the locks, which stay."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}


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


def test_refusals(tmp_path: Path, images: Path, vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="multiples of 2; got 3 channels of 15x15"):
        run(images, tmp_path / "out", vae, image_size=15)
    with pytest.raises(DataError, match="cannot load the VAE"):
        run(images, tmp_path / "out", tmp_path / "no-vae")
    with pytest.raises(ValueError, match="rank must be"):
        run(images, tmp_path / "out", vae, rank=2, world_size=2)
    with pytest.raises(ValueError, match="dtype must be one of fp16, bf16, fp32"):
        run(images, tmp_path / "out", vae, dtype="int8")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("dig.packages.is_installed", lambda _: False)
    with pytest.raises(MissingPackageError, match=r"needs the package diffusers; .* 'dig-diffusion\[train\]'"):
        run(images, tmp_path / "out", vae)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 0}, "image_size must be a whole number, at least 1"),
        ({"batch_size": 0}, "batch_size must be a whole number, at least 1"),
        ({"shard_size": -1}, "shard_size must be a whole number, at least 1"),
        ({"seed": -1}, "seed must be a whole number, at least 0"),
        ({"seed": 2**64}, r"seed must be at most 2\^62"),
        ({"batch_size": 10**400}, r"batch_size must be at most 2\^62"),
        ({"scale": 0.0}, "scale must be a finite number above 0.001 and at most 1000"),
        ({"scale": 1e-30}, "scale must be a finite number above 0.001 and at most 1000"),
        ({"scale": 1e30}, "scale must be a finite number above 0.001 and at most 1000"),
        ({"scale": math.nan}, "scale must be a finite number above 0.001 and at most 1000"),
        ({"workers": 0}, "workers must be 1 to"),
        ({"workers": 10**9}, "workers must be 1 to"),
        ({"rank": -1}, "rank must be"),
        ({"world_size": 0}, "rank must be"),
        ({"dtype": "fp64"}, "dtype must be one of"),
        ({"image_size": 10**6}, r"GiB are needed \(an image of 1000000x1000000"),
    ],
)
def test_options_out_of_range_are_refused_before_the_vae_is_read(
    tmp_path: Path, images: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(images, tmp_path / "out", tmp_path / "no-vae", **change)
    assert not (tmp_path / "out").exists()


def test_room_is_counted_first(tmp_path: Path, images: Path, vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for a shard and a batch, and disk for the shards that are missing."""
    monkeypatch.setattr("dig.memory.available_memory", lambda device: 10_000)
    with pytest.raises(ValueError, match="choose a smaller --shard-size or --batch"):
        run(images, tmp_path / "out", vae)
    monkeypatch.undo()
    disk = shutil.disk_usage(tmp_path)
    # Of 13 images in fp32, 4 x 8 x 8 twice each.
    monkeypatch.setattr("shutil.disk_usage", lambda path: disk._replace(free=13 * 2048 - 1))
    with pytest.raises(ValueError, match=r"4 shards need .* make room"):
        run(images, tmp_path / "out", vae)
    monkeypatch.setattr("shutil.disk_usage", lambda path: disk._replace(free=13 * 2048))
    assert run(images, tmp_path / "out", vae).joined
    monkeypatch.setattr("shutil.disk_usage", lambda path: disk._replace(free=0))
    assert run(images, tmp_path / "out", vae).skipped == 4


def test_shards_do_not_go_among_the_images(tmp_path: Path, images: Path, vae: Path) -> None:
    (tmp_path / "link").symlink_to(images)
    before = sorted(images.iterdir())
    for out in (images, images / "latents", images / "cat", tmp_path / "link" / "x", images / ".." / images.name):
        with pytest.raises(DataError, match="lies in the images' own folder"):
            run(images, out, vae)
    assert sorted(images.iterdir()) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"nothing can be written in .*/file; choose another"):
        run(images, tmp_path / "file" / "x", tmp_path / "no-vae")
    with pytest.raises(DataError, match="is a file; name a folder"):
        run(images, tmp_path / "file", vae)


def test_two_runs_do_not_share_a_folder(tmp_path: Path, images: Path, vae: Path) -> None:
    """But the ranks of one job do."""
    out = tmp_path / "out"
    first = encode(images, out, vae=str(vae), **OPTIONS)
    next(first)
    with pytest.raises(LockedError, match="another process is encoding into"):
        run(images, out, vae)
    with pytest.raises(LockedError, match="another job, of 1 ranks, is encoding into"):
        run(images, out, vae, rank=1, world_size=2)
    first.close()
    first, second = (encode(images, out, vae=str(vae), rank=rank, world_size=2, **OPTIONS) for rank in (0, 1))
    next(first), next(second)
    with pytest.raises(LockedError, match="another process is encoding into"):
        run(images, out, vae, rank=1, world_size=2)
    list(second), list(first)
    assert run(images, out, vae).skipped == 4


def test_locks_are_not_followed_through_links(tmp_path: Path, images: Path, vae: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep")
    for name in (".lock", ".lock-0-of-1"):
        out = tmp_path / name.strip(".")
        out.mkdir()
        (out / name).symlink_to(precious)
        with pytest.raises(OSError, match="symbolic link"):
            run(images, out, vae)
    assert precious.read_text() == "keep"


def test_a_full_disk_keeps_what_is_whole(
    tmp_path: Path, whole: Path, images: Path, vae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write, written = Path.write_bytes, []

    def full(path: Path, content: bytes) -> int:
        written.append(path)
        if len(written) == 3:
            write(path, content[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"shard-00001\.safetensors: No space left on device; 1 shards are whole; make"):
        run(images, out, vae)
    monkeypatch.undo()
    assert sorted(path.name for path in out.glob("[!.]*")) == ["shard-00000.json", "shard-00000.safetensors"]
    assert not list(out.glob(".*.tmp"))
    assert run(images, out, vae).skipped == 1
    assert contents(out) == contents(whole)


def test_images_that_are_all_unreadable_end_it(tmp_path: Path, vae: Path) -> None:
    root = make_folder(tmp_path / "data", {"a": 3})
    for path in root.glob("a/*"):
        path.write_bytes(b"junk")
    with pytest.raises(DataError, match="none of the 3 images can be read"):
        run(root, tmp_path / "out", vae)


def test_a_vae_that_is_not_whole_is_refused(tmp_path: Path, images: Path, vae: Path) -> None:
    """diffusers would draw the missing weights at random."""
    name = "diffusion_pytorch_model.safetensors"
    weights = load_file(vae / name)

    def spoilt(folder: str, content: bytes, config: bytes | None = None) -> Path:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(content)
        (tmp_path / folder / "config.json").write_bytes(config or (vae / "config.json").read_bytes())
        return tmp_path / folder

    part = {key: value for key, value in weights.items() if key != "quant_conv.weight"}
    nan = weights | {"quant_conv.weight": weights["quant_conv.weight"] * math.nan}
    for folder, message in (
        (spoilt("part", save(part)), "are not whole: quant_conv.weight missing"),
        (spoilt("nan", save(nan)), "has weights that are not finite"),
        (spoilt("cut", save(weights)[:1000]), "cannot load the VAE"),
        (spoilt("html", b"<html>"), "cannot load the VAE"),
        (spoilt("config", save(weights), b"[]"), "cannot load the VAE"),
        (spoilt("types", save(weights), b'{"block_out_channels": "many"}'), "cannot load the VAE"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            run(images, tmp_path / "out", folder)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_command(tmp_path: Path, whole: Path, images: Path, vae: Path) -> None:
    app = typer.Typer()
    app.command()(encode_command)
    options = ["--vae", str(vae), "--image-size", "16", "--shard-size", "4", "--batch", "3", "--device", "cpu"]
    arguments = [str(images), "--out", str(tmp_path / "out"), *options, "--dtype", "fp32"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "13 images in 4 shards" in result.output
    assert contents(tmp_path / "out") == contents(whole)
    result = CliRunner().invoke(app, [*arguments, "--seed", "1"])
    assert result.exit_code == 2
    assert "error: " in result.output
    assert "another encoding (seed: 1, 0" in result.output
    for name, value in (("RANK", "first"), ("WORLD_SIZE", "-2"), ("RANK", "")):
        result = CliRunner().invoke(app, arguments, env={name: value})
        assert result.exit_code == 2
        assert f"error: the environment variable {name} must be a number" in result.output


def test_paths_are_no_markup(
    tmp_path: Path, images: Path, vae: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """rich reads brackets as markup, and ends in a traceback where a tag is closed that was not opened."""

    def interrupted(*arguments: Any, **options: Any) -> Any:
        yield Progress(shards=2, done=1)
        raise KeyboardInterrupt

    monkeypatch.setattr("dig.training.data.encode_command.encode", interrupted)
    app = typer.Typer()
    app.command()(encode_command)
    out = tmp_path / "[red]a[" / "b]"
    result = CliRunner().invoke(app, [str(images), "--out", str(out), "--vae", str(vae), "--device", "cpu"])
    assert result.exit_code == 130, result.output
    assert f"stopped: 1 shards are in {out};" in result.output.replace("\n", "")
    monkeypatch.undo()
    strange = make_folder(tmp_path / "[bold]x[" / "red]", {"[a": 1, "b]": 1})
    (strange / "b]" / "[x].gif").write_bytes(b"")
    (strange / "b]" / "0.png").write_bytes(b"")
    options = ["--vae", str(vae), "--image-size", "16", "--device", "cpu"]
    result = CliRunner().invoke(app, [str(strange), "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    assert f"1 images in 1 shards in {out}" in result.output
    told = " ".join(record.getMessage() for record in caplog.records)
    assert "b]/[x].gif" in told
    assert "cannot read b]/0.png (not an image, or damaged at its start; it is empty); it is left out" in told


def test_latents_of_a_picture_that_was_replaced_are_not_called_finished(tmp_path: Path, vae: Path) -> None:
    images = make_folder(tmp_path / "data", {"cat": 2, "dog": 2}, side=20)
    run(images, tmp_path / "out", vae)
    next((images / "dog").iterdir()).write_bytes(next((images / "cat").iterdir()).read_bytes())
    with pytest.raises(DataError, match="latents of another encoding"):
        run(images, tmp_path / "out", vae)


def test_what_libraries_say_as_they_are_imported_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = "import logging, warnings\nlogging.getLogger('noisy').error('no torchao')\nwarnings.warn('old')\n"
    (tmp_path / "noisy_library.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require("noisy_library", "a test")
    assert not caplog.records
    logging.getLogger("noisy").warning("after it")
    assert [record.message for record in caplog.records] == ["after it"]


def test_what_diffusers_logs_of_a_folder_that_is_no_vae_is_left_out(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    logger = logging.getLogger("diffusers")  # It hands nothing on to the root.
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(DataError, match=r"^cannot load the VAE .*no file named"):
            run(images, tmp_path / "out", tmp_path / "vae")
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
