"""Sampling by command: same seed, same images, however they are cut; published files told for what they are."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from dig.checkpoints import to_release
from dig.cli import app
from dig.declared import DIG
from dig.diffusion import sample
from dig.family import Family
from dig.graphs import CaptureError
from dig.layers import Backbone
from dig.registry import list_variants, register
from dig.sampling import runner as runs
from dig.sampling.classes import parse_classes
from dig.sampling.images import make_grid, to_pixels
from dig.sampling.weights import load_weights
from dig.spec import create_model
from dig.training.saving import checkpoint_files
from tests.dig.fake_graph import capture_fake
from tests.dig.test_training import damage_bytes
from tests.dig.tiny import make_fashion, using
from tests.helpers import randomize

pytestmark = pytest.mark.usefixtures("tiny_dig")

runner = CliRunner()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on pixels, whose averaged weights differ from the last ones."""
    folder = tmp_path_factory.mktemp("run")
    data = make_fashion(folder / "data")
    options = ["--model", "DiG-S/8", "--steps", "4", "--batch", "8", "--lr", "1e-2", "--ema", "0.5", "--device", "cpu"]
    options += ["--save-every", "2", "--log-every", "1", "--grid-every", "0"]
    result = runner.invoke(app, ["train", "--data", str(data), "--out", str(folder / "run"), *options])
    assert result.exit_code == 0, result.output
    return folder / "run"


def draw(checkpoint: Path, *options: str, steps: int = 3) -> Any:
    words = ["sample", "--checkpoint", str(checkpoint), "--device", "cpu", "--steps", str(steps), *options]
    return runner.invoke(app, words)


def images(checkpoint: Path, file: Path, *options: str, steps: int = 3) -> Any:
    result = draw(checkpoint, "--npz", str(file), *options, steps=steps)
    assert result.exit_code == 0, result.output
    return np.load(file)["arr_0"]


def test_images_are_of_the_averaged_weights(run: Path, tmp_path: Path) -> None:
    """The command's images are those of `dig.diffusion.sample` on the checkpoint's EMA, in ADM's format."""
    options = ["--classes", "3,7", "--cfg", "1.5", "--samples", "5", "--seed", "11", "--grid", str(tmp_path / "g.png")]
    ours = images(run, tmp_path / "out.npz", *options)
    assert ours.dtype == np.uint8
    assert ours.shape == (5, 32, 32, 3)
    file = np.load(tmp_path / "out.npz")
    assert file["arr_1"].tolist() == [3, 7, 3, 7, 3]
    about = json.loads(str(file["about"]))
    assert (about["model"], about["step"], about["plan"]["sampler"]) == ("DiG-S/8", 4, "ddim")
    model = load_weights(run, device="cpu").build("cpu")
    x = sample(model, torch.tensor([3, 7, 3, 7, 3]), sampler="ddim", steps=3, cfg_scale=1.5, seed=11)
    assert np.abs(ours.astype(int) - to_pixels(x).astype(int)).max() <= 1
    assert np.asarray(Image.open(tmp_path / "g.png")).shape == (32, 10 * 34 - 2, 3)
    # Not of the last weights.
    tensors = runs_tensors(run, "model.")
    model.load_state_dict(tensors)
    other = sample(model, torch.tensor([3, 7, 3, 7, 3]), sampler="ddim", steps=3, cfg_scale=1.5, seed=11)
    assert np.abs(ours.astype(int) - to_pixels(other).astype(int)).max() > 1


def runs_tensors(run: Path, prefix: str) -> dict[str, torch.Tensor]:
    from dig.training.saving import read_checkpoint

    return read_checkpoint(checkpoint_files(run / "checkpoints")[0], prefix).tensors


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_no_split_changes_a_bit(run: Path, tmp_path: Path, sampler: str) -> None:
    options = ["--sampler", sampler, "--classes", "1,2,5", "--cfg", "2"]
    whole = images(run, tmp_path / "whole.npz", *options, "--samples", "37")
    for batch in (1, 5, 64):
        again = images(run, tmp_path / f"{batch}.npz", *options, "--samples", "37", "--batch", str(batch))
        assert np.array_equal(again, whole)
    # Files too, byte for byte, where the options that they tell of are the same.
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    tail = images(run, tmp_path / "tail.npz", *options, "--samples", "6", "--first", "31")
    assert np.array_equal(tail, whole[31:])
    other = images(run, tmp_path / "other.npz", *options, "--samples", "37", "--seed", "1")
    assert not np.array_equal(other, whole)
    assert len({image.tobytes() for image in whole}) == 37


def test_interrupted_batches_are_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--samples", "40", "--batch", "6"]
    whole = images(run, tmp_path / "whole.npz", *options)
    made: list[int] = []
    batch = runs.BatchSampler.batch

    def interrupted(self: Any, number: int) -> Any:
        made.append(number)
        if len(made) == 5:
            raise KeyboardInterrupt
        return batch(self, number)

    file = tmp_path / "out.npz"
    monkeypatch.setattr(runs.BatchSampler, "batch", interrupted)
    assert draw(run, "--npz", str(file), *options).exit_code != 0
    assert not file.exists()
    parts = sorted((tmp_path / "out.npz.parts").glob("part-*.npy"))
    assert 1 <= len(parts) < 7
    result = draw(run, "--npz", str(file), "--samples", "40", "--batch", "6", "--seed", "9")
    assert result.exit_code == 2
    assert "holds the beginning of other samples" in result.output
    result = draw(run, "--npz", str(file), *options)
    assert result.exit_code == 0
    assert f"({6 * len(parts)} made before)" in result.output
    assert np.array_equal(np.load(file)["arr_0"], whole)
    assert not (tmp_path / "out.npz.parts").exists()


def test_the_null_label_is_the_models(run: Path) -> None:
    model = load_weights(run, device="cpu").build("cpu")
    assert parse_classes("null,1", (), 10, model.null_label) == (10, 1)
    assert parse_classes(None, (), 3, 3) == (0, 1, 2)
    assert parse_classes("bag, 2,SHOE", ("hat", "Bag", "shoe"), 3, 3) == (1, 2, 2)
    with pytest.raises(ValueError, match="did you mean shoe"):
        parse_classes("shoo", ("hat", "bag", "shoe"), 3, 3)
    with pytest.raises(ValueError, match="0 to 2"):
        parse_classes("3", ("hat", "bag", "shoe"), 3, 3)
    with pytest.raises(ValueError, match="doesn't name its classes"):
        parse_classes("shoe", (), 3, 3)
    with pytest.raises(ValueError, match="0 to 2"):
        parse_classes("-1", (), 3, 3)


def test_pixels() -> None:
    x = torch.tensor([-2.0, -1, 0, 1, 2]).reshape(1, 1, 1, 5)
    assert to_pixels(x)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert to_pixels(x).shape == (1, 1, 5, 3)
    pixels = np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3)
    grid = make_grid(pixels, 2, gap=1)
    assert grid.shape == (5, 5, 3)
    assert np.array_equal(grid[:2, 3:], pixels[1])
    assert np.array_equal(grid[3:, :2], pixels[2])
    assert (grid[3:, 2:] == 255).all()


def test_damaged_newest_checkpoint_and_single_files(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    latest, earlier = checkpoint_files(copied / "checkpoints")[:2]
    damage_bytes(latest)
    assert load_weights(copied, device="cpu").step == 2
    assert "is damaged" in caplog.text
    result = draw(latest, "--grid", str(tmp_path / "g.png"))
    assert result.exit_code == 2
    assert "is damaged" in result.output
    assert draw(earlier, "--grid", str(tmp_path / "g.png"), "--samples", "2").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to write"),
        (["--grid", "g.png", "--classes", "12"], "there is no class 12: this model has 0 to 9"),
        (["--grid", "g.png", "--classes", "bag"], "there is no class 'bag'"),
        (["--grid", "g.png", "--sampler", "dim"], "sampler must be one of ddpm, ddim"),
        (["--grid", "g.png", "--sampler", "euler"], "trained with the loss hybrid"),
        (["--grid", "g.png", "--eta", "2"], "eta must be 0 to 1"),
        (["--grid", "g.png", "--sampler", "ddpm", "--eta", "1"], "eta is an option of ddim"),
        (["--grid", "g.png", "--cfg-channels", "two"], "--cfg-channels must be three or all"),
        (["--grid", "g.png", "--samples", "0"], "--samples must be at least 1"),
        (["--grid", "g.png", "--cfg", "nan"], "--cfg must be a finite number"),
        (["--grid", "g.png", "--model-batch", "0"], "--model-batch must be at least 1"),
        (["--grid", "g.png", "--first", "-1"], "--first must be 0 or more"),
        (["--grid", "g.foo"], "g.foo would hold a PNG file: give it a name in .png"),
        (["--npz", "o.png"], "o.png would hold a NPZ file: give it a name in .npz"),
        (["--images", "o.png"], "--images names a folder, and o.png would be a file's name: leave out .png"),
        (["--npz", "o.npz", "--batch", "0"], "--batch must be at least 1"),
        (["--grid", "g.png", "--seed", "-1"], "--seed must be 0 to 2^64 - 1"),
        (["--grid", "g.png", "--vae", "sd"], "this model works on pixels: it needs no --vae"),
        (["--npz", "o.npz", "--latents"], "it has no --latents"),
        (["--grid", "g.png", "--execution", "graph"], "needs an NVIDIA GPU"),
        (["--grid", "g.png", "--model", "DiG-S/8"], "says itself which model it is"),
        (["--grid", "g.png", "--num-classes", "5"], "together with --model"),
        (["--grid", "g.png", "--implementation", "triton"], "needs an NVIDIA GPU"),
    ],
)
def test_bad_input(
    run: Path, options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = draw(run, *options)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert result.output.count("error:") == 1
    assert not list(tmp_path.glob("*.npz"))


def test_no_checkpoint(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "does not exist"), (tmp_path, "holds no checkpoint")):
        result = draw(path, "--grid", str(tmp_path / "g.png"))
        assert result.exit_code == 2
        assert message in result.output


def published_model(**changes: Any) -> Backbone:
    arguments: dict[str, Any] = {"input_size": (4, 4), "in_channels": 4, "num_classes": 5, **changes}
    model = create_model("DiG-S/2", **arguments)
    randomize(model)
    return model


def published(file: Path, *options: str) -> Any:
    words = ["--model", "DiG-S/2", "--image-size", "32", "--num-classes", "5", *options]
    return draw(file, "--npz", str(file.with_suffix(".npz")), "--latents", "--samples", "2", *words)


def test_published_files(tmp_path: Path) -> None:
    """Every layout in use gives the same samples: names of the authors' code, wrapped, averaged, safetensors."""
    model = published_model()
    ours, theirs = model.state_dict(), to_release(model.state_dict())
    junk = {name: torch.zeros_like(tensor) for name, tensor in theirs.items()}
    torch.save({"model": junk, "ema": theirs}, tmp_path / "a.pt")
    torch.save({f"module.{name}": tensor for name, tensor in ours.items()}, tmp_path / "b.pt")
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, tmp_path / "c.safetensors")
    found = []
    for name in ("a.pt", "b.pt", "c.safetensors"):
        result = published(tmp_path / name)
        assert result.exit_code == 0, result.output
        found.append(np.load((tmp_path / name).with_suffix(".npz"))["latents"])
    assert found[0].shape == (2, 4, 4, 4)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    expected = sample(model, torch.tensor([0, 1]), sampler="ddim", steps=3)
    assert np.allclose(found[0], expected.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 7}, "it has classes 7 (model: 5); the weights are those of"),
        ({"input_size": (8, 8)}, "tokens (image size) 16 (model: 4)"),
        ({"variant": "release"}, "the weights are those of DiG-S/2:variant=release"),
        ({"in_channels": 5}, "input channels 5 (model: 4)"),
    ],
)
def test_wrong_published_files_are_told_from_their_shapes(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = [entry for entry in list_variants() if entry[0][:5] == "DiG-S"]
    monkeypatch.setattr("dig.sampling.anatomy.list_variants", lambda: variants)
    torch.save(published_model(**changes).state_dict(), tmp_path / "a.pt")
    result = published(tmp_path / "a.pt")
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")


def test_another_family_is_named(own: str, tmp_path: Path) -> None:
    """Among all models there are, by shapes alone; a family that can't be built is none of them."""
    from dig.sampling.anatomy import CheckpointError, check_fit
    from dig.spec import ModelSpec

    def build(name: str, **options: str) -> tuple[Backbone, ModelSpec]:
        spec = ModelSpec(name=name, options=options, input_size=(4, 4), in_channels=4, num_classes=5)
        with torch.device("meta"):
            return spec.build(), spec

    def broken(size: str, **shape: Any) -> Backbone:
        raise RuntimeError("a package that is half installed")

    register(Family(name="Broken", sizes=("S",), build=broken))
    with using(DIG):
        given, _ = build("DiG-B/2", variant="release")
        asked, spec = build("DiT-S/2")
        with pytest.raises(CheckpointError) as caught:
            check_fit(given.state_dict(), asked, spec, tmp_path / "a.pt")
    assert "width 768 (model: 384)" in str(caught.value)
    assert "the weights are those of DiG-B/2:variant=release" in str(caught.value)


class Evil:
    def __reduce__(self) -> Any:
        return (open, ("evil-was-here", "w"))


@pytest.mark.parametrize(
    "content",
    [{"ema": {}, "args": Namespace(model=Evil())}, {"ema": {}, "args": Path("x")}, Evil()],
    ids=["within", "beside", "alone"],
)
def test_pickles_are_refused_unread(content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "a.pt")
    result = published(tmp_path / "a.pt")
    assert result.exit_code == 2
    assert "is refused: it holds more than tensors" in result.output
    assert not (tmp_path / "evil-was-here").exists()


def test_other_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"not a checkpoint at all")
    (tmp_path / "b.safetensors").write_bytes(b"neither")
    torch.save({"epoch": 3, "loss": [1.0]}, tmp_path / "c.pt")
    torch.save(torch.zeros(3), tmp_path / "d.pt")
    for name in ("a.pt", "b.safetensors", "c.pt", "d.pt"):
        result = published(tmp_path / name)
        assert result.exit_code == 2, name
        assert result.output.count("error:") == 1
        assert name in result.output
    torch.save(published_model().state_dict(), tmp_path / "e.pt")
    result = draw(tmp_path / "e.pt", "--grid", str(tmp_path / "g.png"))
    assert "does not say which model it is" in result.output


def test_latents_need_a_vae(tmp_path: Path) -> None:
    torch.save(published_model().state_dict(), tmp_path / "a.pt")
    words = ["--model", "DiG-S/2", "--image-size", "32", "--num-classes", "5", "--samples", "2"]
    result = draw(tmp_path / "a.pt", "--grid", str(tmp_path / "g.png"), *words)
    assert result.exit_code == 2
    assert "give --vae" in result.output
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
    )
    vae.save_pretrained(tmp_path / "vae")
    decoded = images(tmp_path / "a.pt", tmp_path / "o.npz", "--vae", str(tmp_path / "vae"), *words)
    assert draw(tmp_path / "a.pt", "--npz", str(tmp_path / "l.npz"), "--latents", *words).exit_code == 0
    latents = torch.from_numpy(np.load(tmp_path / "l.npz")["latents"])
    with torch.no_grad():
        expected = to_pixels(vae.decode(latents / 0.18215).sample)
    assert decoded.shape == (2, 8, 8, 3)
    assert np.abs(decoded.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver++"])
def test_a_captured_loop_gives_the_same_samples(sampler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch after batch, each with noise and classes of its own; the model alone is run before the capture."""
    monkeypatch.setattr("dig.sampling.runner.capture", capture_fake)
    model = create_model("DiG-S/8", input_size=(16, 16), in_channels=1, num_classes=10).eval()
    randomize(model, 0.02)
    plan = runs.SamplePlan(
        classes=(1, 2), count=8, sampler=sampler, steps=3, cfg_scale=1.5, cfg_channels="all", model_batch=2
    )
    found = [
        runs.BatchSampler(model, plan, torch.device("cpu"), graph=graph, finish=lambda x: x.numpy().copy())
        for graph in (False, True)
    ]
    ours, theirs = (sampler.samples(range(4)) for sampler in found)
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours[:2], ours[2:])


def test_a_model_that_can_not_be_captured_says_what_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dig.sampling.runner.capture", capture_fake)
    model = create_model("DiG-S/8", input_size=(16, 16), in_channels=1, num_classes=10).eval()
    model.register_forward_hook(lambda _model, _inputs, output: output * output.sum().item())
    plan = runs.SamplePlan(classes=(1,), count=1, steps=2, model_batch=1)
    sampler = runs.BatchSampler(model, plan, torch.device("cpu"), graph=True)
    with pytest.raises(CaptureError, match=r"reads a value from the GPU.*; or sample with execution eager"):
        sampler.batch(0)
