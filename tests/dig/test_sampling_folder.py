"""Samples as folders of PNG files, grids with labels, and their distance to the data by one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dig.cli import app
from dig.evaluation.samples import read_samples
from dig.sampling import runner as runs
from dig.sampling.folder import sample_name
from dig.sampling.images import LABEL, enlarge, with_labels
from tests.dig.tiny import make_class_folders

pytestmark = pytest.mark.usefixtures("tiny_dig")

runner = CliRunner()
NAMES = ("Bag", "Dress, long", "7")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_class_folders(tmp_path_factory.mktemp("data"), NAMES, each=8)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    words = ["train", "--model", "DiG-S/8", "--data", str(data), "--image-size", "32", "--out", str(out)]
    result = runner.invoke(app, [*words, "--steps", "2", "--batch", "8", "--lr", "1e-2", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    return out


def draw(run: Path, *options: str) -> Any:
    return runner.invoke(
        app, ["sample", "--checkpoint", str(run), "--weights", "raw", "--device", "cpu", "--steps", "2", *options]
    )


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def test_a_folder_holds_what_the_npz_holds(run: Path, tmp_path: Path) -> None:
    grid = tmp_path / "g.png"
    options = ["--samples", "5", "--classes", "@1,@2,null", "--seed", "3"]
    result = draw(run, *options, "--images", str(tmp_path / "out"), "--grid", str(grid))
    assert result.exit_code == 0, result.output
    assert f"5 samples in {tmp_path / 'out'}" in result.output
    what = ("1-Bag", "2-Dress-long", "null", "1-Bag", "2-Dress-long")
    names = [f"{index:08d}-{word}.png" for index, word in enumerate(what)]
    assert sorted(pictures(tmp_path / "out")) == names
    assert draw(run, *options, "--npz", str(tmp_path / "o.npz")).exit_code == 0
    whole = np.load(tmp_path / "o.npz")["arr_0"]
    images, about = read_samples(tmp_path / "out")
    assert np.array_equal(images, whole)
    assert (about["step"], about["plan"]["seed"]) == (2, 3)
    assert np.array_equal(np.asarray(Image.open(grid))[:32, :32], whole[0])


def test_it_goes_on_and_grows(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, options = tmp_path / "out", ["--model-batch", "2"]
    whole = tmp_path / "whole"
    assert draw(run, *options, "--samples", "7", "--images", str(whole)).exit_code == 0
    batch, made = runs.BatchSampler.batch, []

    def interrupted(self: Any, number: int) -> Any:
        made.append(number)
        if len(made) == 3:
            raise KeyboardInterrupt
        return batch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(runs.BatchSampler, "batch", interrupted)
        assert draw(run, *options, "--samples", "5", "--images", str(out)).exit_code != 0
    assert len(pictures(out)) == 4
    # One is cut off, as another program might leave it, and one gone.
    names = sorted(pictures(out))
    (out / names[1]).write_bytes((out / names[1]).read_bytes()[:-3])
    (out / names[2]).unlink()
    kept = (out / names[0]).stat().st_mtime_ns
    result = draw(run, *options, "--samples", "7", "--images", str(out))
    assert result.exit_code == 0, result.output
    assert "(2 made before)" in result.output
    assert pictures(out) == pictures(whole)
    assert (out / names[0]).stat().st_mtime_ns == kept
    assert draw(run, *options, "--samples", "2", "--first", "7", "--images", str(out)).exit_code == 0
    assert len(pictures(out)) == 9
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_what_is_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert draw(run, "--samples", "2", "--images", str(out)).exit_code == 0
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.txt").write_text("years")
    for options, message in (
        (["--images", str(out), "--seed", "1"], "holds other samples; repeat their options"),
        (["--images", str(tmp_path / "thesis")], "holds something else than samples (a.txt)"),
        (["--images", str(tmp_path / "thesis" / "a.txt")], "is no folder"),
        (["--images", str(out), "--npz", "x.npz"], "choose --images or --npz"),
        (["--images", str(out), "--latents"], "are of images, not of latents"),
        (["--images", str(out), "--labels"], "are of a grid: give --grid"),
        (["--grid", str(tmp_path / "g.png"), "--scale", "99"], "--scale must be 1 to 64"),
    ):
        result = draw(run, "--samples", "2", *options)
        assert result.exit_code == 2, options
        assert message in result.output.replace("\n", " ")
    assert len(pictures(out)) == 2


def test_names() -> None:
    assert sample_name(12, 3, ("a", "b", "c", "tench, Tinca/../x"), 4) == "00000012-3-tench-Tinca-x.png"
    assert sample_name(12, 0, ("ａé…",), 1) == "00000012-0-aé.png"
    assert sample_name(1, 1, (), 2) == "00000001-1.png"
    assert sample_name(1, 2, (), 2) == "00000001-null.png"
    assert sample_name(10**9, 0, ("猫" * 90,), 1) == f"1000000000-0-{'猫' * 40}.png"


def test_grids_are_enlarged_and_labelled(run: Path, tmp_path: Path) -> None:
    pixels = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3)
    large = enlarge(pixels, 3)
    assert large.shape == (2, 6, 9, 3)
    assert np.array_equal(large[:, 1::3, 1::3], pixels)
    labelled = with_labels(np.zeros((2, 8, 40, 3), dtype=np.uint8), ["cat", "a name that is far too long"])
    assert labelled.shape == (2, 8 + LABEL, 40, 3)
    assert not labelled[:, :8].any()
    strips = labelled[:, 8:]
    assert all((strip < 128).any() and (strip == 255).mean() > 0.5 for strip in strips)
    assert not np.array_equal(strips[0], strips[1])
    grid = tmp_path / "g.png"
    result = draw(run, "--samples", "6", "--grid", str(grid), "--labels", "--scale", "2")
    assert result.exit_code == 0, result.output
    # Three classes: nine columns of them would fit, and six samples are one row.
    assert Image.open(grid).size == (9 * (64 + 2) - 2, 64 + LABEL)


@pytest.fixture(scope="module")
def classifier(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("classifier") / "c.safetensors"
    words = ["classifier", "--data", str(data), "--image-size", "32", "--out", str(file), "--epochs", "1"]
    result = runner.invoke(app, [*words, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    return file


def evaluate(data: Path, classifier: Path, *options: str) -> Any:
    words = ["evaluate", "--data", str(data), "--image-size", "32", "--classifier", str(classifier), "--device", "cpu"]
    return runner.invoke(app, [*words, *options])


def test_one_command_from_a_run_to_its_distance(data: Path, run: Path, classifier: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    options = ["--checkpoint", str(run), "--weights", "raw", "--steps", "2", "--append", str(rows)]
    result = evaluate(data, classifier, "--samples", "6", *options)
    assert result.exit_code == 0, result.output
    folder = run / "evaluation" / "step-00000002"
    assert len(pictures(folder)) == 6
    # Again with more, and the folder as any other: the same numbers, the first samples of it too.
    assert evaluate(data, classifier, "--samples", "8", *options).exit_code == 0
    result = evaluate(data, classifier, "--samples", "6", *options)
    assert "6 samples (6 made before)" in result.output
    assert evaluate(data, classifier, "--samples", str(folder), "--append", str(rows)).exit_code == 0
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["samples"] for row in found] == [6, 8, 6, 8]
    assert found[0]["distance"] == found[2]["distance"]
    assert found[1]["distance"] == found[3]["distance"] != found[0]["distance"]
    assert found[0]["of"]["step"] == 2


def test_what_evaluate_refuses(data: Path, run: Path, classifier: Path, tmp_path: Path) -> None:
    file = next((run / "checkpoints").glob("*.safetensors"))
    (tmp_path / "none").mkdir()
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for number, side in enumerate((32, 16)):
        Image.new("RGB", (side, side)).save(mixed / f"{number}.png")
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.png").write_bytes(b"<html>")
    deep = tmp_path / "deep"
    deep.mkdir()
    Image.new("RGBA", (32, 32)).save(deep / "a.png")
    for options, message in (
        (["--samples", "x", "--checkpoint", str(run)], "--samples is how many to make"),
        (["--samples", "2", "--checkpoint", str(run)], "samples must be at least 4"),
        (["--samples", "8", "--checkpoint", str(file)], "is no run: say with --images"),
        (["--samples", str(mixed), "--cfg", "2"], "--cfg is of samples that are made: give --checkpoint"),
        (["--samples", str(tmp_path / "none")], "holds no PNG files"),
        (["--samples", str(mixed)], "1.png is 16x16, and 0.png 32x32"),
        (["--samples", str(other)], "cannot read"),
        (["--samples", str(deep)], "its mode is RGBA"),
    ):
        result = evaluate(data, classifier, *options)
        assert result.exit_code == 2, options
        assert message in result.output.replace("\n", " ")
