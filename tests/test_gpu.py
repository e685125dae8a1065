"""What only a GPU can show: the packages' kernels compute what the references compute, and the harness measures them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.cases import sweep
from bench.models import FAMILIES, create_model
from bench.results import ResultsWriter, read_results
from bench.runner import Sweep, run_sweep
from dig.ops.gla import gated_linear_attention
from tests.helpers import example, randomize, relative_error

pytestmark = pytest.mark.gpu

BF16_FORWARD = 1e-2
BF16_GRADIENT = 3e-2
"""Per parameter, through 12 to 25 blocks of bf16 products on either side."""


def _twins(name: str, image_size: int, first: dict[str, str], second: dict[str, str]) -> tuple[nn.Module, nn.Module]:
    """The same weights under two implementations, on the GPU."""
    one = randomize(create_model(name, image_size=image_size, **first)).cuda().eval()
    other = create_model(name, image_size=image_size, **second).cuda().eval()
    other.load_state_dict(one.state_dict())
    return one, other


def _outputs_and_gradients(model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        output = model(*inputs)
    output.float().square().mean().backward()
    found = {"output": output}
    # A parameter's own gradient may be tiny beside bf16's noise in the sum that it is; those are left to the whole.
    found["gradients"] = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
    return found


def _assert_twins(name: str, first: dict[str, str], second: dict[str, str], *, dtype: torch.dtype) -> None:
    one, other = _twins(name, 128, first, second)
    inputs = example(one)
    expected = _outputs_and_gradients(one, inputs, dtype)
    actual = _outputs_and_gradients(other, inputs, dtype)
    exact = dtype == torch.float32
    errors = {key: relative_error(actual[key], expected[key]) for key in expected}
    print(name, second, dtype, errors)
    assert errors["output"] < (2e-3 if exact else BF16_FORWARD)
    assert errors["gradients"] < (5e-3 if exact else BF16_GRADIENT)


@pytest.mark.parametrize("attention", ["sdpa-cudnn", "sdpa-flash", "flash-attn"])
def test_flash_dit_equals_dit(attention: str) -> None:
    one = randomize(create_model("DiT-S/2", image_size=128)).cuda().eval()
    other = create_model("Flash-DiT-S/2", image_size=128, attention=attention).cuda().eval()
    other.load_state_dict(one.state_dict())
    inputs = example(one)
    expected = _outputs_and_gradients(one, inputs, torch.bfloat16)
    actual = _outputs_and_gradients(other, inputs, torch.bfloat16)
    errors = {key: relative_error(actual[key], expected[key]) for key in expected}
    print(attention, errors)
    assert errors["output"] < BF16_FORWARD
    assert errors["gradients"] < BF16_GRADIENT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dis_on_mamba_ssm_equals_reference(dtype: torch.dtype) -> None:
    _assert_twins("DiS-S/2", {"mixer": "reference"}, {"mixer": "mamba-ssm"}, dtype=dtype)


def test_dig_on_fla_equals_reference() -> None:
    _assert_twins("DiG-S/2", {"recurrence": "reference"}, {"recurrence": "fla"}, dtype=torch.bfloat16)


def test_fla_recurrence_equals_step_by_step() -> None:
    q, k = torch.randn(2, 2, 200, 6, 32, device="cuda").bfloat16().unbind(0)
    v = torch.randn(2, 200, 6, 64, device="cuda").bfloat16()
    log_decay = nn.functional.logsigmoid(torch.randn(2, 200, 6, 32, device="cuda")) / 16
    actual = gated_linear_attention(q, k, v, log_decay, implementation="fla")
    wide = (x.double() for x in (q, k, v, log_decay))
    expected = gated_linear_attention(*wide, implementation="recurrent")
    assert relative_error(actual, expected) < BF16_FORWARD


def test_flash_kernels_refuse_instead_of_falling_back() -> None:
    model = create_model("Flash-DiT-S/2", image_size=64, attention="sdpa-cudnn").cuda()
    with pytest.raises(RuntimeError):  # fp32: cuDNN's attention takes half precision only.
        model(*example(model))


@pytest.mark.parametrize("mode", ["train", "forward"])
def test_harness_measures_every_family_as_a_graph_and_eagerly(mode: str, tmp_path: Path) -> None:
    models = [
        f"{family.name}:{value}" for family in FAMILIES.values() for value in family.options[family.implementation]
    ]
    # The references' graphs would hold a kernel a token; they are measured on the CPU.
    models = [model for model in models if not model.endswith(":reference")]
    cases = sweep(models, resolutions=(128,), modes=(mode,), executions=("graph", "eager"))
    path = tmp_path / "results.jsonl"
    with ResultsWriter(path) as writer:
        run = Sweep(cases=tuple(cases), done=frozenset(), time_limit=420)
        rows = list(run_sweep(run, writer, environment={}, on_start=lambda case: None))
    assert [row.case for row in rows] == cases
    assert {row.case: row.message for row in rows if row.status != "ok"} == {}
    for row in read_results(path).rows:
        assert row.memory is not None
        assert row.memory.allocator_peak > row.memory.resident > 0
        assert row.memory.process_peak >= row.memory.allocator_peak
        assert row.matmul_ceiling > 1e14
        print(row.case.describe(), f"{row.median_ms:.3f} ms", dict(row.seconds), row.memory)


def test_out_of_device_memory_is_a_row(tmp_path: Path) -> None:
    cases = sweep(["DiT"], resolutions=(2048,), batch=16, executions=("eager",), modes=("forward",))
    with ResultsWriter(tmp_path / "results.jsonl") as writer:
        run = Sweep(cases=tuple(cases), done=frozenset(), time_limit=120)
        (row,) = run_sweep(run, writer, environment={}, on_start=lambda case: None)
    assert row.status == "oom"
    assert "out of memory" in row.message.lower()
