"""Adaptive norm on Triton against its PyTorch reference in fp64, output and every gradient.

On a GPU also at long sequences; elsewhere under Triton's interpreter. Every buffer that the operations allocate is
filled with NaN first, so an element that no kernel writes cannot pass.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from dig.ops.adaln import fused, norm_modulate, residual_norm_modulate
from dig.ops.adaln.fused import MAX_WIDTH, parts_of, tiles_for
from dig.ops.tiles import INTERPRETER
from dig.ops.tiles.choices import NormTiles
from dig.ops.tiles.sm90 import ADALN
from tests.helpers import LARGE, relative_error

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LENGTHS = (1, 15, 63, 65, 4097) if LARGE else (1, 15, 63, 65)
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 1e-2}
DTYPES = (torch.float32, torch.bfloat16)
NORMS = ("rms", "layer")
BASE = INTERPRETER.adaln[384, torch.float32]
OPERATIONS = {"norm_modulate": norm_modulate, "residual_norm_modulate": residual_norm_modulate}

pytestmark = pytest.mark.usefixtures("poison")


def make_inputs(
    operation: str,
    T: int,
    D: int = 32,
    *,
    B: int = 1,
    norm: str = "rms",
    dtype: torch.dtype = torch.float32,
    modulation_dtype: torch.dtype | None = None,
) -> list[Tensor | None]:
    """Arguments of an operation; gate, shift and scale are slices of one modulation, as in the model."""
    modulation = torch.randn(B, 6 * D, device=DEVICE, dtype=modulation_dtype or dtype).chunk(6, dim=1)
    weight = 1 + torch.randn(D, device=DEVICE) / 2 if norm == "rms" else None
    x, branch = (torch.randn(B, T, D, device=DEVICE, dtype=dtype) for _ in range(2))
    if operation == "norm_modulate":
        return [x, modulation[3], modulation[4], weight]
    return [x, branch, modulation[2], modulation[3], modulation[4], weight]


def run(function, inputs: list[Tensor | None], gradients: list[Tensor]) -> list[Tensor]:
    """Every output and every input's gradient."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [x for x in leaves if x is not None]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, wanted, gradients)]


def widened(inputs: list[Tensor | None]) -> list[Tensor | None]:
    """The same numbers in fp64: rounded to bf16 where the inputs are."""
    return [None if x is None else x.double().cpu() for x in inputs]


def assert_close(
    operation: str,
    inputs: list[Tensor | None],
    *,
    norm: str,
    dtype: torch.dtype,
    tolerance: float | None = None,
    eps: float = 1e-6,
) -> None:
    x = inputs[0]
    gradients = [torch.randn(x.shape, device=DEVICE).to(dtype)]
    if operation == "residual_norm_modulate":
        gradients.insert(0, torch.randn_like(x))
    function = partial(OPERATIONS[operation], norm=norm, eps=eps)
    actual = run(partial(function, dtype=dtype, implementation="triton"), inputs, gradients)
    expected = run(
        partial(function, dtype=torch.float64, implementation="reference"), widened(inputs), widened(gradients)
    )
    dtypes = [g.dtype for g in gradients] + [x.dtype for x in inputs if x is not None]
    assert [value.dtype for value in actual] == dtypes
    found = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    assert all(error < (tolerance or TOLERANCE[dtype]) for error in found), found


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "B"), [(T, B) for T in LENGTHS for B in (1, 3)] if LARGE else [(1, 3), (15, 1), (63, 3), (65, 1)]
)
def test_matches_fp64(T: int, B: int, dtype: torch.dtype, operation: str, norm: str) -> None:
    assert_close(operation, make_inputs(operation, T, B=B, norm=norm, dtype=dtype), norm=norm, dtype=dtype)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("D", "norm"),
    [(D, norm) for D in (384, 768, 1024, 1152) for norm in NORMS] if LARGE else [(384, "layer"), (1152, "rms")],
)
def test_widths_of_the_models(D: int, dtype: torch.dtype, operation: str, norm: str) -> None:
    assert_close(operation, make_inputs(operation, 19, D, B=2, norm=norm, dtype=dtype), norm=norm, dtype=dtype)


@pytest.mark.parametrize("D", [1, 7, 48, MAX_WIDTH])
def test_any_width(D: int) -> None:
    # With a small eps, a norm over one value hides how large it is, and its gradient is 0 but for rounding.
    inputs = make_inputs("residual_norm_modulate", 5, D)
    assert_close("residual_norm_modulate", inputs, norm="rms", dtype=torch.float32, eps=0.1)


@pytest.mark.parametrize("tiles", sorted(set(ADALN.values()), key=repr), ids=lambda t: f"{t.part}-{t.backward_part}")
def test_tiles_of_the_gpu(tiles: NormTiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's own tiles cut rows in fewer parts; here each program walks over rows several times, too."""
    fewer = replace(tiles, programs=3, branch_programs=3)
    monkeypatch.setattr(fused, "tiles_for", lambda x: fewer)
    inputs = make_inputs("residual_norm_modulate", 21, 1152 if tiles.backward_part > 512 else 384)
    assert_close("residual_norm_modulate", inputs, norm="rms", dtype=torch.float32)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_fp32_stream_with_bf16_branch_and_modulation(operation: str) -> None:
    """What autocast leaves: the stream and the weight in fp32, the rest in bf16."""
    inputs = make_inputs(operation, 20, 384, B=2, modulation_dtype=torch.bfloat16)
    if operation == "residual_norm_modulate":
        inputs[1] = inputs[1].bfloat16()
    assert_close(operation, inputs, norm="rms", dtype=torch.bfloat16)


@pytest.mark.parametrize("norm", NORMS)
def test_long_sums_over_tokens(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More partial sums than the last kernel reads at once, from several batch entries."""
    chosen = fused.tiles_for

    def tiles_for(x: Tensor) -> NormTiles:
        return replace(chosen(x), programs=87, branch_programs=87, sum_rows=16, sum_columns=128, sum_least_rows=16)

    monkeypatch.setattr(fused, "tiles_for", tiles_for)
    inputs = make_inputs("norm_modulate", 4097 if LARGE else 450, 8, B=3, norm=norm)
    assert_close("norm_modulate", inputs, norm=norm, dtype=torch.float32)


@pytest.mark.parametrize(("branch", "programs"), [(False, 6), (True, 4)])
def test_a_gated_branch_has_programs_of_its_own(branch: bool, programs: int) -> None:
    """The registers of its sums leave an SM fewer of them."""
    tiles = replace(BASE, programs=12, branch_programs=8)
    strides = ((384 * 256, 384, 1),) * 4
    _, _, partials = fused.backward_launches(
        tiles, torch.Size((2, 256, 384)), strides, (384, 384, 384), "rms", True, branch, True
    )
    assert partials == (2, programs, 3 if branch else 2, 384)


def test_rows_of_partial_sums_follow_their_number() -> None:
    """A program adds up as many elements whatever that is."""
    found = {partials: BASE.sums(partials) for partials in (1, 16, 33, 200, 5000)}
    assert {partials: sums["ROWS"] for partials, sums in found.items()} == {1: 32, 16: 32, 33: 64, 200: 256, 5000: 256}
    assert {sums["ROWS"] * sums["COLS"] for sums in found.values()} == {256 * 8}
    assert [sums["ALL_ROWS"] for sums in found.values()] == [64, 64, 128, 256, 256]


@pytest.mark.slow
def test_more_partial_sums_than_one_read_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    many = replace(BASE, part=32, backward_rows=1, backward_part=32, programs=140, branch_programs=140, sum_rows=32)
    monkeypatch.setattr(fused, "tiles_for", lambda x: many)
    inputs = make_inputs("residual_norm_modulate", 75, 8, B=2)
    assert_close("residual_norm_modulate", inputs, norm="rms", dtype=torch.float32)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_layer_norm_of_values_far_from_zero(operation: str) -> None:
    """1000 + noise: a variance from the mean square would be off by as much as it is large."""
    inputs = make_inputs(operation, 17, 384, norm="layer")
    inputs[0] = inputs[0] + 1000
    assert_close(operation, inputs, norm="layer", dtype=torch.float32, tolerance=5e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_rows_of_zeros_are_finite(norm: str) -> None:
    inputs = make_inputs("norm_modulate", 5, norm=norm)
    inputs[0] = torch.zeros_like(inputs[0])
    assert_close("norm_modulate", inputs, norm=norm, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_that_of_the_rounded_sum(dtype: torch.dtype) -> None:
    inputs = make_inputs("residual_norm_modulate", 20, dtype=dtype)
    options = {"norm": "rms", "dtype": dtype, "implementation": "triton"}
    x_new, h = residual_norm_modulate(*inputs, **options)
    assert torch.equal(h, norm_modulate(x_new, *inputs[3:], **options))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_strided_tokens_are_read_in_place(operation: str) -> None:
    """Batch and token strides of their own, also in the gradients that come in."""
    inputs = make_inputs(operation, 20, B=2)
    for index in range(1 if operation == "norm_modulate" else 2):
        wide = torch.randn(20, 2, 2 * 32, device=DEVICE)
        inputs[index] = wide.transpose(0, 1)[..., 16:48]
        assert not inputs[index].is_contiguous()
    assert_close(operation, inputs, norm="rms", dtype=torch.float32)


def test_gradients_of_any_strides() -> None:
    inputs = make_inputs("residual_norm_modulate", 20, B=2)
    function = partial(residual_norm_modulate, norm="rms", dtype=torch.float32, implementation="triton")
    gradient = torch.ones(2, 20, 32, device=DEVICE)
    expected = run(function, inputs, [gradient, gradient])
    transposed = gradient.transpose(1, 2).contiguous().transpose(1, 2)
    broadcast = torch.ones((), device=DEVICE).expand(2, 20, 32)
    for one in (transposed, broadcast):
        for a, b in zip(run(function, inputs, [one, one]), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_through_one_output_only(used: int) -> None:
    inputs = make_inputs("residual_norm_modulate", 20)
    function = partial(residual_norm_modulate, norm="rms")
    gradient = torch.randn(1, 20, 32, device=DEVICE)
    one = lambda *x, **options: function(*x, **options)[used]  # noqa: E731
    actual = run(partial(one, dtype=torch.float32, implementation="triton"), inputs, [gradient])
    leaves = [x.requires_grad_() for x in widened(inputs)]
    output = one(*leaves, dtype=torch.float64, implementation="reference")
    expected = torch.autograd.grad(output, leaves, gradient.double().cpu(), materialize_grads=True)
    for a, e in zip(actual[1:], expected, strict=True):
        torch.testing.assert_close(a.double().cpu(), e, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_two_runs_are_bit_identical(operation: str) -> None:
    inputs = make_inputs(operation, 65, 48, B=2, dtype=torch.bfloat16)
    gradients = [torch.randn_like(inputs[0])] * (1 if operation == "norm_modulate" else 2)
    function = partial(OPERATIONS[operation], norm="rms", dtype=torch.bfloat16, implementation="triton")
    for a, b in zip(run(function, inputs, gradients), run(function, inputs, gradients), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operators_are_registered_soundly(operation: str, norm: str) -> None:
    """Schema, fake implementation and autograd registration, also with symbolic shapes."""
    inputs = [x if x is None else x.detach().requires_grad_() for x in make_inputs(operation, 5, norm=norm)]
    torch.library.opcheck(getattr(torch.ops.dig, operation).default, (*inputs, norm, 1e-6, torch.bfloat16))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("norm", NORMS)
def test_compiles_into_one_graph(norm: str, backend: str) -> None:
    inputs = make_inputs("residual_norm_modulate", 9, B=2, norm=norm, dtype=torch.bfloat16)
    gradients = [torch.randn_like(inputs[0]) for _ in range(2)]
    function = partial(residual_norm_modulate, norm=norm, dtype=torch.bfloat16, implementation="triton")
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for a, b in zip(run(compiled, inputs, gradients), run(function, inputs, gradients), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_cuda_graph_replays_the_same() -> None:
    inputs = make_inputs("residual_norm_modulate", 130, 384, dtype=torch.bfloat16)
    gradients = [torch.randn_like(inputs[0]) for _ in range(2)]
    function = partial(residual_norm_modulate, norm="rms", dtype=torch.bfloat16, implementation="triton")
    expected = run(function, inputs, gradients)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(function, inputs, gradients)
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


def test_parts_cover_every_column_once() -> None:
    for D in range(1, 300):
        for widest in (1, 16, 256):
            parts = parts_of(D, widest)
            assert [column for first, width in parts for column in range(first, first + width)] == list(range(D))
            assert all(width <= widest and width & (width - 1) == 0 for _, width in parts)


@pytest.mark.gpu
def test_every_width_has_tiles() -> None:
    for D in (1, 384, 400, 1152, MAX_WIDTH):
        for dtype in DTYPES:
            tiles_for(torch.empty(1, 1, D, dtype=dtype, device=DEVICE))


BAD_ARGUMENTS = {
    "x must be (B, T, D)": {"x": lambda x: x[0]},
    "x must be (B, T, D), none of them 0": {"x": lambda x: x[:, :0]},
    "x must be torch.float32 or torch.bfloat16; got torch.float16": {"x": lambda x: x.half()},
    "x must be contiguous in its last dimension": {"x": lambda x: torch.cat((x, x), -1)[..., ::2]},
    "branch must have x's shape": {"branch": lambda x: x[:, 1:]},
    "branch must be torch.float32 or torch.bfloat16; got torch.float64": {"branch": lambda x: x.double()},
    "branch must be on x's device": {"branch": lambda x: x.to("meta")},
    "branch must be contiguous in its last dimension": {"branch": lambda x: torch.cat((x, x), -1)[..., ::2]},
    "gate must have shape (1, 32)": {"gate": lambda x: x[0]},
    "gate must be torch.float32; got torch.bfloat16": {"gate": lambda x: x.bfloat16()},
    "shift must have shape (1, 32)": {"shift": lambda x: x[:, 1:]},
    "shift must be contiguous in its last dimension": {"shift": lambda x: torch.cat((x, x), -1)[..., ::2]},
    "scale must have shape (1, 32)": {"scale": lambda x: torch.cat((x, x))},
    "scale must be torch.float32 or torch.bfloat16; got torch.float64": {"scale": lambda x: x.double()},
    "weight must have shape (32,) for norm 'rms'; got (31,)": {"weight": lambda x: x[1:]},
    "weight must have shape (32,) for norm 'rms'; got None": {"weight": lambda x: None},
    "weight must be torch.float32 or torch.bfloat16; got torch.float16": {"weight": lambda x: x.half()},
    "weight must be None for norm 'layer'": {"norm": lambda x: "layer"},
    "norm must be one of rms, layer; got 'batch'": {"norm": lambda x: "batch"},
    "dtype must be torch.float32 or torch.bfloat16; got torch.float16": {"dtype": lambda x: torch.float16},
    "implementation must be one of reference, triton; got 'apex'": {"implementation": lambda x: "apex"},
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_named(message: str) -> None:
    names = ("x", "branch", "gate", "shift", "scale", "weight")
    arguments = dict(zip(names, make_inputs("residual_norm_modulate", 4), strict=True))
    arguments |= {"norm": "rms", "dtype": torch.float32, "implementation": "triton"}
    for name, change in BAD_ARGUMENTS[message].items():
        arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        residual_norm_modulate(**arguments)
    if {"branch", "gate"}.isdisjoint(BAD_ARGUMENTS[message]):
        del arguments["branch"], arguments["gate"]
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            norm_modulate(**arguments)


def test_too_wide_rows_and_bad_tiles_are_refused() -> None:
    inputs = make_inputs("norm_modulate", 1, MAX_WIDTH + 1)
    with pytest.raises(ValueError, match=rf"^x must have a width of at most {MAX_WIDTH}; got"):
        norm_modulate(*inputs, norm="rms", dtype=torch.float32, implementation="triton")
    with pytest.raises(ValueError, match=r"^part must be a power of two; got 384"):
        replace(BASE, part=384)
    with pytest.raises(ValueError, match=r"^programs must be at least 1; got 0"):
        replace(BASE, programs=0)
