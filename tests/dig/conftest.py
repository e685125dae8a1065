"""What several modules of these tests work with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from tests.dig.encoded import COUNTS
from tests.dig.encoded import run as encode
from tests.dig.test_data_images import make_folder
from tests.dig.tiny import TINY, app, make_fashion, make_vae, using

if TYPE_CHECKING:
    from dig.training.parallel import Ranks
    from dig.training.parallel.watching import Watch


@pytest.fixture(scope="module")
def tiny_dig() -> Iterator[None]:
    """Any DiG is a tiny one, while this module's tests run."""
    with using(TINY):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Idx files of 300 images and 100 to test with."""
    return make_fashion(tmp_path_factory.mktemp("fashion"))


@pytest.fixture(scope="module")
def run(tiny_dig: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step."""
    data, out = make_fashion(tmp_path_factory.mktemp("data"), train=20), tmp_path_factory.mktemp("run") / "run"
    words = ["train", "--model", "DiG-S/8", "--data", str(data), "--out", str(out), "--steps", "1", "--device", "cpu"]
    assert CliRunner().invoke(app, [*words, "--grid-every", "0"]).exit_code == 0
    return out


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
    assert encode(images, out, vae).joined
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 images in colour, 16 pixels of which are read."""
    return make_folder(tmp_path_factory.mktemp("folder") / "data", {"a": 18, "b": 18}, side=16)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """A job of one."""
    from dig.training.parallel import joined

    with joined("cpu", hang_seconds=30) as found:
        yield found


@pytest.fixture
def watch(ranks: Ranks) -> Iterator[Watch]:
    """What watches it."""
    from dig.training.parallel.watching import Watch

    found = Watch(ranks, remedy="go on", leave=lambda _status: None)
    try:
        yield found
    finally:
        found.leave()
