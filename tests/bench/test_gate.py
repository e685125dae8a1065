"""The fairness gate: a model that is not its reference, and a kernel that is not the case's, are found out."""

from __future__ import annotations

import re

import pytest
import torch

from bench import gate
from bench.gate import GateError, check_against_reference, check_kernels, reference_of, signature_of
from bench.models import FAMILIES, create_model
from bench.results import Case
from bench.steps import build_step

FLASH = Case(model="Flash-DiT-S/8", resolution=64, dtype="fp32", device="cpu", mode="forward")

# Names as profilers print them, of one step each.
CUDNN = ["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_kernel0_0", "gemm"]
TORCH_FLASH = ["void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128>>(params)", "gemm"]
FLASH_2 = ["void flash::flash_fwd_kernel<flash::Flash_fwd_kernel_traits<64, 128>>(flash::Flash_fwd_params)", "gemm"]
SPLIT_2 = ["void flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<64, 128>>(Flash_fwd_params)"]
PLAIN = ["void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>(float)", "gemm"]
FLA = ["chunk_gla_fwd_A_kernel_intra_sub_inter", "chunk_fwd_kernel_h", "gemm"]
MAMBA = ["void selective_scan_fwd_kernel<Selective_Scan_fwd_kernel_traits<64>>(SSMParamsBase)", "gemm"]


def case(model: str, implementation: str) -> Case:
    family = FAMILIES[model]
    return Case(model=f"{model}-S/2", options=((family.implementation, implementation),), resolution=256)


@pytest.mark.parametrize(
    ("model", "implementation", "right", "wrong"),
    [
        ("Flash-DiT", "sdpa-cudnn", [CUDNN], [TORCH_FLASH, FLASH_2, [*CUDNN, *PLAIN], ["gemm"]]),
        ("Flash-DiT", "sdpa-flash", [TORCH_FLASH], [CUDNN, FLASH_2, PLAIN]),
        ("Flash-DiT", "flash-attn", [FLASH_2, SPLIT_2], [CUDNN, TORCH_FLASH, PLAIN]),
        ("DiT", "materialized", [PLAIN, ["triton_red_fused__softmax_0"]], [CUDNN, TORCH_FLASH, FLASH_2]),
        ("DiG", "fla", [FLA], [["gemm"]]),
        ("DiG", "triton", [["output_kernel", "gemm"]], [FLA, ["gemm"]]),
        ("DiS", "mamba-ssm", [MAMBA], [["gemm"]]),
    ],
)
def test_kernels_tell_implementations_apart(
    model: str, implementation: str, right: list[list[str]], wrong: list[list[str]]
) -> None:
    if implementation == "triton":
        pytest.importorskip("dig.ops.gla.kernels")
        own = re.compile(signature_of(case(model, implementation)).expected)
        right = [["gemm", next(name for name in sorted(gate._own_kernels()) if own.search(name))]]
    for names in right:
        assert check_kernels(case(model, implementation), names)
    for names in wrong:
        with pytest.raises(GateError, match="is not what its name says"):
            check_kernels(case(model, implementation), names)


def test_every_implementation_has_a_reference_or_is_one() -> None:
    for family in FAMILIES.values():
        values = family.options[family.implementation]
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
    with pytest.raises(GateError, match="differs from its reference"):
        check_against_reference(FLASH)


def test_all_families_get_the_same_inputs_whatever_they_drew_before() -> None:
    digests = {
        build_step(Case(model=f"{family}-S/8", resolution=64, dtype="fp32", device="cpu", mode="forward")).inputs
        for family in FAMILIES
    }
    assert len(digests) == 1
    other = build_step(Case(model="DiT-S/8", resolution=64, batch=2, dtype="fp32", device="cpu", mode="forward"))
    assert other.inputs not in digests


def test_a_grid_has_the_same_tokens_in_every_family() -> None:
    with torch.device("meta"):
        grids = {create_model(f"{family}-S/2", image_size=256).grid for family in FAMILIES}
    assert grids == {(16, 16)}
