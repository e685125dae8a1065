"""What only a GPU shows of training and sampling: the CUDA graph is the eager step, and a resumed run the same bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dig.registry import parse_model
from dig.sampling.runner import BatchSampler, SamplePlan
from dig.spec import ModelSpec, create_model
from dig.training.config import DataSpec, TrainConfig
from dig.training.data import IdxImages
from dig.training.saving import checkpoint_files, read_checkpoint
from dig.training.trainer import NotFiniteLossError, Trainer
from tests.dig.tiny import make_fashion
from tests.helpers import randomize, relative_error

pytestmark = pytest.mark.gpu

MODELS = ["DiG-S/4", "Flash-DiT-S/4"]


@pytest.fixture(autouse=True)
def _mode() -> Iterator[None]:
    """What a training run asks of PyTorch stays in the process; other tests should not get it."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> IdxImages:
    return IdxImages(make_fashion(tmp_path_factory.mktemp("fashion")))


def train(folder: Path, data: IdxImages, model: str, steps: int, **fields: Any) -> list[float]:
    """Losses of the steps that the log has so far."""
    name, options, _ = parse_model(model, "cuda")
    side = data.sample_shape[1]
    spec = ModelSpec(name=name, options=options, input_size=(side, side), in_channels=1, num_classes=10)
    config = TrainConfig(
        model=spec, data=DataSpec.of(data), device="cuda", steps=steps, batch=32, log_every=1, keep=1, **fields
    )
    Trainer(config, data, folder).run()
    return [json.loads(line)["loss"] for line in (folder / "train.jsonl").read_text().splitlines()]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(checkpoint_files(folder / "checkpoints")[0]).tensors


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_resumed_is_the_same_bit_for_bit(model: str, execution: str, data: IdxImages, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"execution": execution, "clip": 1.0, "ema": 0.9}
    whole = train(tmp_path / "whole", data, model, 10, **fields)
    train(tmp_path / "run", data, model, 4, **fields)
    assert train(tmp_path / "run", data, model, 10, **fields) == whole
    ours, theirs = tensors(tmp_path / "run"), tensors(tmp_path / "whole")
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


@pytest.mark.parametrize("model", ["DiG-S/2", "Flash-DiT-S/2", "Flash-DiT-S/2:flash-attn"])
def test_long_sequences_repeat_too(model: str, tmp_path: Path) -> None:
    """1,024 tokens: attention's backward pass then adds up tiles, in any order unless it is told otherwise."""
    if model.endswith("flash-attn"):
        pytest.importorskip("flash_attn")
    data = IdxImages(make_fashion(tmp_path / "data"), image_size=64)
    runs = [train(tmp_path / name, data, model, 5, execution="graph") for name in ("first", "second")]
    assert runs[0] == runs[1]
    ours, theirs = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_recomputed_blocks_are_the_same_bits(data: IdxImages, tmp_path: Path) -> None:
    """Of DiG on its own kernels, in a graph, whose side stream the recomputation must not disturb."""
    plain = train(tmp_path / "plain", data, "DiG-S/4", 5, execution="graph")
    assert train(tmp_path / "again", data, "DiG-S/4", 5, execution="graph", checkpoint_blocks=True) == plain


@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_a_loss_that_is_not_finite_is_found_at_its_step(execution: str, data: IdxImages, tmp_path: Path) -> None:
    """Though the host runs ahead of the device, and the next line of the log is far away."""
    fields: dict[str, Any] = {"execution": execution, "learning_rate": 1e30, "save_every": 100}
    with pytest.raises(NotFiniteLossError, match="not finite at step 2"):
        train(tmp_path, data, "DiG-S/4", 100, **fields)
    assert not checkpoint_files(tmp_path / "checkpoints")


def test_averages_in_a_graph_are_those_of_eager_steps(data: IdxImages, tmp_path: Path) -> None:
    """The decay rises with the optimizer's count of steps, which a graph reads where it lies."""
    for execution in ("eager", "graph"):
        train(tmp_path / execution, data, "DiG-S/4", 6, execution=execution, learning_rate=1e-3)
    ours, theirs = tensors(tmp_path / "graph"), tensors(tmp_path / "eager")
    for name in ours:
        if name.startswith("ema.") and ours[name].numel() > 1:
            assert relative_error(ours[name], theirs[name]) < 2e-2, name


@pytest.mark.parametrize("model", MODELS)
def test_executions_agree(model: str, data: IdxImages, tmp_path: Path) -> None:
    eager = train(tmp_path / "eager", data, model, 6, accumulate=2)
    for execution in ("graph", "compile"):
        other = train(tmp_path / execution, data, model, 6, accumulate=2, execution=execution)
        assert other == pytest.approx(eager, rel=2e-3)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_sampling_graph_is_the_loop(sampler: Any) -> None:
    name, options, _ = parse_model("DiG-S/4", "cuda")
    model = create_model(name, input_size=(32, 32), in_channels=1, num_classes=10, **options)
    randomize(model, 0.02)
    model.cuda().eval()
    plan = SamplePlan(
        classes=(1, 2),
        count=8,
        sampler=sampler,
        steps=6,
        cfg_scale=1.5,
        cfg_channels="all",
        model_batch=4,
        precision="autocast",
    )
    found = []
    for graph in (False, True):
        sampled = BatchSampler(model, plan, torch.device("cuda"), graph=graph, finish=lambda x: x.cpu().numpy())
        found.append(sampled.samples(range(8)))
    assert relative_error(torch.from_numpy(found[1]), torch.from_numpy(found[0])) < 1e-5
    assert not np.array_equal(found[1][:4], found[1][4:])  # the second replay has noise of its own
