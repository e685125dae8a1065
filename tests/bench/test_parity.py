"""The parity check: a model that is not its reference, and a kernel that is not the case's, are found out."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.cases.case import Case
from bench.measure.steps import build_step
from bench.parity import reference
from bench.parity.error import ParityError
from bench.parity.inputs import make_inputs
from bench.parity.kernels import _triton_kernels, check_kernels, reference_of, signature_of
from bench.parity.reference import check_against_reference
from bench.parity.replay import check_replay
from dig.environment import ROOT
from dig.registry import find_family
from dig.spec import create_model

pytestmark = pytest.mark.usefixtures("shallow")

FLASH_TRAIN = Case(model="Flash-DiT-S/8", resolution=64, dtype="bf16", device="cpu", mode="train")
FLASH = Case(model="Flash-DiT-S/8", resolution=64, dtype="fp32", device="cpu", mode="forward")

# Names as profilers print them, of one step each.
CUDNN = ["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_kernel0_0", "gemm"]
OLDER_CUDNN = ["cudnn_generated_fort_native_sdpa_sm90_knob_7_64x128x128_4x1x1_kernel0_0"]
TORCH_FLASH = ["void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128>>(params)", "gemm"]
FLASH_2 = ["void flash::flash_fwd_kernel<flash::Flash_fwd_kernel_traits<64, 128>>(flash::Flash_fwd_params)", "gemm"]
SPLIT_2 = ["void flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<64, 128>>(Flash_fwd_params)"]
PLAIN = ["void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>(float)", "gemm"]
FLA = ["chunk_gla_fwd_A_kernel_intra_sub_inter", "chunk_fwd_kernel_h", "gemm"]
MAMBA = ["void selective_scan_fwd_kernel<Selective_Scan_fwd_kernel_traits<64>>(SSMParamsBase)", "gemm"]


def case(model: str, implementation: str) -> Case:
    return Case(model=f"{model}-S/2", options=(("backend", implementation),), resolution=256)


@pytest.mark.parametrize(
    ("model", "implementation", "right", "wrong"),
    [
        ("Flash-DiT", "sdpa-cudnn", [CUDNN, OLDER_CUDNN], [TORCH_FLASH, FLASH_2, [*CUDNN, *PLAIN], ["gemm"]]),
        ("Flash-DiT", "sdpa-flash", [TORCH_FLASH], [CUDNN, FLASH_2, PLAIN]),
        ("Flash-DiT", "flash-attn", [FLASH_2, SPLIT_2], [CUDNN, TORCH_FLASH, PLAIN]),
        ("DiT", "materialized", [PLAIN, ["triton_red_fused__softmax_0"]], [CUDNN, TORCH_FLASH, FLASH_2]),
        ("DiG", "fla", [FLA], [["gemm"]]),
        ("DiG", "triton", [["output_kernel", "gemm"]], [FLA, ["gemm"], ["gated_output_kernel"]]),
        ("DiS", "mamba-ssm", [MAMBA], [["gemm"]]),
    ],
)
def test_kernels_tell_implementations_apart(
    model: str, implementation: str, right: list[list[str]], wrong: list[list[str]]
) -> None:
    if implementation == "triton":
        pytest.importorskip("dig.ops.gla.kernels")
        own = re.compile(signature_of(case(model, implementation)).expected)
        right = [["gemm", next(name for name in sorted(_triton_kernels("dig.ops.gla")) if own.search(name))]]
    for names in right:
        assert check_kernels(case(model, implementation), names)
    for names in wrong:
        with pytest.raises(ParityError, match="is not what its name says"):
            check_kernels(case(model, implementation), names)


@pytest.mark.parametrize("commit", ["742c38c", "25d65ee", "83b2d8b"])
def test_own_kernels_are_known_in_what_a_profiler_printed_on_an_h100(commit: str) -> None:
    pytest.importorskip("dig.ops.gla.launches")
    printed = (ROOT / "tests" / "data" / f"kernels-{commit}.txt").read_text()
    names = [line.split("\u2502")[1].strip() for line in printed.splitlines() if line.startswith("\u2502")]
    shown = check_kernels(case("DiG", "triton"), filter(None, names))
    assert {"output_kernel", "local_state_kernel", "scan_kernel"} <= set(shown)
    with pytest.raises(ParityError, match="no kernel of it ran"):
        check_kernels(case("DiG", "fla"), filter(None, names))


def test_every_implementation_has_a_reference_or_is_one() -> None:
    for family in map(find_family, ("DiG", "DiT", "Flash-DiT", "DiS")):
        values = family.backends
        twins = {value: reference_of(case(family.name, value)) for value in values}
        own = [value for value, twin in twins.items() if twin is None]
        assert own == (["reference"] if "reference" in values else ["materialized"] if family.name == "DiT" else [])


def test_flash_dit_agrees_with_dit() -> None:
    found = check_against_reference(FLASH)
    assert found is not None
    assert found.reference == "DiT-S/8"
    assert 0 < found.error < found.bound / 10


@pytest.mark.parametrize("fault", ["causal", "scale", "nan"])
def test_attention_that_computes_something_else_is_found_out(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import baselines.dit

    right = torch.nn.functional.scaled_dot_product_attention
    faults = {
        "causal": lambda q, k, v: right(q, k, v, is_causal=True),
        "scale": lambda q, k, v: right(q, k, v, scale=0.5 * q.shape[-1] ** -0.5),
        "nan": lambda q, k, v: right(q, k, v) * float("nan"),
    }
    monkeypatch.setattr(baselines.dit.F, "scaled_dot_product_attention", faults[fault])
    with pytest.raises(ParityError, match="differs from its reference"):
        check_against_reference(FLASH)


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor]], None]:
    """Puts another function in the place of Flash-DiT's attention, which is handed on as its first argument."""
    import baselines.dit

    right = torch.nn.functional.scaled_dot_product_attention

    def put(wrong: Callable[..., Tensor]) -> None:
        replaced = functools.partial(wrong, right)
        monkeypatch.setattr(baselines.dit.F, "scaled_dot_product_attention", replaced)

    return put


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient / 2


def test_a_backward_pass_that_is_wrong_is_found_out_where_it_is_measured(attention: Any) -> None:
    agreed = check_against_reference(FLASH_TRAIN)
    assert agreed is not None
    assert agreed.gradients_off == 0
    attention(lambda right, q, k, v: right(q, k, HalfGradient.apply(v)))
    with pytest.raises(ParityError, match=r"in the gradients of \d+ of 31 parameters .* most in"):
        check_against_reference(FLASH_TRAIN)
    forward = check_against_reference(replace(FLASH_TRAIN, mode="forward"))
    assert forward is not None
    assert forward.gradients_off is None


@pytest.mark.parametrize(
    ("wrong", "draws", "message"),
    [((), 1, ""), ((0,), 3, ""), ((0, 1), 2, "of draw 0"), ((0, 2), 3, "of draw 0"), ((1, 2), 1, "")],
)
def test_two_of_three_draws_of_weights_refuse_a_model(
    wrong: tuple[int, ...], draws: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def compare(case: Case, twin: torch.nn.Module, model: Any, inputs: Any, label: str) -> tuple[float, str]:
        seen.append(sum(float(p.double().sum()) for p in twin.parameters()))
        draw = len(seen) - 1
        return (0.5, f"of draw {draw}") if draw in wrong else (0.0, "")

    monkeypatch.setattr(reference, "_compare_gradients", compare)
    if message:
        with pytest.raises(ParityError, match=message):
            check_against_reference(FLASH_TRAIN)
    else:
        agreed = check_against_reference(FLASH_TRAIN)
        assert agreed is not None
        assert (agreed.gradients_off, agreed.draws) == (0.0, draws)
    # Each has weights of its own.
    assert len(set(seen)) == len(seen) == draws


def test_one_draw_that_is_not_finite_refuses_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(*_arguments: Any) -> tuple[float, str]:
        raise ParityError("not finite")

    monkeypatch.setattr(reference, "_compare_gradients", compare)
    with pytest.raises(ParityError, match="not finite"):
        check_against_reference(FLASH_TRAIN)


def test_a_parameter_that_one_side_has_no_gradient_of_is_beyond_any_bound() -> None:
    x = torch.ones(3)
    assert reference._errors({"a": x}, {"a": x, "b": x}) == {"a": 0.0, "b": float("inf")}
    assert reference._errors({"a": x, "b": x}, {"a": x}) == {"a": 0.0, "b": float("inf")}


def test_no_rounding_makes_noise_pass(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "ROUNDINGS", 1e9)
    attention(lambda right, q, k, v: 10 * torch.randn_like(v))
    with pytest.raises(ParityError, match=r"0\.5 is allowed"):
        check_against_reference(replace(FLASH_TRAIN, mode="forward"))


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_result_that_is_not_finite_is_found_out_in_either_mode(mode: str, attention: Any) -> None:
    attention(lambda right, q, k, v: right(q, k, v) * float("nan"))
    with pytest.raises(ParityError, match="differs from its reference"):
        check_against_reference(replace(FLASH_TRAIN, mode=mode))


def test_a_replay_that_is_not_the_eager_step_is_found_out() -> None:
    eager = torch.randn(1, 8, 4, 4)
    check_replay(eager, (eager * (1 + 1e-3 * torch.randn_like(eager))).bfloat16())
    for wrong in (eager.roll(1, -1), torch.zeros_like(eager), 1.05 * eager, torch.full_like(eager, float("nan"))):
        with pytest.raises(ParityError, match="computes something else than its eager step"):
            check_replay(eager, wrong)


def test_all_families_get_the_same_inputs_whatever_they_drew_before() -> None:
    digests = {
        build_step(Case(model=f"{family}-S/8", resolution=64, dtype="fp32", device="cpu", mode="forward")).inputs
        for family in ("DiG", "DiT", "Flash-DiT", "DiS")
    }
    assert len(digests) == 1
    other = build_step(Case(model="DiT-S/8", resolution=64, batch=2, dtype="fp32", device="cpu", mode="forward"))
    assert other.inputs not in digests


def test_the_same_numbers_in_another_shape_are_other_inputs() -> None:
    shapes = [SimpleNamespace(in_channels=4, input_size=size, num_classes=10) for size in ((8, 8), (4, 16))]
    (square, one), (wide, other) = (make_inputs(model, 1) for model in shapes)  # type: ignore[arg-type]
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(square, wide, strict=True))
    assert one != other


def test_a_grid_has_the_same_tokens_in_every_family() -> None:
    with torch.device("meta"):
        grids = {create_model(f"{family}-S/2", image_size=256).grid for family in ("DiG", "DiT", "Flash-DiT", "DiS")}
    assert grids == {(16, 16)}
