"""Low-rank adapters: trained in place of the weights, gone on with, written as peft's, and merged again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dig.cli import app
from dig.sampling.weights import load_weights
from tests.dig.test_finetuning import TABLE, assert_same_bits, make_base, make_classes, parts, said, train
from tests.dig.test_training import lines

pytestmark = pytest.mark.usefixtures("tiny_dig")
runner = CliRunner()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classes(tmp_path_factory.mktemp("data") / "pictures", ("cat", "dog"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return make_base(data, tmp_path_factory.mktemp("base") / "run")


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
    for content, message in (
        ("{", "is damaged"),
        (json.dumps({**about, "step": "x"}), "step must be a whole number; got 'x'"),
    ):
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
