"""Profiles: what the trace says is what the page shows, and nothing on it is markup that was not meant."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cases.case import Case
from bench.cli import main as cli
from bench.inspect.page import page, thin
from bench.inspect.parts import part_of
from bench.inspect.profile import Entry, Profile, _ranked, memory_timeline, read_events, read_parts
from bench.inspect.roofline import Cost, cost_of, kernel_costs
from bench.measure.profiler import short_name
from bench.ops.gla import OTHER_FORMS
from bench.store.profiles import read_profiles
from dig.environment import ROOT

CASE = Case(model="DiG-S/8", resolution=64, device="cpu", dtype="fp32")


def op(name: str, start: float, us: float, external: int, **arguments: object) -> dict:
    found = {"External id": external, **arguments}
    return {"ph": "X", "cat": "cpu_op", "name": name, "ts": start, "dur": us, "tid": 1, "args": found}


def kernel(name: str, us: float, external: int) -> dict:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": 0, "dur": us, "args": {"External id": external}}


def test_an_operator_keeps_what_its_callees_leave() -> None:
    events = [op("outer", 0, 10, 1), op("inner", 2, 5, 2), op("leaf", 3, 1, 3), op("outer", 20, 4, 4)]
    operations, kernels = read_events(events, device="cpu")
    assert {name: (calls, us) for name, (calls, us, _) in operations.items()} == {
        "outer": (2, 9.0),
        "inner": (1, 4.0),
        "leaf": (1, 1.0),
    }
    assert kernels == operations


def test_kernels_belong_to_the_operation_that_launched_them_and_none_is_lost() -> None:
    shapes = {"Input Dims": [[64, 32], [32, 16]], "Input type": ["float", "float"]}
    events = [op("aten::mm", 0, 9, 7, **shapes), kernel("gemm", 6, 7), kernel("reduce", 2, 7), kernel("stray", 3, 99)]
    operations, kernels = read_events(events, device="cuda")
    assert operations["aten::mm"][:2] == (1, 8.0)
    assert kernels["gemm"] == (1, 6.0, Cost(flops=2 * 64 * 32 * 16, bytes=4 * (64 * 32 + 32 * 16 + 64 * 16)))
    assert kernels["reduce"][2] == Cost()
    assert kernels["stray"][:2] == (1, 3.0)


@pytest.mark.parametrize(
    ("name", "shapes", "flops"),
    [
        ("aten::addmm", [[16], [64, 32], [32, 16]], 2 * 64 * 32 * 16),
        ("aten::bmm", [[3, 64, 32], [3, 32, 16]], 3 * 2 * 64 * 32 * 16),
        ("aten::_scaled_dot_product_cudnn_attention", [[2, 6, 50, 64]] * 3, 2 * 2 * 6 * 50 * 50 * 128),
        ("aten::_scaled_dot_product_flash_attention_backward", [[2, 6, 50, 64]] * 5, 5 * 2 * 6 * 50 * 50 * 128),
        ("aten::add", [[10], [10]], 0),
        ("dig::project_up", [[2, 50, 32], [128, 32]], 2 * 2 * 50 * 32 * 128),
        ("dig::project_down_backward", [[2, 50, 32], [32, 64], [2, 50, 128]], 2 * 2 * 50 * 32 * 64),
    ],
)
def test_least_work(name: str, shapes: list[list[int]], flops: int) -> None:
    cost = cost_of(name, [*shapes, []], [*["c10::BFloat16"] * len(shapes), "Scalar"])
    assert cost.flops == flops
    assert cost.bytes >= 2 * sum(len(s) for s in shapes)
    assert Cost(flops=1e6, bytes=10).least_us(1e12, 1e12) == pytest.approx(1.0)


def test_no_share_is_made_of_work_that_nobody_knows() -> None:
    """Of an operator that reads some columns of its inputs, and of kernels that share an operator's work."""
    shapes = {"Input Dims": [[64, 32], [32, 16]], "Input type": ["float", "float"]}
    events = [op("aten::mm", 0, 9, 7, **shapes), kernel("a", 3, 7), kernel("b", 2, 7), kernel("c", 2, 7)]
    operations, kernels = read_events(events, device="cuda")
    assert operations["aten::mm"][2].flops
    assert {name: cost for name, (_, _, cost) in kernels.items()} == dict.fromkeys("abc", Cost())
    assert cost_of("dig::gla_mixer_sums", [[1, 64, 208], [32, 16]], ["c10::BFloat16"] * 2) == Cost()


def test_lists_of_tensors_count_by_element() -> None:
    dims = [[[384, 16], [192]], [[384, 16], [192]], [], []]
    assert cost_of("dig::prepare_weights", dims, ["TensorList"] * 2).bytes == 6 * (384 * 16 + 192)


def test_kernels_of_the_recurrence_have_work_of_their_own() -> None:
    """Shapes as the profiler gave them for DiG-S/2 at 1792 pixels; docs/performance.md counts the same bytes."""
    dims = [[1, 12544, 1168], [192, 16], [192], [64], [1, 1, 6, 196, 32, 64], [1, 6, 12544, 32], [1, 12544, 384]]
    types = ["c10::BFloat16", "c10::BFloat16", "float", "float", "c10::BFloat16", "float", "c10::BFloat16"]
    shapes = {"Input Dims": dims, "Input type": types}
    kernels = ("output_backward_kernel", "scan_kernel", "gradient_kernel")
    events = [op("dig::gla_mixer_backward", 0, 9, 7, **shapes), *(kernel(name, 50, 7) for name in kernels)]
    _, found = read_events(events, device="cuda")
    costs = {name: cost.bytes / 1e6 for name, (_, _, cost) in found.items()}
    assert costs["gradient_kernel"] == pytest.approx(77, rel=0.1)
    assert costs["output_backward_kernel"] == pytest.approx(87, rel=0.1)
    assert costs["scan_kernel"] == pytest.approx(10, rel=0.1)
    backward = kernel_costs("dig::gla_mixer_backward", dims, types)
    assert all(backward[one] == backward[other] for one, other in OTHER_FORMS.items())
    forward = kernel_costs("dig::gla_mixer", dims[:4], types[:4])
    assert forward["output_kernel"].bytes / 1e6 == pytest.approx(2 * 12.544 * (2 * 192 + 3 * 384) / 1e3)
    assert kernel_costs("aten::mm", [[4, 4], [4, 4]], ["float", "float"]) == {}


def test_memory_is_a_running_sum_of_one_device() -> None:
    def change(ts: float, size: int, kind: int = 1) -> dict:
        return {"name": "[memory]", "ts": ts, "args": {"Bytes": size, "Device Type": kind}}

    events = [change(3e6, -40), change(1e6, 100), change(2e6, 10), change(2e6, 5, kind=0)]
    assert memory_timeline(events, device="cuda") == ((0.0, 100), (1.0, 110), (2.0, 70))
    assert memory_timeline([], device="cuda") == ()


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("gradient_kernel", "gradient_kernel"),
        ("void at::(anonymous namespace)::cat<at::(anonymous namespace)::T<4>>(char*)", "at::cat<at::T<4>>"),
        ("std::enable_if<!(false), void>::type gemvx::kernel<int, 8>(Params<int>)", "gemvx::kernel<int, 8>"),
        ("void flash::flash_fwd_kernel<Traits<64>>(Params)", "flash::flash_fwd_kernel<Traits<64>>"),
    ],
)  # fmt: skip
def test_short_names_still_tell_kernels_apart(name: str, short: str) -> None:
    assert short_name(name) == short
    assert len(short_name("void k<" + "x, " * 200 + ">(int)")) <= 100


def test_thinning_keeps_every_peak() -> None:
    points = [(float(i), 1000 if i == 777 else i % 7) for i in range(5000)]
    assert len(thin(points, 100)) <= 100
    assert (777.0, 1000) in thin(points, 100)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_the_page_escapes_names_and_fetches_nothing() -> None:
    evil = 'void k<int>"><script src=//x></script><img onerror=a()>'
    entry = Entry(name=evil, calls=1, us=5.0, share=0.5)
    found = Profile(
        case=Case(model="DiG-S/8", resolution=64),
        operations=(entry,),
        kernels=(entry,),
        memory=((0.0, 5), (1.0, 0)),
        flop_rate=1e12,
        byte_rate=1e11,
        wall_us=9.0,
    )
    tags = Tags()
    html = page(found, {"gpu_name": evil, "torch": evil})
    tags.feed(html)
    assert not {"script", "img", "link", "iframe", "int"} & tags.found
    assert not {"src", "href", "onerror"} & tags.attributes
    assert "color-scheme: light dark" in html


@pytest.mark.slow
def test_a_real_profile(tmp_path: Path) -> None:
    options = ["--model", "DiT-S/8", "--resolution", "64", "--device", "cpu", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, ["profile", *options])
    assert done.exit_code == 0, done.output
    assert "aten::addmm" in done.stdout
    found = json.loads((tmp_path / "profile.json").read_text())
    names = {entry["name"] for entry in found["operations"]}
    assert {"aten::addmm", "aten::mm", "aten::_fused_adamw_"} <= names
    assert max(size for _, size in found["memory"]) > 10 * 2**20
    # An operator's own times add up to no more than the step.
    assert sum(entry["us"] for entry in found["operations"]) <= found["wall_us"]
    assert "aten::addmm" in (tmp_path / "index.html").read_text()
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "DiG-S2"], "is not a model name"),
        (["--model", "DiG-S/2", "--resolution", "100"], "not a multiple of 16"),
        (["--model", "DiG-S/2", "--mode", "x", "--device", "cpu"], "unknown --mode 'x'"),
        (["--model", "DiG-S/2", "--device", "cpu", "--out", "/dev/null/x"], "cannot write"),
    ],
)
def test_bad_input(options: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.app, ["profile", *options])
    assert result.exit_code == 2, result.output
    assert message in result.output


@pytest.mark.parametrize("name", ["t", "view", "transpose", "as_strided", "expand", "slice", "detach", "empty_like"])
def test_a_view_moves_nothing(name: str) -> None:
    assert cost_of(f"aten::{name}", [[4096, 4096], [], []], ["float", "Scalar", ""]) == Cost()


@pytest.mark.parametrize("name", ["embedding", "index", "gather", "index_select"])
def test_what_reads_a_part_of_its_inputs_has_no_least_work(name: str) -> None:
    assert cost_of(f"aten::{name}", [[4096, 4096], [1]], ["float", "long int"]) == Cost()


def test_no_share_is_beyond_the_roofline() -> None:
    """Of a tensor that a cache holds, a copy's rate from memory is no ceiling."""
    tally = {"cached": (1, 1.0, Cost(bytes=2e6)), "streamed": (1, 1.0, Cost(bytes=0.5e6)), "none": (1, 1.0, Cost())}
    assert {e.name: e.share for e in _ranked(tally, (1e12, 1e12))} == {"cached": None, "streamed": 0.5, "none": None}


def test_ceilings_have_digits_and_names_have_room() -> None:
    profile = Profile(
        case=CASE, operations=(Entry(name="a<b\x1b", calls=1, us=1.0),), kernels=(), memory=(), flop_rate=2.3e10,
        byte_rate=9.9e9, wall_us=1.0,
    )  # fmt: skip
    text = page(profile, {"cpu": "X\x00<b>"})
    assert "23 GFLOP/s in a matrix product, 9.9 GB/s in a copy" in text
    assert "min-width: 14rem" in text
    assert text.count('<div class="wide"><table>\n') == text.count("</table></div>") == 1
    assert not {"\x00", "\x1b", "<b>"} & set(text.replace("a&lt;b", "").split())
    assert "X\\x00&lt;b&gt;" in text


@pytest.mark.parametrize(
    ("operation", "kernel", "part"),
    [
        ("aten::mm", "nvjet_sm90_tst_192x192_64x3_2x1_v_bz_coopB_NNN", "products"),
        ("aten::addmm", "cublasLt::splitKreduce_kernel<32, 16>", "products"),
        ("dig::project_up", "up_swiglu_kernel", "products"),
        ("", "grouped_product_kernel", "products"),
        ("dig::gla_mixer", "output_kernel", "heart"),
        ("dig::gla_mixer_backward", "gradient_kernel", "heart"),
        ("aten::bmm", "sm90_xmma_gemm_bf16bf16_bf16f32", "heart"),
        ("aten::_softmax", "softmax_warp_forward", "heart"),
        ("aten::_scaled_dot_product_cudnn_attention", "cudnn_generated_fort_native_sdpa_sm90", "heart"),
        ("", "void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>", "heart"),
        ("", "chunk_gla_fwd_kernel_o", "heart"),
        ("MambaInnerFn", "selective_scan_bwd_kernel", "heart"),
        ("MambaInnerFn", "causal_conv1d_fwd_kernel", "rest"),
        ("aten::_fused_adamw_", "multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata>", "rest"),
        ("dig::srem", "srem_forward_kernel", "rest"),
        ("aten::linear", "aten::linear", "products"),
        ("aten::mul", "aten::mul", "rest"),
    ],
)
def test_every_kernel_is_a_product_the_heart_or_the_rest(operation: str, kernel: str, part: str) -> None:
    assert part_of(operation, kernel) == part


def test_a_batch_of_one_matrix_is_a_layers_product() -> None:
    assert part_of("aten::bmm", "gemm", [[6, 64, 64], [6, 64, 64]]) == "heart"
    assert part_of("aten::bmm", "gemm", [[1, 64, 64], [1, 64, 64]]) == "products"


def test_the_parts_of_a_step_are_all_of_its_time() -> None:
    events = [
        op("aten::mm", 0, 1, 1), op("dig::gla_mixer", 1, 1, 2), kernel("gemm", 5.0, 1), kernel("sum", 1.0, 1),
        kernel("walk_kernel", 7.0, 2), kernel("flash_fwd_kernel", 2.0, 9), kernel("copy", 3.0, 9),
    ]  # fmt: skip
    found = {part.name: (part.us, part.calls) for part in read_parts(events, device="cuda")}
    assert found == {"products": (6.0, 2), "heart": (9.0, 2), "rest": (3.0, 1)}


@pytest.mark.slow
def test_a_profiles_row_can_be_kept_beside_others(tmp_path: Path) -> None:
    rows = tmp_path / "rows" / "profiles.jsonl"
    command = ["profile", "--model", "DiT-S/8", "--resolution", "64", "--device", "cpu", "--out", str(tmp_path / "out")]
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "-m", "bench", *command, "--rows", str(rows)], cwd=ROOT, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
    assert f"added a row to {rows}" in result.stdout
    first, second = read_profiles(rows).rows
    assert first.case == second.case
    assert first.flops > 1e8
    assert all(part.us > 0 for part in first.parts)
