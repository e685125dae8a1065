"""Ranks that were told different things are refused before anything is made: one line says which, and in what."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dig.training.parallel import joined
from tests.dig.parallel_job import end, printed, start
from tests.dig.test_data_images import make_folder
from tests.dig.test_parallel_faults import said, train
from tests.dig.tiny import TINY, app, make_fashion, make_vae, using


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fashion(tmp_path_factory.mktemp("fashion") / "data", train=30, test=4)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    with using(TINY):
        assert CliRunner().invoke(app, train(data, out, steps=1)).exit_code == 0
    return out


def refused(folder: Path, words: list[str]) -> str:
    ended = end(start(folder, [words]))
    assert ended == [2, 2], printed(folder, 0) + printed(folder, 1)
    (message,) = said(folder)
    assert "go on" not in message
    assert "goes on" not in message
    return message


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "options", [("--parallel", "@ddp|fsdp"), pytest.param(("--sending", "@auto|collectives"), marks=SLOW)]
)
def test_ways_of_training(options: tuple[str, str], data: Path, tmp_path: Path) -> None:
    name, words = options[0].removeprefix("--"), options[1][1:].split("|")
    message = refused(tmp_path, train(data, tmp_path / "run", *options))
    assert f'rank 1 has other option {name} than rank 0 ("{words[1]}", "{words[0]}")' in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_a_rank_cannot(data: Path, tmp_path: Path) -> None:
    message = refused(tmp_path, train(data, tmp_path / "run", "--sending", "copies"))
    assert "ranks can't send by copies: copies go between GPUs, not on a cpu; take sending collectives" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "said_of"),
    [(("--seed", "@1|2"), "seed than rank 0 (2, 1)"),
     pytest.param(("--cfg", "@1.5|2"), "cfg_scale than rank 0 (2.0, 1.5)", marks=SLOW),
     pytest.param(("--model-batch", "@2|4"), "model_batch than rank 0 (4, 2)", marks=SLOW)],
)  # fmt: skip
@pytest.mark.parametrize("output", ["--npz", "--images"])
def test_samples(option: tuple[str, str], said_of: str, output: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / ("out.npz" if output == "--npz" else "out")
    words = ["sample", "--checkpoint", str(run), "--samples", "6", "--steps", "2", "--device", "cpu"]
    assert f"rank 1 has other {said_of}" in refused(tmp_path, [*words, *option, output, str(out)])
    assert not list(tmp_path.glob("out*/*-*"))


def test_latents(tmp_path: Path) -> None:
    images, vae = make_folder(tmp_path / "images", {"cat": 3, "dog": 2}, side=20), make_vae(tmp_path / "vae")
    words = ["encode", str(images), "--out", str(tmp_path / "out"), "--vae", str(vae), "--image-size", "16"]
    message = refused(tmp_path, [*words, "--device", "cpu", "--seed", "@1|2"])
    assert "rank 1 has other seed than rank 0 (2, 1)" in message
    assert not [path for path in (tmp_path / "out").glob("*") if not path.name.startswith(".")]


@pytest.mark.parametrize("fails", ["init_process_group", "new_group"])
def test_ranks_that_do_not_connect(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the store is that of a job before, whose ranks are gone."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Gloo connectFullMesh failed with \n[pair.cc:152] timed out connecting: Connection refused")

    monkeypatch.setattr(torch.distributed, fails, refuse)
    message = r"rank 0 found .* did not connect to the other ranks \(Gloo .* timed out .*\); start all of them anew"
    with pytest.raises(ValueError, match=message), joined("cpu"):
        pass
    assert not torch.distributed.is_initialized()
