"""Names of outputs that say something else than what would be written, and a dry run that looks at its inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dig.cli import app
from tests.dig.tiny import make_class_folders, make_vae

pytestmark = pytest.mark.usefixtures("tiny_dig")

runner = CliRunner()


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("e6.txt", "safetensors", "leave out .txt, or name a file in .safetensors"),
        ("e6.pt", "safetensors", "leave out .pt, or name a file in .safetensors"),
        ("e6.npz", "release", "leave out .npz, or name a file in .pt or .pth or .safetensors"),
        ("e6.safetensors", "diffusers", "leave out .safetensors"),
    ],
)
def test_an_export_is_what_its_name_says(name: str, format: str, message: str, run: Path, tmp_path: Path) -> None:
    words = ["export", str(run), "--weights", "raw", "--format", format, "--out"]
    result = runner.invoke(app, [*words, str(tmp_path / name)])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())
    # A folder with a dot in its name, or one that is there already, is nobody's mistake.
    assert runner.invoke(app, [*words, str(tmp_path / "v1.5")]).exit_code == 0
    assert (tmp_path / "v1.5").is_dir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["encode", "{images}", "--vae", "x", "--out", "l.npz"], "--out names a folder"),
        (
            ["encode", "{images}", "--vae", "x", "--out", "l", "--world-size", "0"],
            "--world-size must be a whole number, at least 1; got 0",
        ),
        (["classifier", "--data", "{images}", "--out", "c.pt"], "--out writes a file in .safetensors"),
        (
            ["evaluate", "--samples", "s.npz", "--data", "x", "--classifier", "c", "--append", "rows.png"],
            "--append writes a file in .jsonl",
        ),
    ],
)
def test_siblings(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_class_folders(tmp_path / "images", ("a", "b"))
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, [word.format(images=images) for word in words])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_dry_run_of_encode_reads_the_vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    images, vae = make_class_folders(tmp_path / "images", ("a", "b")), make_vae(tmp_path / "vae")
    words = ["encode", str(images), "--out", str(tmp_path / "out"), "--device", "cpu", "--dry-run"]

    def dry(name: object, *options: str) -> tuple[int, str]:
        result = runner.invoke(app, [*words, "--vae", str(name), *options])
        return result.exit_code, " ".join(result.output.split())

    assert dry(vae, "--image-size", "16") == (0, dry(vae, "--image-size", "16")[1])
    assert "vae: " in dry(vae, "--image-size", "16")[1]
    assert "4x8x8 of 16x16 pixels" in dry(vae, "--image-size", "16")[1]
    status, told = dry(vae, "--image-size", "15")
    assert status == 2
    assert "--image-size must be a multiple of 2" in told
    status, told = dry(tmp_path / "nowhere")
    assert status == 2
    assert "there is no such folder" in told
    (vae / "diffusion_pytorch_model.safetensors").write_bytes(b"junk")
    status, told = dry(vae)
    assert status == 2
    assert "cannot load the VAE" in told
    # A name that isn't in the cache is not fetched, and said to be one that would be.
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    status, told = dry("nobody/has-this-vae")
    assert status == 0, told
    assert "nobody/has-this-vae, which is not here yet: it would be fetched from the hub" in told
    assert not (tmp_path / "out").exists()
