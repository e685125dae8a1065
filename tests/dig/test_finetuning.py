"""Training from weights that are there: other classes, another image size, frozen parts."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dig.cli import app
from dig.layers import sincos_position_embedding
from dig.sampling.weights import load_weights
from dig.spec import ModelSpec
from dig.training.initial import fit_weights
from dig.training.resuming import recorded_config
from dig.training.saving import CheckpointError, checkpoint_files, checkpoint_path
from tests.dig.test_training import lines, newest

pytestmark = pytest.mark.usefixtures("tiny_dig")
runner = CliRunner()
TABLE = "y_embedder.embedding_table.weight"
OPTIONS = ["--batch", "4", "--log-every", "1", "--save-every", "2", "--grid-every", "0", "--device", "cpu"]
OPTIONS += ["--image-size", "16", "--ema", "0.5", "--lr", "1e-2"]


def make_classes(root: Path, names: Iterable[str], seed: int = 0) -> Path:
    random = np.random.Generator(np.random.Philox(seed))
    for label in names:
        (root / label).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(random.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(root / label / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classes(tmp_path_factory.mktemp("data") / "pictures", ("cat", "dog"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return make_base(data, tmp_path_factory.mktemp("base") / "run")


def make_base(data: Path, out: Path) -> Path:
    """A run of 3 steps whose weights are far from those that are drawn."""
    result = train(data, out, "--model", "DiG-S/8:scan=causal", "--steps", "3")
    assert result.exit_code == 0, result.output
    return out


def train(data: Path, out: Path, *options: str) -> Any:
    return runner.invoke(app, ["train", "--data", str(data), "--out", str(out), "--workers", "0", *OPTIONS, *options])


def said(result: Any) -> str:
    return " ".join(str(result.output).split())


def parts(run: Path, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in newest(run).items() if name.startswith(prefix)}


def assert_same_bits(run: Path, other: Path) -> None:
    """Weights, averages, moments, random states."""
    ours, theirs = newest(run), newest(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


STILL = ["--steps", "1", "--lr", "1e-30"]
"""A step that moves nothing: what the run began with."""


def test_a_run_begins_with_another_runs_averages(base: Path, data: Path, tmp_path: Path) -> None:
    result = train(data, tmp_path / "run", "--init", str(base), *STILL)
    assert result.exit_code == 0, result.output
    # Model and options are the file's: nobody named them.
    assert "DiG-S/8" in result.output
    assert "scan=causal" in result.output
    before, after = parts(base, "ema."), parts(tmp_path / "run", "model.")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = recorded_config(tmp_path / "run")
    assert config is not None
    assert config.init == load_weights(base, device="cpu").sha256
    assert "label table" not in result.output
    assert "position embedding" not in result.output


def test_other_classes_keep_the_rows_of_those_that_both_have(base: Path, tmp_path: Path) -> None:
    others = make_classes(tmp_path / "data", ("ape", "cat", "dog", "elk"), seed=1)
    result = train(others, tmp_path / "run", "--init", str(base), *STILL)
    assert result.exit_code == 0, result.output
    assert "label table: 2 classes to 4: 2 of the same name kept, 2 new; the row of no class is kept" in said(result)
    old, new = parts(base, "ema.")[TABLE], parts(tmp_path / "run", "model.")[TABLE]
    assert torch.equal(new[[1, 2, 4]], old)
    assert not torch.equal(new[0], new[3])
    assert 0.005 < float(new[[0, 3]].std()) < 0.05  # as drawn: normal(0.02)
    fewer = make_classes(tmp_path / "fewer", ("dog",), seed=1)
    assert train(fewer, tmp_path / "less", "--init", str(base), *STILL).exit_code == 0
    assert torch.equal(parts(tmp_path / "less", "model.")[TABLE], old[[1, 2]])


def test_another_image_size_has_its_own_positions(base: Path, data: Path, tmp_path: Path) -> None:
    result = train(data, tmp_path / "run", "--init", str(base), *STILL, "--image-size", "32")
    assert result.exit_code == 0, result.output
    assert "position embedding: 2x2 tokens to 4x4, computed anew by its fixed formula" in said(result)
    positions = parts(tmp_path / "run", "model.")["pos_embed"]
    assert torch.equal(positions, sincos_position_embedding(64, (4, 4)))


def test_learned_positions_are_interpolated(base: Path) -> None:
    spec = ModelSpec(name="DiS-S/8", input_size=(16, 16), in_channels=3, num_classes=2)
    model = spec.build()
    with torch.no_grad():
        ramp = torch.arange(2.0).repeat_interleave(2)  # by row, of a 2x2 grid
        model.pos_embed[0, 2:] = ramp[:, None]  # type: ignore[index]
        model.pos_embed[0, :2] = 7.0  # type: ignore[index]
    found = replace(load_weights(base, device="cpu"), spec=spec, state=model.state_dict(), class_names=())
    larger = replace(spec, input_size=(16, 32))
    first = fit_weights(found, larger, ("a", "b"), seed=0)
    assert first.notes == ("position embedding: 2x2 tokens to 2x4, interpolated, for it was learned",)
    grid = first.state["pos_embed"][0, 2:, 0].view(2, 4)
    assert torch.allclose(grid[:, :1].expand(-1, 4), grid)
    assert torch.allclose(grid[:, 0], torch.tensor([0.0, 1.0]), atol=0.2)
    assert bool((first.state["pos_embed"][0, :2] == 7).all())
    assert not fit_weights(found, spec, ("a", "b"), seed=0).notes


def test_a_file_that_does_not_say_what_it_is(base: Path, data: Path, tmp_path: Path) -> None:
    state = parts(base, "ema.")
    torch.save(state, tmp_path / "weights.pt")
    nameless = train(data, tmp_path / "run", "--init", str(tmp_path / "weights.pt"), *STILL)
    assert nameless.exit_code == 2
    assert "does not say which model it is" in said(nameless)
    words = ["--init", str(tmp_path / "weights.pt"), "--model", "DiG-S/8:scan=causal", *STILL]
    result = train(data, tmp_path / "run", *words)
    assert result.exit_code == 0, result.output
    assert torch.equal(parts(tmp_path / "run", "model.")[TABLE], state[TABLE])  # as many classes: taken for the same
    three = make_classes(tmp_path / "three", ("a", "b", "c"))
    result = train(three, tmp_path / "other", *words)
    assert "0 of the same name kept, 3 new, for the file doesn't name its classes" in said(result)
    assert torch.equal(parts(tmp_path / "other", "model.")[TABLE][-1], state[TABLE][-1])


def test_weights_of_another_architecture_are_refused(base: Path, data: Path, tmp_path: Path) -> None:
    for words, message in (
        (["--init", str(tmp_path / "none")], "does not exist"),
        (["--init", str(data)], "holds no checkpoint"),
    ):
        result = train(data, tmp_path / "run", "--init", str(base), *words, *STILL)
        assert result.exit_code == 2, result.output
        assert message in said(result)
        assert result.output.count("error:") == 1


def test_a_run_goes_on_without_the_file_that_it_began_with(base: Path, data: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    words = ["--init", str(moved)]
    assert train(data, tmp_path / "whole", *words, "--steps", "4").exit_code == 0
    assert train(data, tmp_path / "run", *words, "--steps", "2").exit_code == 0
    # The same command goes on too, also where the folder has a newer checkpoint by now.
    assert runner.invoke(app, ["train", "--resume", str(moved), "--steps", "4"]).exit_code == 0
    assert train(data, tmp_path / "run", *words, "--steps", "3").exit_code == 0
    shutil.rmtree(moved)
    words = ["train", "--resume", str(tmp_path / "run"), "--steps", "4"]
    result = runner.invoke(app, [*words, "--init", str(base)])
    assert "--init begins another run" in said(result)
    (tmp_path / "run" / "config.toml").unlink()  # its record alone says enough
    result = runner.invoke(app, [*words, "--data", str(data), "--workers", "0"])
    assert result.exit_code == 0, result.output
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


def test_another_file_is_another_run(base: Path, data: Path, tmp_path: Path) -> None:
    file = checkpoint_files(base / "checkpoints")[0]
    earlier = checkpoint_path(base / "checkpoints", 2)
    assert train(data, tmp_path / "run", "--init", str(file), "--steps", "2").exit_code == 0
    result = train(data, tmp_path / "run", "--init", str(earlier), "--steps", "3")
    assert result.exit_code == 2
    assert "holds another run (init: " in said(result)
    result = train(data, tmp_path / "run", "--model", "DiG-S/8:scan=causal", "--steps", "3")
    assert "holds another run (init: , " in said(result)


def test_a_run_that_came_to_no_checkpoint_reads_the_file_again(base: Path, data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path / "run", "--init", str(base), *STILL).exit_code == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    result = runner.invoke(app, ["train", "--resume", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert torch.equal(parts(tmp_path / "run", "model.")[TABLE], parts(base, "ema.")[TABLE])


def test_frozen_parameters_stay_and_the_others_move(base: Path, data: Path, tmp_path: Path) -> None:
    words = ["--init", str(base), "--weight-decay", "0.5", "--freeze", "blocks.0.*", "--freeze", "*embedder*"]
    assert train(data, tmp_path / "whole", *words, "--steps", "4").exit_code == 0
    begun, after, averages = parts(base, "ema."), parts(tmp_path / "whole", "model."), parts(tmp_path / "whole", "ema.")
    for name, tensor in after.items():
        frozen = name.startswith("blocks.0.") or "embedder" in name or name == "pos_embed"
        assert torch.equal(tensor, begun[name]) == frozen, name
        assert not frozen or torch.equal(averages[name], begun[name]), name
    # The optimizer holds nothing for them.
    moments = parts(tmp_path / "whole", "optimizer.exp_avg.")
    assert moments
    assert not [name for name in moments if name.startswith("blocks.0.") or "embedder" in name]
    assert train(data, tmp_path / "run", *words, "--steps", "2").exit_code == 0
    assert runner.invoke(app, ["train", "--resume", str(tmp_path / "run"), "--steps", "4"]).exit_code == 0
    assert_same_bits(tmp_path / "run", tmp_path / "whole")
    result = train(data, tmp_path / "run", "--init", str(base), "--steps", "6")
    assert "freeze: [], ['blocks.0.*', '*embedder*']" in said(result)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--freeze", "block.0.*"], "--freeze 'block.0.*' matches no parameter; names are x_embedder.proj.weight"),
        (["--freeze", "*"], "leaves nothing to train"),
        (["--lora", "4", "--lora-target", "attn"], "--lora-target 'attn' matches no linear layer"),
        (["--lora-target", "*"], "--lora-target chooses layers for --lora"),
        (["--lora", "4", "--freeze", "blocks.0.*"], "lora freezes all but its adapters"),
        (["--lora", "-1"], "lora must be a rank"),
    ],
)
def test_what_can_not_be_frozen_or_adapted(
    words: list[str], message: str, base: Path, data: Path, tmp_path: Path
) -> None:
    result = train(data, tmp_path / "run", "--init", str(base), *words)
    assert result.exit_code == 2, result.output
    assert message in said(result)
    assert result.output.count("error:") == 1
    assert not (tmp_path / "run" / "train.jsonl").exists()


def test_adapters_need_weights_that_were_trained(data: Path, tmp_path: Path) -> None:
    result = train(data, tmp_path / "run", "--model", "DiG-S/8", "--lora", "4")
    assert result.exit_code == 2
    assert "name them by --init" in said(result)


def test_a_dry_run_says_what_is_trained(base: Path, data: Path, tmp_path: Path) -> None:
    result = train(data, tmp_path / "run", "--init", str(base), "--freeze", "*block*", "--steps", "3", "--dry-run")
    assert result.exit_code == 0, result.output
    trained = int(result.stdout.split("trained: ")[1].split(" ")[0].replace(",", ""))
    assert trained == sum(
        tensor.numel() for name, tensor in parts(base, "ema.").items() if "block" not in name and name != "pos_embed"
    )
    assert not (tmp_path / "run").exists()


def test_state_that_does_not_fit_says_whose_it_is(base: Path) -> None:
    found = load_weights(base, device="cpu")
    with pytest.raises(CheckpointError, match="does not hold DiG-S/8"):
        fit_weights(replace(found, state={"x": torch.zeros(1)}), found.spec, ("cat", "dog"), seed=0)
