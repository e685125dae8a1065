"""Bad input to ``evaluate`` and ``classifier``: one line and status 2 before the work, and nothing lost after it."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from typer.testing import CliRunner

from dig.cli import app
from dig.evaluation.classifier import HEADER, ClassifierSpec, load_classifier
from tests.dig.test_data_images import make_folder
from tests.dig.test_evaluation import write_npz
from tests.dig.tiny import TINY, make_fashion

runner = CliRunner()


def invoke(*words: Any) -> Any:
    return runner.invoke(app, list(map(str, words)), obj=TINY)


def refused(*words: Any) -> str:
    """The one line of a refusal."""
    result = invoke(*words, "--device", "cpu")
    assert result.exit_code == 2, (result.output, result.exception)
    (line,) = [line for line in result.output.splitlines() if line]
    assert line.startswith("error: ")
    return str(line)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fashion(tmp_path_factory.mktemp("data"), train=120, test=30)


@pytest.fixture(scope="module")
def classifier(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("classifier") / "c.safetensors"
    result = invoke("classifier", "--data", data, "--out", out, "--epochs", 1, "--batch", 30, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def samples(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("samples") / "s.npz", data, 40, noise=9)


def colours(path: Path, count: int, side: int = 16) -> Path:
    draw = np.random.default_rng(0)
    np.savez(path, arr_0=draw.integers(0, 256, (count, side, side, 3), dtype=np.uint8))
    return path


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", 3], "count must be at least 4"),
        (["--count", -1], "count must be at least 4"),
        (["--reference", 0], "reference must be at least 4"),
        (["--reference", 121], "holds 120 images, fewer than --reference 121"),
        (["--image-size", 0], r"image.size must be|are needed"),
        (["--image-size", -3], r"image.size must be|are needed"),
        (["--image-size", 10**9], r"image.size must be|are needed"),
        (["--channels", 2], "channels must be 1 or 3"),
        (["--channels", 3], "the classifier takes 1 channels, the data have 3; give --channels 1"),
        (["--image-size", 40], "the samples are 32x32, the data 40x40"),
    ],
)
def test_options_of_evaluate(data: Path, classifier: Path, samples: Path, options: list[Any], message: str) -> None:
    words = ["evaluate", "--samples", samples, "--data", data, "--classifier", classifier]
    assert re.search(message, refused(*words, *options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "nan"], "epochs must be a finite number above 0"),
        (["--epochs", "inf"], "epochs must be a finite number above 0"),
        (["--epochs", "-1"], "epochs must be a finite number above 0"),
        (["--epochs", "1e300"], "epochs must be a finite number above 0"),
        (["--batch", 1], "batch must be a whole number, at least 2"),
        (["--batch", 10**400], r"batch must be at most 2\^62"),
        (["--image-size", 10**400], r"image.size must be|are needed"),
        (["--batch", 10**12], r"are needed \(the first layer's activations"),
        (["--seed", -1], "seed must be a whole number, at least 0"),
        (["--seed", 2**63], r"seed must be at most 2\^62"),
        (["--image-size", 0], r"image.size must be|are needed"),
        (["--image-size", 10**9], r"image.size must be|are needed"),
        (["--channels", 4], "channels must be 1 or 3"),
        (["--workers", -1], "workers must be 0 to"),
        (["--workers", 10**6], "workers must be 0 to"),
    ],
)
def test_options_of_classifier(data: Path, tmp_path: Path, options: list[Any], message: str) -> None:
    assert re.search(message, refused("classifier", "--data", data, "--out", tmp_path / "c", *options))
    assert not list(tmp_path.iterdir())


def test_the_shortest_training_is_one_step(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    result = invoke("classifier", "--data", data, "--out", out, "--epochs", 1e-9, "--batch", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output


# Outputs, and what a classifier is tested with: before the training


def test_classifier_looks_at_everything_first(
    data: Path, folder: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dig.evaluation.classifier.train_classifier", lambda *a, **o: pytest.fail("training began"))
    words = ["classifier", "--data", data, "--out"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("precious")
    other = make_folder(tmp_path / "other", {"a": 2, "c": 2})
    for options, message in (
        ([tmp_path / "folder"], "it is a folder; name a file"),
        (["/dev/null"], "it is no ordinary file; name a file"),
        ([tmp_path / "file" / "c"], "cannot write"),
        ([tmp_path / ("x" * 300)], "cannot write"),
        ([tmp_path / "file"], "cannot read the classifier"),
        ([samples], "it is a zip archive"),
        ([tmp_path / "c", "--test-data", tmp_path / "typo"], "typo does not exist"),
        ([tmp_path / "c", "--test-data", folder], "cannot test a classifier of"),
    ):
        assert message in refused(*words, *options)
    words = ["classifier", "--data", folder, "--image-size", 16, "--out", tmp_path / "c"]
    assert "2 classes (a, c)" in refused(*words, "--test-data", other)
    assert (tmp_path / "file").read_text() == "precious"
    disk = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda path: disk._replace(free=1_000_000))
        line = refused("classifier", "--data", data, "--out", tmp_path / "c")
        assert "the classifier's weights need" in line
        assert "make room, or choose another place" in line
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    words = ["classifier", "--data", data, "--out", tmp_path / "weights.safetensors"]
    assert "exists and is no classifier; choose another file" in refused(*words)


def test_what_was_trained_is_kept_where_the_disk_is_full(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.parent.name == "out":
            write(path, content[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    out = tmp_path / "out" / "c.safetensors"
    line = refused("classifier", "--data", data, "--out", out, "--epochs", 0.1, "--batch", 8, "--quiet")
    assert f"cannot write {out} (No space left on device); what belongs there is kept in " in line
    assert not list((tmp_path / "out").iterdir())
    kept = Path(line.rpartition(" ")[2])
    assert kept.is_relative_to(tmp_path / "temporary")
    assert load_classifier(kept, "cpu").spec.class_names == tuple(map(str, range(10)))


def test_a_test_that_fails_costs_no_classifier(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("dig.evaluation.classifier.accuracy", fails)
    out = tmp_path / "c"
    assert "Input/output error" in refused(
        "classifier", "--data", data, "--out", out, "--epochs", 0.1, "--batch", 8, "--quiet"
    )
    assert load_classifier(out, "cpu").spec.accuracy is None


def test_results_go_on_in_a_file_of_results_alone(
    data: Path, classifier: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", "--samples", samples, "--data", data, "--classifier", classifier]
    before = samples.read_bytes()
    monkeypatch.setattr("dig.evaluation.features.extract", lambda *a, **o: pytest.fail("measuring began"))
    (tmp_path / "notes.txt").write_text("notes")
    for place, message in (
        (samples, "holds no lines of JSON"),
        (tmp_path / "notes.txt", "holds no lines of JSON"),
        (tmp_path, "it is a folder"),
        (tmp_path / "notes.txt" / "x", "cannot write"),
        ("/dev/full", "it is no ordinary file"),
    ):
        assert message in refused(*words, "--append", place)
    assert samples.read_bytes() == before


def test_results_are_printed_where_they_cannot_be_appended(
    data: Path, classifier: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, line: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dig.training.data.files.append_line", full)
    result = invoke(
        "evaluate", "--samples", samples, "--samples", samples, "--data", data, "--classifier", classifier,
        "--append", tmp_path / "r", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 2
    assert result.output.count("Fréchet distance of the classifier: ") == 2
    assert "No space left on device; the results are those printed here" in result.output


# Files of classifiers, and of Inception's weights


def rewritten(classifier: Path, path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]) -> Path:
    tensors = load_file(classifier)
    about = {"shape": [1, 32, 32], "class_names": list("0123456789"), "accuracy": 0.5}
    head = change(tensors, about)
    path.write_bytes(save(tensors, {HEADER: head if isinstance(head, str) else json.dumps(about)}))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, about: "{",
        lambda tensors, about: "[]",
        lambda tensors, about: "[" * 100_000,
        lambda tensors, about: about.clear(),
        lambda tensors, about: about.update(shape=[1, 32]),
        lambda tensors, about: about.update(shape=[2, 32, 32]),
        lambda tensors, about: about.update(shape=[1, 0, 32]),
        lambda tensors, about: about.update(shape=None),
        lambda tensors, about: about.update(class_names=["a"]),
        lambda tensors, about: about.update(class_names=["a"] * 10),
        lambda tensors, about: about.update(class_names=[1] * 10),
        lambda tensors, about: about.update(accuracy="good"),
        lambda tensors, about: about.update(accuracy=float("nan")),
        lambda tensors, about: about.update(accuracy=7),
        lambda tensors, about: tensors.pop("head.weight") is None,
        lambda tensors, about: tensors.update(more=torch.zeros(1)),
        lambda tensors, about: tensors.update({"head.bias": torch.zeros(11)}),
        lambda tensors, about: tensors.update({"head.bias": torch.zeros(10).half()}),
        lambda tensors, about: tensors.update({"head.bias": torch.full((10,), torch.nan)}),
    ],
)
def test_hostile_classifiers(
    classifier: Path, data: Path, samples: Path, tmp_path: Path, change: Callable[..., Any]
) -> None:
    path = rewritten(classifier, tmp_path / "c", change)
    line = refused("evaluate", "--samples", samples, "--data", data, "--classifier", path)
    assert f"the classifier {path} is damaged" in line


@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff" * 20, b"version https://git-lfs.github.com/spec/v1\n"])
def test_other_files_under_the_name_of_a_classifier(data: Path, samples: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c").write_bytes(content)
    for path in (tmp_path / "c", tmp_path, tmp_path / "none"):
        line = refused("evaluate", "--samples", samples, "--data", data, "--classifier", path)
        assert f"cannot read the classifier {path}" in line


def test_a_classifier_of_other_images(
    data: Path,
    classifier: Path,
    folder: Path,
    samples: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Grey ones once took the red of coloured samples without a word."""
    coloured = colours(tmp_path / "s.npz", 9, side=32)
    words = ["evaluate", "--classifier", classifier, "--image-size", 32]
    assert "these samples have colours" in refused(*words, "--data", folder, "--channels", 1, "--samples", coloured)
    with caplog.at_level(logging.WARNING):
        result = invoke(*words, "--data", folder, "--channels", 1, "--samples", samples, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "was trained on other classes than those of images in" in caplog.text
    small = colours(tmp_path / "small.npz", 9)
    line = refused("evaluate", "--classifier", classifier, "--image-size", 16, "--data", folder, "--samples", small)
    assert "the classifier takes images of 32x32; samples and data are 16x16: train another" in line


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.zeros(3), "no tensors by name"),
        ({}, "no tensors by name"),
        ({"scale": torch.zeros(2, 2).to_sparse()}, "'scale' is no dense tensor"),
        ({"scale": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)}, "'scale' is no dense tensor"),
        ({"scale": 7}, "'scale' is no dense tensor"),
        ({"scale": torch.tensor(torch.nan)}, "'scale' is not finite"),
        (b"<html>", "it is an HTML page"),
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_hostile_weights_of_inception(
    data: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Any, message: str
) -> None:
    package, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = lambda *a, **o: pytest.fail("they were believed")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    monkeypatch.setattr("dig.packages.is_installed", lambda name: True)
    monkeypatch.setattr("dig.packages.importlib.import_module", lambda name: package)
    if isinstance(weights, bytes):
        (tmp_path / "w.pth").write_bytes(weights)
    else:
        torch.save(weights, tmp_path / "w.pth")
    assert message in refused("evaluate", "--samples", samples, "--data", data, "--inception", tmp_path / "w.pth")


def test_paths_are_no_markup(data: Path, classifier: Path, samples: Path, tmp_path: Path) -> None:
    place = tmp_path / "[red]a[" / "b]"
    place.mkdir(parents=True)
    for source in (classifier, samples):
        (place / source.name).write_bytes(source.read_bytes())
    result = invoke(
        "evaluate", "--samples", place / samples.name, "--samples", samples, "--data", data,
        "--classifier", place / classifier.name, "--append", place / "r", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"{place / samples.name}: Fréchet" in result.output
    result = invoke("classifier", "--data", data, "--out", place / "c", "--epochs", 0.1, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert f"classifier in {place / 'c'}: " in result.output
    result = invoke("classifier", "--data", data, "--out", tmp_path / "\udce9\n", "--epochs", 0.1, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert rf"classifier in {tmp_path}/\udce9\n: " in result.output
    assert f"{place}/none does not exist" in refused("classifier", "--data", place / "none", "--out", place / "d")


def test_specs_that_no_classifier_has() -> None:
    for change in ({"shape": (4, 8, 8)}, {"class_names": ()}, {"accuracy": -0.5}):
        with pytest.raises(ValueError, match=r"must be|have 1 or 3"):
            ClassifierSpec(**{"shape": (1, 8, 8), "class_names": ("a",), **change})


@pytest.mark.parametrize(
    ("side", "options", "message"),
    [
        (
            (16, 16),
            [],
            "the samples are 16x16, the data 32x32, which can't be read as 16x16 (.*larger than --image-size 16",
        ),
        ((32, 48), [], "the samples are 32x48, the data 32x32, and always square; measure square samples"),
        (
            (28, 28),
            [],
            "the classifier takes 32x32 alone; train another with --image-size 28 and evaluate with the same",
        ),
        (
            (28, 28),
            ["--image-size", 28],
            "the classifier takes images of 32x32; samples and data are 28x28: train another",
        ),
        ((32, 32), ["--image-size", 28], "the samples are 32x32, the data 28x28; give --image-size 32"),
    ],
)
def test_advice_on_sizes_leads_somewhere(
    data: Path, classifier: Path, tmp_path: Path, side: tuple[int, int], options: list[Any], message: str
) -> None:
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((9, *side, 3), dtype=np.uint8))
    words = ["evaluate", "--samples", tmp_path / "s.npz", "--data", data, "--classifier", classifier, *options]
    assert re.search(message.replace("(.*", r"\(.*"), refused(*words))


def test_labels_of_another_length_and_images_without_pixels_are_refused(
    data: Path, classifier: Path, tmp_path: Path
) -> None:
    """At once: a million images of no pixel are a hundred bytes."""
    words = ["evaluate", "--data", data, "--classifier", classifier, "--samples", tmp_path / "s.npz"]
    for labels in (np.zeros(8), np.zeros((9, 2)), np.zeros(())):
        np.savez(tmp_path / "s.npz", arr_0=np.zeros((9, 32, 32, 3), dtype=np.uint8), arr_1=labels)
        assert "must hold a label (arr_1) for each of its 9 images; got (" in refused(*words)
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((10**6, 0, 0, 3), dtype=np.uint8))
    assert "holds no images: (1000000, 0, 0, 3)" in refused(*words)
