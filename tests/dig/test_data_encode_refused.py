"""What encoding refuses, and what it keeps where it cannot go on: options, folders, disks, VAEs; its command."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors.torch import load_file, save
from typer.testing import CliRunner

from dig.commands.encode import encode_command
from dig.locks import LockedError
from dig.packages import MissingPackageError, require
from dig.training.data import DataError, encode
from dig.training.data.encoding import Progress
from tests.dig.encoded import OPTIONS, contents, run
from tests.dig.test_data_images import make_folder

pytest.importorskip("diffusers")


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
        ({"world_size": 0}, "world_size must be a whole number, at least 1; got 0"),
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

    monkeypatch.setattr("dig.commands.encode.encode", interrupted)
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
