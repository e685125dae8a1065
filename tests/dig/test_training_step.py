"""One training step: its inputs, what it computes, and what it can be asked to do otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dig.diffusion import build_loss
from dig.graphs import CaptureError
from dig.layers import Backbone
from dig.spec import ModelSpec, create_model
from dig.training.config import DataSpec, TrainConfig, choose_execution
from dig.training.data import Batch
from dig.training.inputs import step_inputs
from dig.training.needs import draws_in_training
from dig.training.resuming import CONFIG_NAME, recorded_config
from dig.training.step import TrainingStep, checkpoint_blocks
from tests.dig.fake_graph import capture_fake

pytestmark = pytest.mark.usefixtures("tiny_dig")


def config(**fields: Any) -> TrainConfig:
    spec = ModelSpec(name="DiG-S/8", input_size=(16, 16), in_channels=1, num_classes=10)
    names = tuple(map(str, range(10)))
    described = DataSpec(samples=64, shape=(1, 16, 16), class_names=names, mirror=False)
    return TrainConfig(
        **{"model": spec, "data": described, "device": "cpu", "steps": 9, "batch": 8, "dtype": "fp32", **fields}
    )


def batch_of(step: int) -> Batch:
    return Batch(step=step, x=torch.randn(8, 1, 16, 16), y=torch.arange(8))


def test_config_survives_json() -> None:
    ours = config(accumulate=2, clip=1.0)
    assert TrainConfig.from_json(json.loads(json.dumps(ours.to_json()))) == ours
    assert ours.differences(config(accumulate=2, clip=1.0, steps=100, keep=9)) == []


def test_inputs_are_a_function_of_the_sample() -> None:
    """Whichever way a step is cut, a sample has the same timestep, noise and label; no two share their noise."""
    loss = build_loss("hybrid", device="cpu")
    batch = batch_of(5)
    whole = step_inputs(config(label_dropout=0.5), loss, batch, 10)
    parts = step_inputs(config(label_dropout=0.5, accumulate=4), loss, batch, 10)
    assert parts.noise.shape == (4, 2, 1, 16, 16)
    for name in ("x", "y", "t", "noise"):
        assert torch.equal(getattr(whole, name).flatten(0, 1), getattr(parts, name).flatten(0, 1))
    # Steps 2 of batch 16 and 5 of batch 8 overlap in samples 40 to 47.
    wide = Batch(step=2, x=torch.zeros(16, 1, 16, 16), y=torch.zeros(16, dtype=torch.int64))
    wide_inputs = step_inputs(config(batch=16), loss, wide, 10)
    assert torch.equal(wide_inputs.noise[0, 8:], whole.noise[0])
    assert torch.equal(wide_inputs.t[0, 8:], whole.t[0])
    assert len({tuple(row) for row in wide_inputs.noise[0].flatten(1).tolist()}) == 16
    other = step_inputs(config(seed=1), loss, batch, 10)
    assert not torch.equal(other.noise, whole.noise)
    assert not torch.equal(other.t, whole.t)


def test_inputs_are_distributed_as_they_should() -> None:
    wide = config(batch=4096, label_dropout=0.25)
    batch = Batch(step=3, x=torch.zeros(4096, 1, 16, 16), y=torch.zeros(4096, dtype=torch.int64))
    inputs = step_inputs(wide, build_loss("hybrid", device="cpu"), batch, 7)
    assert (inputs.y == 7).double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert 0 <= int(inputs.t.min()) < 10
    assert 990 <= int(inputs.t.max()) < 1000
    assert inputs.t.double().mean().item() == pytest.approx(499.5, abs=20)
    assert inputs.noise.std().item() == pytest.approx(1, abs=0.01)
    times = step_inputs(wide, build_loss("flow-matching", device="cpu"), batch, 7).t
    assert times.dtype == torch.float32
    assert times.mean().item() == pytest.approx(0.5, abs=0.02)


def small_model(patch: int = 8) -> Backbone:
    return create_model(f"DiG-S/{patch}", input_size=(16, 16), in_channels=1, num_classes=10)


def trained(steps: int = 2, **fields: Any) -> TrainingStep:
    torch.manual_seed(3)
    run = config(**fields)
    step = TrainingStep(run, small_model(), build_loss(run.loss, device="cpu"))
    torch.manual_seed(4)
    batches = [batch_of(i) for i in range(steps)]
    for i, batch in enumerate(batches):
        step.run(step_inputs(run, step.loss, batch, 10), run.learning_rate_at(i))
    return step


def weights(step: TrainingStep) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in step.model.parameters()])


def test_one_step_is_adamw_on_the_mean_loss_with_averages() -> None:
    """Against torch's own optimizer, loss and gradient, written out; with more decay than anybody's, to be seen."""
    step = trained(steps=1, ema=0.75, ema_warmup=False, clip=0.1, weight_decay=10.0)
    torch.manual_seed(3)
    model = small_model()
    model.y_embedder.dropout = 0.0  # type: ignore[union-attr, assignment]
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    torch.manual_seed(4)
    inputs = step_inputs(config(), step.loss, batch_of(0), 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=10.0)
    values = step.loss(model, inputs.x[0], inputs.y[0], t=inputs.t[0], noise=inputs.noise[0])
    values["loss"].mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.allclose(weights(step), after, atol=1e-7)
    assert not torch.equal(before, after)
    average = torch.cat([p.flatten() for p in step.ema.parameters()])
    assert torch.allclose(average, 0.75 * before + 0.25 * after, atol=1e-7)
    assert step.sums[-1].item() == pytest.approx(norm.item(), rel=1e-5)
    assert step.sums[0].item() == pytest.approx(values["loss"].mean().item(), rel=1e-5)
    assert not step.ema.training


@pytest.mark.parametrize("fields", [{"accumulate": 4}, {"checkpoint_blocks": True}])
def test_accumulation_and_checkpointing_change_no_result(fields: dict[str, Any]) -> None:
    other, plain = trained(**fields), trained()
    assert torch.allclose(weights(other), weights(plain), atol=2e-6)
    torch.testing.assert_close(other.sums, plain.sums, rtol=1e-4, atol=0)


def test_a_state_of_another_model_is_refused_and_nothing_of_it_taken() -> None:
    """Of another shape too, even one that would be repeated to fit."""
    step, other = trained(), trained(steps=1)
    before = {name: tensor.clone() for name, tensor in step.tensors().items()}
    bias = next(name for name, tensor in before.items() if name.startswith("model.") and tensor.ndim == 1)
    for wrong in ({bias: before[bias][:1].clone()}, {"model.more": torch.zeros(1)}):
        with pytest.raises(ValueError, match=r"the checkpoint is of another model: model\.\S+ do not fit"):
            step.load({**other.tensors(), **wrong})
    assert all(torch.equal(before[name], tensor) for name, tensor in step.tensors().items())


def test_checkpointed_blocks_run_twice_and_keep_their_names() -> None:
    model = small_model()
    names = list(model.state_dict())
    calls: list[int] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    assert checkpoint_blocks(model, preserve_rng_state=True) == 2
    assert list(model.state_dict()) == names
    x = torch.randn(2, 1, 16, 16)
    model(x, torch.zeros(2), torch.zeros(2, dtype=torch.int64)).sum().backward()
    assert len(calls) == 4


@pytest.mark.parametrize("name", ["DiT-S/8", "Flash-DiT-S/8", "DiS-S/8"])
def test_blocks_of_the_baselines_are_found(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, input_size=(16, 16), in_channels=1, num_classes=10)
    assert checkpoint_blocks(model, preserve_rng_state=True) == model.config.depth + (name[:3] == "DiS")


def test_steps_are_strictly_deterministic_where_they_can_be(caplog: pytest.LogCaptureFixture) -> None:
    """An operation that can't repeat itself is warned of once, with its name, and changes neither weights nor draws."""

    def trained_with(hook: Any, **fields: Any) -> tuple[TrainingStep, list[bool]]:
        torch.manual_seed(3)
        run = config(**fields)
        model = small_model()
        strict: list[bool] = []

        def note(*_: Any) -> None:
            enabled = torch.are_deterministic_algorithms_enabled()
            strict.append(enabled and not torch.is_deterministic_algorithms_warn_only_enabled())
            torch.rand(1)
            hook()

        model.register_forward_hook(note)
        step = TrainingStep(run, model, build_loss(run.loss, device="cpu"))
        torch.manual_seed(4)
        for i in range(2):
            step.run(step_inputs(run, step.loss, batch_of(i), 10), 1e-4)
        return step, strict

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    free, modes = trained_with(lambda: None, deterministic=False)
    assert modes == [False, False]
    strict, modes = trained_with(lambda: None)
    assert modes == [True, True]
    assert not caplog.records
    # An operation that PyTorch refuses in this mode, on a CPU too.
    forced, modes = trained_with(lambda: torch.zeros(2).put_(torch.tensor([0]), torch.ones(1)))
    assert modes == [True, False, False]
    assert len(caplog.records) == 1
    assert "put_ does not have a deterministic implementation" in caplog.text
    assert torch.equal(weights(strict), weights(free))
    assert torch.equal(weights(forced), weights(free))
    after = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    assert after == before


def test_an_error_of_another_kind_comes_through() -> None:
    step = trained(steps=0)
    step.model.register_forward_hook(lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        step.run(step_inputs(config(), step.loss, batch_of(0), 10), 1e-4)


def test_labels_are_dropped_by_the_inputs_alone() -> None:
    step = trained(label_dropout=0.0)
    assert step.model.training
    y = torch.zeros(64, dtype=torch.int64)
    embedded = step.model.y_embedder(y)  # type: ignore[operator]
    assert (embedded == embedded[0]).all()


def test_a_captured_step_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, clipping, averages, sums and the learning rate of each step; and capturing has moved nothing before."""
    monkeypatch.setattr("dig.training.step.capture", capture_fake)
    # Rates that are the same as Python floats and in fp32.
    fields: dict[str, Any] = {"accumulate": 2, "clip": 0.5, "ema": 0.75, "warmup": 8, "learning_rate": 2.0**-7}
    eager = trained(steps=4, **fields)
    graph = trained(steps=4, execution="graph", device="cuda", **fields)
    ours, theirs = graph.tensors(), eager.tensors()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert eager.optimizer.param_groups[0]["lr"] == graph.optimizer.param_groups[0]["lr"].item() == 2.0**-8


def test_a_step_that_can_not_be_captured_says_what_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dig.training.step.capture", capture_fake)
    step = trained(steps=0, execution="graph", device="cuda")
    before = weights(step).clone()
    step.model.register_forward_hook(lambda _model, _inputs, output: output * output.sum().item())
    with pytest.raises(CaptureError, match=r"reads a value from the GPU.*; or train with execution eager"):
        step.run(step_inputs(config(), step.loss, batch_of(0), 10), 1e-4)
    assert torch.equal(before, weights(step))


def test_execution_is_chosen_once(tmp_path: Path) -> None:
    """A graph on a GPU, unless the run began otherwise; whatever is asked for by name is taken."""
    assert choose_execution("auto", device="cuda", begun=None)[0] == "graph"
    assert choose_execution("auto", device="cpu", begun=None)[0] == "eager"
    content = config(device="cuda").to_json()
    del content["execution_reason"]  # as older runs have it
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"config": content}))
    begun = recorded_config(tmp_path)
    assert choose_execution("auto", device="cuda", begun=begun) == ("eager", "the run began with it")
    assert choose_execution("graph", device="cuda", begun=begun) == ("graph", "asked for")
    with pytest.raises(ValueError, match="execution must be one of auto, eager, compile, graph; got 'jit'"):
        choose_execution("jit", device="cuda", begun=begun)
    assert config(execution_reason="asked for").differences(config()) == []


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(("name", "draws"), [("DiS-S/2", True), ("DiG-S/2", False), ("DiT-S/2", False)])
def test_blocks_that_draw_are_computed_again_eagerly(name: str, draws: bool) -> None:
    """Under auto; who asks for a graph is told by it. Also in a folder where a graph came to no step."""
    spec = ModelSpec(name=name, input_size=(8, 8), in_channels=4, num_classes=10)
    assert draws_in_training(spec) == draws
    began = config(device="cuda", execution="graph")
    reason = "blocks that draw random numbers can't be computed again in a CUDA graph"
    for begun in (None, began):
        chosen = choose_execution("auto", device="cuda", begun=begun, redraws=draws)
        assert (chosen == ("eager", reason)) == draws
        assert draws or chosen[0] == "graph"
    assert choose_execution("graph", device="cuda", begun=None, redraws=draws)[0] == "graph"
