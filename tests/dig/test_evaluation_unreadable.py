"""Images that cannot be read: left out of what is compared, replaced where only some are taken, counted, and named."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.dig.test_data_images import make_folder
from tests.dig.test_evaluation_inputs import colours, invoke, refused


@pytest.fixture(scope="module")
def folder_classifier(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("classifier") / "c.safetensors"
    result = invoke(
        "classifier", "--data", folder, "--out", out, "--image-size", 16, "--epochs", 1, "--batch", 18,
        "--device", "cpu", "--workers", 0,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return out


def test_unreadable_images_are_not_compared_but_told(
    folder: Path, folder_classifier: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 36, 10 are cut off: 26 images of the data, each once, and the ten by name."""
    root = tmp_path / "data"
    for path in folder.glob("*/*.png"):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        (root / path.parent.name / path.name).write_bytes(path.read_bytes())
    good = tmp_path / "good"
    for path in sorted(root.glob("*/*.png"))[::3][:10]:
        path.write_bytes(path.read_bytes()[:150])
    Image.fromarray(np.zeros((20, 20), dtype=np.float32)).save(root / "a" / "0.png", format="TIFF")
    for path in root.glob("*/*.png"):
        if path.stat().st_size > 150 and path != root / "a" / "0.png":
            (good / path.parent.name).mkdir(parents=True, exist_ok=True)
            (good / path.parent.name / path.name).write_bytes(path.read_bytes())
    rows = tmp_path / "rows.jsonl"
    words = ["evaluate", "--samples", colours(tmp_path / "s.npz", 36), "--image-size", 16]
    words += ["--classifier", folder_classifier, "--device", "cpu", "--append", rows]
    with caplog.at_level(logging.WARNING):
        result = invoke(*words, "--data", root)
    assert result.exit_code == 0, result.output
    assert "26 images of the data (10 more unreadable)" in result.output
    assert (
        "unreadable images of the data, which are not among those compared: 10: a/0.png (its pixels are floating"
        in caplog.text
    )
    assert invoke(*words, "--data", good).exit_code == 0
    spoilt, clean = (json.loads(line) for line in rows.read_text().splitlines())
    assert (spoilt.pop("unreadable_images"), clean.pop("unreadable_images")) == (10, 0)
    # The same 26 images: the same numbers, but for the order of the sums.
    for name, value in clean.items():
        assert spoilt[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
    assert "only 26 images can be read" in refused(*words[:-2], "--data", root, "--reference", 30)
    for path in root.glob("*/*.png"):
        path.write_bytes(b"")
    assert "none of the images can be read" in refused(*words[:-2], "--data", root)


def test_an_unreadable_image_is_replaced_by_another_one(folder: Path, folder_classifier: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for path in folder.glob("*/*.png"):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        (root / path.parent.name / path.name).write_bytes(path.read_bytes() if path.name != "3.png" else b"")
    words = ["evaluate", "--samples", colours(tmp_path / "s.npz", 8), "--image-size", 16, "--data", root]
    result = invoke(*words, "--classifier", folder_classifier, "--device", "cpu", "--reference", 16)
    assert result.exit_code == 0, result.output
    assert "16 images of the data" in result.output


def test_unreadable_images_of_a_classifier_are_counted(folder: Path, tmp_path: Path) -> None:
    roots = []
    for name, bad in (("train", 2), ("test", 3)):
        root = make_folder(tmp_path / name, {"a": 8, "b": 8}, side=16)
        for i in range(bad):
            (root / "a" / f"{i}.png").write_bytes(b"")
        roots.append(root)
    result = invoke(
        "classifier", "--data", roots[0], "--test-data", roots[1], "--out", tmp_path / "c", "--image-size", 16,
        "--epochs", 1, "--batch", 16, "--device", "cpu", "--workers", 0,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "right (3 unreadable); 2 of images in" in result.output
