"""What only a GPU can show: the packages' kernels compute what the references do, and the harness measures them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.cases.case import Case
from bench.cases.jobs import Budget, Limits, ParityJob
from bench.cases.suites import sweep
from bench.models import create_model
from bench.parity.inputs import fill_zeros
from bench.parity.operation import check_operation
from bench.run.checkouts import copy_tree
from bench.run.runner import Sweep, run_job, run_sweep
from bench.run.side import Side
from bench.store.rows import ResultsWriter, read_results
from dig.environment import ROOT
from dig.model import DiG, DiGConfig
from dig.nvml import Gpu
from dig.ops.gla import gated_linear_attention
from tests.helpers import example, randomize, relative_error

pytestmark = pytest.mark.gpu

BF16 = 1e-2
"""Relative error of one operation on bf16 inputs."""


def _outputs_and_gradients(model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's output and the gradient of every parameter, laid end to end."""
    model.zero_grad()
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        output = model(*inputs)
    output.float().square().mean().backward()
    gradients = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
    return {"output": output, "gradients": gradients}


def _assert_twins(reference: nn.Module, twin: nn.Module, *, dtype: torch.dtype) -> None:
    """Compare a reference model with its twin on other kernels, given its weights, both against the reference in fp32.

    In bf16 a deep model's own rounding is far above a kernel's, so the twin may be no further from the truth than the
    reference itself is in bf16, by half.
    """
    randomize(reference).cuda().eval()
    twin.load_state_dict(reference.state_dict())
    twin.cuda().eval()
    inputs = example(reference)
    truth = _outputs_and_gradients(reference, inputs, torch.float32)
    actual = _outputs_and_gradients(twin, inputs, dtype)
    errors = {key: relative_error(actual[key], truth[key]) for key in truth}
    if dtype == torch.float32:
        bounds = {"output": 2e-3, "gradients": 5e-3}
    else:
        rounded = _outputs_and_gradients(reference, inputs, dtype)
        bounds = {key: 1.5 * relative_error(rounded[key], truth[key]) for key in truth}
    print(twin.implementations, dtype, errors, "allowed", bounds)
    assert all(errors[key] < bounds[key] for key in truth)


@pytest.mark.parametrize("attention", ["sdpa-cudnn", "sdpa-flash", "flash-attn"])
def test_flash_dit_equals_dit(attention: str) -> None:
    twin = create_model("Flash-DiT-S/2", image_size=128, backend=attention)
    _assert_twins(create_model("DiT-S/2", image_size=128), twin, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dis_on_mamba_ssm_equals_reference(dtype: torch.dtype) -> None:
    twin = create_model("DiS-S/2", image_size=128, backend="mamba-ssm")
    _assert_twins(create_model("DiS-S/2", image_size=128), twin, dtype=dtype)


def test_a_scan_whose_last_piece_is_two_tokens_has_right_gradients() -> None:
    """1026 tokens, as DiS has at 512 pixels: causal-conv1d alone would get those of the tokens before them wrong."""
    case = Case(model="DiS-S/2", options=(("backend", "mamba-ssm"),), resolution=512, dtype="bf16", mode="train")
    model = create_model(case.model, image_size=512, backend="mamba-ssm", device="cuda")
    fill_zeros(model)
    found = check_operation(case, model)
    assert found is not None


def test_dig_on_fla_equals_reference() -> None:
    """One block: fla rounds scores and states to bf16 where the reference keeps fp32, and depth amplifies that."""
    config = DiGConfig(input_size=(16, 16), depth=1, width=384, heads=6)
    _assert_twins(DiG(config), DiG(replace(config, backend="fla")), dtype=torch.bfloat16)


def test_fla_recurrence_and_gradients_equal_step_by_step() -> None:
    q, k = torch.randn(2, 2, 200, 6, 32, device="cuda").bfloat16().unbind(0)
    v, weight = torch.randn(2, 2, 200, 6, 64, device="cuda").bfloat16().unbind(0)
    log_decay = nn.functional.logsigmoid(torch.randn(2, 200, 6, 32, device="cuda")) / 16
    found = []
    for implementation, dtype in (("recurrent", torch.float64), ("fla", None)):
        arguments = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v, log_decay)]
        output = gated_linear_attention(*arguments, implementation=implementation)
        found.append([output, *torch.autograd.grad((output * weight.to(output.dtype)).sum(), arguments)])
    errors = [relative_error(actual, expected) for actual, expected in zip(found[1], found[0], strict=True)]
    print("output, dq, dk, dv, dlog_decay:", errors)
    assert max(errors) < BF16


def test_flash_kernels_refuse_instead_of_falling_back() -> None:
    model = create_model("Flash-DiT-S/2", image_size=64, backend="sdpa-cudnn").cuda()
    with pytest.raises(RuntimeError):  # fp32: cuDNN's attention takes half precision only.
        model(*example(model))


@pytest.mark.parametrize("mode", ["train", "forward"])
def test_harness_measures_every_execution(mode: str, tmp_path: Path) -> None:
    cases = sweep(["Flash-DiT:sdpa-cudnn"], resolutions=(128,), modes=(mode,), executions=("graph", "eager", "compile"))
    path = tmp_path / "results.jsonl"
    with ResultsWriter(path) as writer:
        run = Sweep(cases=tuple(cases))
        rows = list(run_sweep(run, writer, on_start=lambda case, doing: None))
    assert [row.case for row in rows] == cases
    assert {row.case: row.message for row in rows if row.status != "ok"} == {}
    for row in read_results(path).rows:
        assert row.memory is not None
        assert row.memory.allocator_peak > row.memory.resident > 0
        assert row.memory.process_peak >= row.memory.allocator_peak
        assert row.matmul_ceiling > 1e14
        assert row.memory.context > 0
        assert row.memory.activations > 0
        assert row.checks.reference == "DiT-S/2"
        assert row.checks.kernels
        assert row.clocks.readings > 0
        assert row.timing.host_ms > 0
        if row.case.execution != "compile":
            assert min(row.timing.graph_ms, row.timing.eager_ms) > 0
        print(row.case.describe(), f"{row.median_ms:.3f} ms", dict(row.seconds), row.memory)


@pytest.mark.parametrize("mode", ["train", "forward"])
@pytest.mark.parametrize(
    "model",
    ["DiG:triton", "DiG:fla", "DiG:triton:variant=release", "DiG:fla:variant=release", "DiS:mamba-ssm",
     "Flash-DiT:sdpa-cudnn", "Flash-DiT:sdpa-flash", "Flash-DiT:flash-attn"],
)  # fmt: skip
def test_every_implementation_passes_the_parity_check_with_room(model: str, mode: str) -> None:
    (case,) = sweep([model], resolutions=(256,), modes=(mode,))
    answer = run_job(ParityJob(case=case), limits=Limits())
    print(case.describe(), answer)
    assert answer.get("message") is None
    assert answer["error"] < answer["bound"] / 1.5
    assert (answer["gradients_off"] is None) == (mode == "forward")
    assert (answer["gradients_off"] or 0.0) < 0.08


@pytest.mark.parametrize("model", ["DiG:triton", "DiG:fla", "DiT", "DiS:mamba-ssm", "Flash-DiT:flash-attn"])
def test_the_kernels_of_every_family_are_known_by_their_names(model: str, tmp_path: Path) -> None:
    with ResultsWriter(tmp_path / "results.jsonl") as writer:
        run = Sweep(cases=tuple(sweep([model], resolutions=(128,), modes=("forward",))))
        (row,) = run_sweep(run, writer, on_start=lambda case, doing: None)
    assert row.status == "ok", row.message
    print(row.checks)
    assert row.checks.kernels
    assert "unverified" not in row.marks


def test_out_of_device_memory_is_a_row(tmp_path: Path) -> None:
    cases = sweep(["DiT"], resolutions=(2048,), batch=16, executions=("eager",), modes=("forward",))
    with ResultsWriter(tmp_path / "results.jsonl") as writer:
        run = Sweep(cases=tuple(cases))
        (row,) = run_sweep(run, writer, on_start=lambda case, doing: None)
    assert row.status == "oom"
    assert "out of memory" in row.message.lower()


def test_a_kernel_that_hangs_is_ended_and_its_memory_is_back_before_the_next_case(tmp_path: Path) -> None:
    stuck = copy_tree(ROOT, tmp_path / "stuck", "stuck")
    layers = stuck.root / "dig" / "layers.py"
    spin = "\n_call = Backbone.__call__\n\ndef _stuck(self, x, *rest):\n    if x.shape[-1] == 32:\n"
    spin += "        torch.cuda._sleep(10**12)\n    return _call(self, x, *rest)\n\nBackbone.__call__ = _stuck\n"
    layers.write_text(layers.read_text() + spin)
    cases = sweep(["DiT"], resolutions=(256, 128), modes=("forward",))
    card = Gpu.open()
    assert card is not None
    before = card.used()
    with Side(stuck, time_limit=40) as side:
        hung, row = (side.measure(case, budget=Budget(), launch=0) for case in cases)
    assert hung.status == "timeout"
    assert row.status == "ok", row.message
    assert "memory-kept" not in row.marks
    assert card.used() < before + (128 << 20)
