"""Measuring from Python: a name as the harness does, a model or a step in this process, which is marked so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bench
from bench.measure.here import MARKS
from bench.store.rows import Row, read_results
from tests.dig.tiny import build


def model() -> torch.nn.Module:
    return build("S", input_size=(8, 8), in_channels=1, num_classes=3, patch_size=4).eval()


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_model_in_this_process(mode: str) -> None:
    given = model()
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    found = bench.measure(given, mode=mode, batch=2)
    assert torch.equal(torch.rand(1), drawn)
    assert found.marks == MARKS
    assert (found.name, found.mode, found.batch, found.dtype, found.device) == ("DiG", mode, 2, "fp32", "cpu")
    assert found.fps == pytest.approx(2000 / found.median_ms)
    assert found.parameters == sum(p.numel() for p in given.parameters() if p.requires_grad)
    assert (found.memory.optimizer > 0) == (mode == "train")
    assert json.loads(found.to_json())["environment"]["torch"] == torch.__version__
    assert "in-process" in str(found)
    # The model itself is neither trained nor filled.
    assert not given.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())
    assert all(p.grad is None for p in given.parameters())


def test_a_step_of_ones_own() -> None:
    calls = []

    def my_step() -> None:
        calls.append(torch.ones(64, 64) @ torch.ones(64, 64))

    found = bench.measure(my_step, batch=4)
    assert found.name.endswith("my_step")
    assert (found.mode, found.batch, found.parameters) == ("step", 4, None)
    assert len(calls) > len(found.samples_ms) >= 3


def test_a_name_is_measured_as_the_harness_does(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = bench.measure("DiG-S/8", resolution=64, device="cpu", out=file)
    assert isinstance(row, Row)
    assert row.status == "ok", row.message
    assert (row.case.model, row.case.resolution, row.case.mode) == ("DiG-S/8", 64, "forward")
    assert row.checks.inputs
    assert row.key
    assert "in-process" not in row.marks
    assert list(read_results(file).rows) == [row]


@pytest.mark.slow
def test_a_family_of_ones_own_is_measured_by_its_path(own: str) -> None:
    from tests.own_family import MODULE

    family = next(line.split()[1].split("(")[0] for line in MODULE.splitlines() if line.startswith("class "))
    row = bench.measure(f"{own}:{family}-S/8", resolution=64, device="cpu")
    assert row.status == "ok", row.message
    assert row.case.source == f"{own}:{family}"


def test_what_cannot_be_measured_is_told() -> None:
    for what, options, message in (
        ("DiG-S/3", {}, "patch"),
        ("DiG-S/2", {"resolution": 100, "device": "cpu"}, "closest that is"),
        (model(), {"mode": "backward"}, "mode must be one of"),
        (model(), {"execution": "graph"}, "eagerly or compiled"),
        (model(), {"batch": 0}, "batch must be"),
        (model(), {"out": "x"}, "out is of a model by name"),
        (model(), {"resolution": 64}, "resolution is of a model by name"),
        (lambda: None, {"device": "tpu"}, "device must be"),
    ):
        with pytest.raises(ValueError, match=message):
            bench.measure(what, **options)
    with pytest.raises(TypeError, match="time a step"):
        bench.measure(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": None}, "batch must be a whole number; got None"),
        ({"batch": 1.5}, "batch must be a whole number; got 1.5"),
        ({"resolution": "256"}, "resolution must be a whole number; got '256'"),
        ({"mode": "training"}, "mode must be one of train, forward; got 'training'"),
        ({"mode": None}, "mode must be one of train, forward; got None"),
        ({"dtype": torch.bfloat16}, "dtype must be one of bf16, fp32; got torch.bfloat16"),
        ({"execution": "fast"}, "execution must be one of eager, compile, graph, compiled-graph; got 'fast'"),
        ({"device": torch.device("cpu")}, "device must be one of cuda, cpu; got"),
        ({"out": 3}, "out must be a path; got 3"),
    ],
)
@pytest.mark.parametrize("what", ["DiG-S/8", "model"])
def test_wrong_arguments_are_named(what: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        bench.measure(model() if what == "model" else what, **options)
