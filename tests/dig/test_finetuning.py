"""Training from weights that are there: other classes, another image size, frozen parts, low-rank adapters."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
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
    """A run of 3 steps whose weights are far from those that are drawn."""
    out = tmp_path_factory.mktemp("base") / "run"
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


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Path:
    pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("adapted") / "run"
    result = train(data, out, "--init", str(base), "--lora", "4", "--steps", "4")
    assert result.exit_code == 0, result.output
    return out


def draw(out: Path, *words: str) -> np.ndarray:
    options = ["--npz", str(out), "--samples", "4", "--steps", "2", "--device", "cpu"]
    result = runner.invoke(app, ["sample", *options, *words])
    assert result.exit_code == 0, result.output
    return np.asarray(np.load(out)["arr_0"])


def test_only_adapters_are_trained(adapted: Path, base: Path) -> None:
    before, after = parts(base, "ema."), parts(adapted, "model.")
    low_rank = [name for name in after if ".lora_A." in name or ".lora_B." in name]
    assert len(low_rank) == 2 * 12  # six linear layers a block, two blocks
    assert all(after[name].abs().max() > 0 for name in low_rank)
    for name, tensor in after.items():
        if name not in low_rank:
            assert torch.equal(tensor, before[name.replace(".base_layer", "")]), name
    assert parts(adapted, "optimizer.exp_avg.").keys() == set(low_rank)


def test_adapters_go_on_bit_for_bit(adapted: Path, base: Path, data: Path, tmp_path: Path) -> None:
    words = ["--init", str(base), "--lora", "4"]
    assert train(data, tmp_path / "run", *words, "--steps", "2").exit_code == 0
    result = runner.invoke(app, ["train", "--resume", str(tmp_path / "run"), "--steps", "4"])
    assert result.exit_code == 0, result.output
    assert_same_bits(tmp_path / "run", adapted)
    assert lines(tmp_path / "run") == lines(adapted)
    files = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (tmp_path / "run", adapted)]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    result = train(data, tmp_path / "run", "--init", str(base), "--lora", "2", "--steps", "6")
    assert "lora: 2, 4" in said(result)


def test_an_adapter_is_pefts_and_samples_as_the_run_does(adapted: Path, base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    found = load_weights(base, device="cpu")
    model = found.spec.build()
    model.load_state_dict(found.state)
    theirs = peft.PeftModel.from_pretrained(model.eval(), str(adapted / "adapter"))
    ours = load_weights(adapted, device="cpu").build("cpu")
    torch.manual_seed(0)
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0]), torch.tensor([0, 2])
    with torch.no_grad():
        plain = found.build("cpu")(x, t, y)
        expected, actual = theirs(x, t, y), ours(x, t, y)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
    assert float((actual - plain).abs().max()) > 1e-3
    by_run = draw(tmp_path / "a.npz", "--checkpoint", str(base), "--adapter", str(adapted))
    by_folder = draw(tmp_path / "b.npz", "--checkpoint", str(base), "--adapter", str(adapted / "adapter"))
    alone = draw(tmp_path / "c.npz", "--checkpoint", str(adapted))
    assert np.array_equal(by_run, by_folder)
    assert np.array_equal(by_run, alone)
    assert not np.array_equal(by_run, draw(tmp_path / "d.npz", "--checkpoint", str(base)))
    about = json.loads(str(np.load(tmp_path / "a.npz")["about"]))
    assert len(about["adapter_sha256"]) == 64
    assert about["step"] == 4


def test_new_classes_are_learned_beside_the_adapters(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    others = make_classes(tmp_path / "data", ("ape", "dog", "elk"), seed=1)
    words = ["--init", str(base), "--lora", "2", "--lora-target", "*.attn.*", "--image-size", "32"]
    result = train(others, tmp_path / "run", *words, "--steps", "4")
    assert result.exit_code == 0, result.output
    after = parts(tmp_path / "run", "model.")
    trained = f"y_embedder.modules_to_save.default.{TABLE.partition('.')[2]}"
    first = after[f"y_embedder.original_module.{TABLE.partition('.')[2]}"]
    assert torch.equal(first[[1, 3]], parts(base, "ema.")[TABLE][[1, 2]])
    assert not torch.equal(after[trained][0], first[0])
    by_base = draw(
        tmp_path / "a.npz", "--checkpoint", str(base), "--adapter", str(tmp_path / "run"), "--classes", "elk"
    )
    assert by_base.shape[1:] == (32, 32, 3)
    assert np.array_equal(by_base, draw(tmp_path / "b.npz", "--checkpoint", str(tmp_path / "run"), "--classes", "elk"))
    result = runner.invoke(app, ["train", "--resume", str(tmp_path / "run"), "--steps", "5"])
    assert result.exit_code == 0, result.output


def refused(*words: str) -> str:
    result = runner.invoke(app, ["sample", "--grid", "g.png", "--samples", "1", "--device", "cpu", *words])
    assert result.exit_code == 2, result.output
    assert result.output.count("error:") == 1
    return said(result)


def test_adapters_that_do_not_fit_are_refused(adapted: Path, base: Path, data: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", str(base), "--adapter"]
    assert "holds no adapter" in refused(*words, str(base))
    folder = Path(shutil.copytree(adapted / "adapter", tmp_path / "adapter"))
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    changes: list[tuple[dict[str, torch.Tensor], str]] = [
        ({**tensors, name: tensors[name] * torch.nan}, "is not finite"),
        ({**tensors, name: tensors[name][:, :-1].contiguous()}, "is no adapter of DiG-S/8"),
        ({other: tensor for other, tensor in tensors.items() if other != name}, "do not fit"),
        ({**tensors, "base_model.model.x.lora_A.weight": tensors[name].clone()}, "do not fit"),
    ]
    for changed, message in changes:
        save_file(changed, path)
        assert message in refused(*words, str(folder))
    path.write_bytes(b"<html>")
    assert "is no adapter of" in refused(*words, str(folder))
    save_file(tensors, path)
    about = json.loads((folder / "dig.json").read_text())
    for content, message in (("{", "is damaged"), (json.dumps({**about, "step": "x"}), "step can't be 'x'")):
        (folder / "dig.json").write_text(content)
        assert message in refused(*words, str(folder))
    (folder / "dig.json").unlink()  # of peft's alone
    draw(tmp_path / "a.npz", *words, str(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["nowhere"]}))
    assert "is no adapter of" in refused(*words, str(folder))
    assert train(data, tmp_path / "other", "--model", "DiG-S/8:scan=causal", "--steps", "1").exit_code == 0
    assert "adapts other weights" in refused("--checkpoint", str(tmp_path / "other"), "--adapter", str(adapted))


def test_without_peft_one_line_says_what_to_install(
    base: Path, adapted: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dig.packages.is_installed", lambda module: False)
    result = train(data, tmp_path / "run", "--init", str(base), "--lora", "4", "--steps", "1")
    assert result.exit_code == 2
    assert "--lora needs the package peft; install it with: pip install 'dig-diffusion[lora]'" in said(result)
    assert "--adapter needs the package peft" in refused("--checkpoint", str(base), "--adapter", str(adapted))


def test_training_without_adapters_imports_no_peft(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert train(data, tmp_path / "run", "--model", "DiG-S/8", "--steps", "1").exit_code == 0


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
