"""Fréchet distance, precision and recall against closed forms; the classifier; the command's words."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from typer.testing import CliRunner

from dig.cli import app
from dig.evaluation.classifier import load_classifier
from dig.evaluation.metrics import Gaussian, frechet_distance, precision_recall
from dig.evaluation.samples import read_samples
from dig.training.data import IdxImages
from tests.dig.tiny import make_fashion

pytestmark = pytest.mark.usefixtures("tiny_dig")

runner = CliRunner()


def gaussian(mean: list[float], covariance: Any) -> Gaussian:
    values, vectors = torch.linalg.eigh(torch.as_tensor(covariance).double())
    return Gaussian(mean=torch.tensor(mean).double(), factor=values.sqrt()[:, None] * vectors.T)


def test_frechet_distance_of_known_gaussians() -> None:
    a = gaussian([0, 0], [[4, 0], [0, 9]])
    b = gaussian([3, 4], [[1, 0], [0, 16]])
    # Independent features: the sum of (difference of means)² and (difference of deviations)².
    assert frechet_distance(a, b) == pytest.approx(25 + 1 + 1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    # No feature varies in one of the two: its covariance is singular.
    assert frechet_distance(a, gaussian([0, 0], [[0, 0], [0, 0]])) == pytest.approx(13)


def test_frechet_distance_is_scipys_for_dependent_features() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(500, 6) @ torch.randn(6, 6), torch.randn(400, 6) @ torch.randn(6, 6) + 1
    a, b = Gaussian.of(x), Gaussian.of(y)
    assert np.allclose(a.covariance, np.cov(x.numpy().T), atol=1e-5)
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    expected = ((a.mean - b.mean) ** 2).sum() + (a.covariance + b.covariance).trace() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(ValueError, match="at least 2 images"):
        Gaussian.of(x[:1])


@pytest.mark.parametrize(("count", "features"), [(10, 64), (64, 10), (40, 40)])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_frechet_distance_loses_no_digits(count: int, features: int, offset: float) -> None:
    """Fewer images than features, features that never vary or lie far from zero: closed forms hold to the last digits.

    Of scaled features, C_b = s² C_a, so that the distance of the covariances is (s - 1)² tr C_a.
    """
    x = torch.randn(count, features, generator=torch.Generator().manual_seed(0)).double()
    x[:, ::3] = 0
    a = Gaussian.of(x + offset)
    spread = float((x - x.mean(0)).square().sum() / (count - 1))
    assert frechet_distance(a, a) <= 1e-12 * spread
    for scale in (1 + 1e-3, 2.0):
        centred = x - x.mean(0)
        b = Gaussian.of(centred * scale + x.mean(0) + offset)
        tolerance = 1e-12 * spread + 1e-16 * offset * spread  # an offset leaves fewer digits in the features themselves
        assert frechet_distance(a, b) == pytest.approx((scale - 1) ** 2 * spread, abs=tolerance, rel=1e-9)


def exact_precision_recall(real: np.ndarray, generated: np.ndarray, k: int = 3) -> tuple[float, float]:
    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sqrt(((a[:, None].astype(np.float64) - b[None]) ** 2).sum(-1))

    def share(points: np.ndarray, centres: np.ndarray) -> float:
        radii = np.sort(distances(centres, centres), axis=1)[:, k]
        return float((distances(points, centres) <= radii).any(1).mean())

    return share(generated, real), share(real, generated)


@pytest.mark.parametrize(("offset", "width"), [(0.0, 1.0), (10.0, 1e-2), (100.0, 1e-2), (1000.0, 1e-3)])
def test_precision_and_recall_where_features_lie_close(offset: float, width: float) -> None:
    """fp32 squares and products, as cdist would take for so many rows, are off by percents, up to 1.0 of anything."""
    draw = torch.Generator().manual_seed(0)
    real = offset + width * torch.randn(90, 24, generator=draw)
    generated = offset + width * 1.1 * torch.randn(80, 24, generator=draw)
    assert precision_recall(real, generated) == exact_precision_recall(real.numpy(), generated.numpy())


def test_equal_rows_are_at_distance_zero() -> None:
    """Of nearly uniform pictures many features are the same bits."""
    draw = torch.Generator().manual_seed(0)
    few = 30 + torch.randn(6, 32, generator=draw)
    real, generated = few[torch.arange(60) % 5], few[torch.arange(90) % 6]
    assert precision_recall(real, generated) == (75 / 90, 1.0)
    assert precision_recall(real, generated + 1e-5) == (0.0, 0.0)


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    real, generated = torch.randn(30, 4, generator=draw), torch.randn(20, 4, generator=draw)
    whole = precision_recall(real, generated)
    for size in (1, 70):
        monkeypatch.setattr("dig.evaluation.metrics.DISTANCES_AT_ONCE", size)
        assert precision_recall(real, generated) == whole


def test_precision_and_recall_of_known_sets() -> None:
    real = torch.tensor([[0.0], [1], [2], [3], [10], [11], [12], [13]])
    assert precision_recall(real, real) == (1.0, 1.0)
    # Only one of two clusters is generated, and half of what is generated lies nowhere.
    generated = torch.tensor([[0.5], [1.5], [2.5], [1.25], [100], [101], [102], [103]])
    precision, recall = precision_recall(real, generated, k=2)
    assert precision == 0.5
    assert recall == 0.5
    far = real + 1000
    assert precision_recall(real, far) == (0.0, 0.0)
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(real, real[:3])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fashion(tmp_path_factory.mktemp("data"), train=600)


def invoke(*words: Any) -> Any:
    return runner.invoke(app, list(map(str, words)))


@pytest.fixture(scope="module")
def classifier(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("classifier") / "c.safetensors"
    result = invoke("classifier", "--data", data, "--out", out, "--epochs", 4, "--batch", 50, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "of idx files (test)" in result.output
    return out


def write_npz(path: Path, data: Path, count: int, noise: float = 0.0) -> Path:
    """Samples that are images of the data set, with noise."""
    dataset = IdxImages(data)
    x = torch.cat([dataset[i][0] for i in range(count)])
    pixels = ((x + 1) * 127.5).round().numpy()
    pixels = pixels + noise * np.random.Generator(np.random.Philox(1)).standard_normal(pixels.shape)
    images = pixels.clip(0, 255).astype(np.uint8)[..., None].repeat(3, 3)
    np.savez(path, arr_0=images, about=np.array(json.dumps({"model": "DiG-S/8", "step": 7})))
    return path


def test_the_classifier_learns_and_is_read_back(classifier: Path, data: Path) -> None:
    model = load_classifier(classifier, "cpu")
    assert model.spec.accuracy is not None
    assert model.spec.accuracy > 0.9
    assert not model.training
    with pytest.raises(ValueError, match="cannot read the classifier"):
        load_classifier(data, "cpu")


def test_worse_samples_measure_worse(classifier: Path, data: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows" / "evaluation.jsonl"
    for noise in (0, 30, 120):
        file = write_npz(tmp_path / f"{noise}.npz", data, 200, noise)
        result = invoke(
            "evaluate", "--samples", file, "--data", data, "--classifier", classifier, "--append", rows,
            "--device", "cpu",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "Fréchet distance of the classifier: " in result.output
        assert "FID" not in result.output
    clean, noisy, ruined = (json.loads(line) for line in rows.read_text().splitlines())
    assert clean["distance"] < noisy["distance"] < ruined["distance"]
    # Images of the data set are as near to it as its halves are to each other.
    assert clean["distance"] < 3 * clean["distance_of_data"] < ruined["distance"]
    assert clean["precision"] > 0.8 > ruined["precision"]
    assert clean["recall"] > 0.8 > ruined["recall"]
    assert (clean["samples"], clean["reference"], clean["of"]["step"]) == (200, 200, 7)
    assert all(math.isfinite(row["distance"]) for row in (clean, noisy, ruined))


def test_several_files_at_once_and_a_part_of_each(classifier: Path, data: Path, tmp_path: Path) -> None:
    """The same numbers as one by one, and as of files that hold no more."""
    files = [write_npz(tmp_path / f"{count}.npz", data, count, noise=20) for count in (60, 40)]
    words = ["evaluate", "--data", data, "--classifier", classifier, "--device", "cpu", "--reference", 50]

    def rows(*options: object) -> list[dict[str, Any]]:
        path = tmp_path / "rows.jsonl"
        path.unlink(missing_ok=True)
        result = invoke(*words, *options, "--append", path)
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in path.read_text().splitlines()]

    together = rows("--samples", files[0], "--samples", files[1])
    assert together == [*rows("--samples", files[0]), *rows("--samples", files[1])]
    assert [row["samples"] for row in together] == [60, 40]
    cut = write_npz(tmp_path / "cut.npz", data, 60, noise=20)
    with np.load(files[0]) as file:
        np.savez(cut, arr_0=file["arr_0"][:40], about=file["about"])
    assert rows("--samples", files[0], "--count", 40) == rows("--samples", cut)
    for options, message in (
        (("--count", 50), "fewer than --count 50"),
        (("--count", 0), "count must be at least 4"),
    ):
        result = invoke(*words, "--samples", files[0], "--samples", files[1], *options)
        assert result.exit_code == 2
        assert message in result.output
    result = invoke(*words[:-2], "--samples", files[0], "--samples", files[1])
    assert result.exit_code == 2
    assert "different numbers of samples" in result.output


def test_inception_is_called_fid_and_its_weights_are_looked_at_first(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for torch-fidelity: the real one is 90 MB of weights, and torchvision."""

    class Stub(torch.nn.Module):
        def __init__(self, name: str, features: list[str], feature_extractor_weights_path: str) -> None:
            super().__init__()
            assert features == ["2048"]
            self.scale = torch.load(feature_extractor_weights_path, weights_only=True)["scale"]

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            assert x.dtype == torch.uint8
            assert x.shape[1:] == (3, 32, 32)
            return (self.scale * x.float().mean((2, 3)),)

    package, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Stub  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    monkeypatch.setattr("dig.packages.is_installed", lambda name: True)
    torch.save({"scale": torch.ones(())}, tmp_path / "weights.pth")
    samples = write_npz(tmp_path / "s.npz", data, 50)
    words = ["evaluate", "--samples", samples, "--data", data, "--device", "cpu", "--inception"]
    result = invoke(*words, tmp_path / "weights.pth")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("FID: ")
    torch.save({"scale": Path}, tmp_path / "evil.pth")
    for name, message in (("evil.pth", "is not read"), ("none.pth", "does not exist")):
        result = invoke(*words, tmp_path / name)
        assert result.exit_code == 2
        assert message in result.output


def test_missing_torch_fidelity_names_the_extra(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dig.packages.is_installed", lambda name: False)
    samples = write_npz(tmp_path / "s.npz", data, 5)
    result = invoke("evaluate", "--samples", samples, "--data", data, "--inception", tmp_path / "w", "--device", "cpu")
    assert result.exit_code == 2
    assert "pip install 'dig-diffusion[fid]'" in result.output


def test_bad_input(data: Path, classifier: Path, tmp_path: Path) -> None:
    good = write_npz(tmp_path / "s.npz", data, 10)
    np.savez(tmp_path / "latents.npz", latents=np.zeros((2, 4, 4, 4)))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((9, 4, 4, 3), dtype=np.uint8))
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((3, 32, 32, 3), dtype=np.uint8))
    (tmp_path / "broken.npz").write_bytes(b"nothing")
    features = ["--classifier", classifier]
    for samples, options, message in (
        (good, [], "choose the features"),
        (good, [*features, "--inception", classifier], "choose the features"),
        (good, ["--classifier", good], "cannot read the classifier"),
        (tmp_path / "latents.npz", features, "holds latents"),
        (tmp_path / "floats.npz", features, "must hold images as (N, H, W, 3) uint8"),
        (tmp_path / "small.npz", features, "the samples are 4x4, the data 32x32"),
        (tmp_path / "few.npz", features, "more than 3 images"),
        (tmp_path / "broken.npz", features, "cannot read"),
        (tmp_path / "none.npz", features, "cannot read"),
    ):
        result = invoke("evaluate", "--samples", samples, "--data", data, "--device", "cpu", *options)
        assert result.exit_code == 2, (samples, result.output)
        assert message in result.output, result.output
        assert result.output.count("error:") == 1
    result = invoke("classifier", "--data", data, "--out", tmp_path / "c", "--epochs", 0)
    assert result.exit_code == 2
    assert "epochs must be a finite number above 0" in result.output


def test_grey_samples_may_have_one_channel(tmp_path: Path) -> None:
    np.savez(tmp_path / "grey.npz", arr_0=np.full((2, 4, 4, 1), 7, dtype=np.uint8))
    images, about = read_samples(tmp_path / "grey.npz")
    assert images.shape == (2, 4, 4, 3)
    assert about == {}
