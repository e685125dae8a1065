"""SwiGLU in its products against fp64, under Triton's interpreter where there is no GPU.

Every buffer that the operations allocate is filled with NaN first, so an element that no kernel writes cannot pass.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dig.ops.swiglu import products
from dig.ops.swiglu.products import project_down_backward, project_up, project_up_preparing
from dig.ops.swiglu.reference import reference_swiglu
from dig.ops.tiles import sm90
from dig.ops.tiles.products import ProductTiles
from tests.helpers import LARGE, relative_error

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SHAPES = [(1, 1, 8, 128), (1, 65, 72, 256), (2, 150, 200, 128)]
"""B, T, D, F: neither tokens nor width need fill a tile."""
if LARGE:
    SHAPES += [(1, 12544, 384, 1024), (3, 4097, 1152, 3072), (1, 70000, 384, 1024)]
TOLERANCE = 1e-2
NARROW = sm90.PRODUCTS.narrow
FEW = sm90.PRODUCTS.few["up alone"]
WIDE = {**NARROW, **sm90.PRODUCTS.wide}
"""What a table leaves to a product and a pass is taken from the other."""

ALL_WIDE = replace(sm90.ARCHITECTURE, products=replace(sm90.PRODUCTS, narrow_width=0))

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:.*overflow encountered in exp:RuntimeWarning"),
    pytest.mark.skipif(GPU and torch.cuda.get_device_capability()[0] < 9, reason="the kernels are for Hopper"),
]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Use the kernels for any number of tokens, on a CPU too; names of those that were launched."""
    names: list[str] = []

    class Recorder:
        def __init__(self, kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid):
            names.append(self.kernel.__name__)
            return self.kernel[grid]

    def chosen(which, tokens: Tensor, F: int) -> ProductTiles:
        narrow = tokens.shape[-1] <= products.for_device(tokens.device).products.narrow_width
        return (NARROW if narrow else WIDE)[which]

    monkeypatch.setattr(products, "tiles_for", chosen)
    for name in ("up_swiglu_kernel", "down_swiglu_backward_kernel"):
        monkeypatch.setattr(products, name, Recorder(getattr(products, name)))
    return names


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def check_up(B: int, T: int, D: int, F: int, dtype: torch.dtype = torch.bfloat16, *, keep: bool) -> None:
    x, weight = random(B, T, D, dtype=dtype), random(2 * F, D, dtype=dtype) / D**0.5
    hidden, gate_up = project_up(x, weight, keep)
    expected = x.double().cpu() @ weight.double().cpu().T
    assert hidden.shape == (B, T, F)
    assert relative_error(hidden, reference_swiglu(expected)) < TOLERANCE
    assert gate_up.shape == ((B, T, 2 * F) if keep else (0,))
    if keep:
        for found, half in zip(gate_up.chunk(2, -1), expected.chunk(2, -1), strict=True):
            assert relative_error(found, half) < TOLERANCE


def check_down(B: int, T: int, D: int, F: int, dtype: torch.dtype = torch.bfloat16) -> None:
    dout, weight, gate_up = random(B, T, D, dtype=dtype), random(D, F, dtype=dtype), random(B, T, 2 * F, dtype=dtype)
    dgate_up, hidden = project_down_backward(dout, weight, gate_up)
    leaf = gate_up.double().cpu().requires_grad_()
    expected = reference_swiglu(leaf)
    (gradient,) = torch.autograd.grad(expected, leaf, dout.double().cpu() @ weight.double().cpu())
    assert hidden.shape == (B, T, F)
    assert dgate_up.shape == (B, T, 2 * F)
    assert relative_error(hidden, expected.detach()) < TOLERANCE
    for found, half in zip(dgate_up.chunk(2, -1), gradient.chunk(2, -1), strict=True):
        assert relative_error(found, half) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("keep", [True, False])
def test_up_matches_fp64(shape: tuple[int, ...], keep: bool, launches: list[str]) -> None:
    check_up(*shape, keep=keep)
    assert launches == ["up_swiglu_kernel"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_down_matches_fp64(shape: tuple[int, ...], launches: list[str]) -> None:
    check_down(*shape)
    assert launches == ["down_swiglu_backward_kernel"]


CASTS = [
    ((65, 600, 384), [(40, 128), (3, 128), (20, 256), (9, 384)]),  # Rows that fill no share, several shares across.
    ((65, 600, 384), [(128, 1), (1, 128), (8, 128)]),  # A weight whose rows are no share's: only without a gate.
]
"""(T, D, F) of the product, and the weights."""
if LARGE:
    CASTS += [((4096, 1152, 3072), [(3472, 1152), (576, 16), (6144, 1152), (1152, 1152), (1152, 3072)])]


@pytest.mark.parametrize("gated", [0, 1, 2])
@pytest.mark.parametrize(("product", "shapes"), CASTS, ids=lambda value: str(len(value)))
def test_weights_are_cast_in_the_gemm(
    product: tuple[int, int, int],
    shapes: list[tuple[int, int]],
    gated: int,
    launches: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The product's bits are those without, the casts' those of a cast alone."""
    monkeypatch.setattr(products, "for_device", lambda device: ALL_WIDE)
    T, D, F = product
    x, weight = random(1, T, D), random(2 * F, D) / D**0.5
    masters = [random(*shape, dtype=torch.float32) for shape in shapes]
    gates = [random(len(master), dtype=torch.float32) for master in masters[len(masters) - gated :]]
    assert products.fuses_cast(x, F, masters, gated)
    hidden, *copies = project_up_preparing(x, weight, masters, gates)
    assert launches == ["up_swiglu_kernel"]
    assert torch.equal(hidden, project_up(x, weight, False)[0])
    for i, (copy, master) in enumerate(zip(copies, masters, strict=True)):
        factor = 1.0 if i < len(masters) - gated else gates[i - len(masters)][:, None]
        assert torch.equal(copy, (factor * master).bfloat16()), i


def test_weights_that_cannot_be_are_cast_all_the_same(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "for_device", lambda device: ALL_WIDE)
    x, weight, gate = random(1, 9, 200), random(256, 200) / 14, random(6, dtype=torch.float32)
    for masters in (
        [random(6, 100, dtype=torch.float32)],
        [random(6, 128)],
        [random(128, 6, dtype=torch.float32).T],
    ):
        assert not products.fuses_cast(x, 128, masters, 1)
        _, copy = project_up_preparing(x, weight, masters, [gate])
        assert torch.equal(copy, (gate[:, None] * masters[0]).bfloat16())
    assert launches == ["up_swiglu_kernel"] * 3


@pytest.mark.parametrize(("programs", "steps"), [(768, 18), (3072, 18), (128, 18), (24, 18), (4, 200), (7, 10), (3, 4)])
def test_shares_fit_into_the_steps(programs: int, steps: int) -> None:
    """Every program comes to write all of its shares within its steps, else nothing is cast."""
    shares = products.shares_of([(3472, 1152), (1152, 1152)], 1, share=(32, 128), programs=programs, steps=steps)
    each = -(-(-(-3472 * 9 // 32) + 36 * 9) // programs)
    if each > steps:
        assert shares is None
    else:
        assert shares is not None
        assert each * shares["EVERY"] <= steps
        assert shares["STARTS"] == (0, 977, 977 + 324)
        assert shares["GATE_STARTS"] == (977,)


def test_weights_past_what_an_offset_reaches_are_cast_apart() -> None:
    """A kernel counts a weight's elements in 32 bits."""
    room = {"share": (32, 128), "programs": 2**20, "steps": 100}
    assert products.shares_of([(2**20 - 1, 2**11)], 0, **room) is not None
    assert products.shares_of([(2**20, 2**11)], 0, **room) is None
    assert products.shares_of([(128, 128), (2**20, 2**11)], 1, **room) is None


@pytest.mark.parametrize("value", [-1000.0, 1000.0])
def test_extreme_gates_are_finite(value: float, launches: list[str]) -> None:
    x, weight = torch.ones(1, 9, 8, device=DEVICE).bfloat16(), random(256, 8)
    weight[:128] = value / 8
    hidden, gate_up = project_up(x, weight, True)
    expected = reference_swiglu(x.double() @ weight.double().T)
    torch.testing.assert_close(hidden.double(), expected, rtol=1e-2, atol=1e-2)
    dgate_up, _ = project_down_backward(random(1, 9, 8), random(8, 128), gate_up)
    assert dgate_up.isfinite().all()
    assert launches == ["up_swiglu_kernel", "down_swiglu_backward_kernel"]


def test_both_ways_give_the_same_hidden(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass' hidden is what the forward pass made, bit for bit."""
    x, weight = random(1, 40, 24), random(256, 24) / 5
    hidden, gate_up = project_up(x, weight, True)
    assert torch.equal(project_down_backward(x, random(24, 128), gate_up)[1], hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_the_kernels_do_not_fit(dtype: torch.dtype) -> None:
    for which in NARROW:
        assert products.tiles_for(which, random(1, 20, 24, dtype=dtype), 48) is None
    check_up(1, 20, 24, 48, dtype, keep=True)
    check_up(1, 20, 24, 48, dtype, keep=False)
    check_down(1, 20, 24, 48, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_which_shapes_the_kernels_take() -> None:
    least = sm90.PRODUCTS.least_tokens
    tokens, wide = random(1, least, 384), random(1, least, 1152)
    for which in NARROW:
        assert products.tiles_for(which, tokens, 1024) is NARROW[which]
        assert products.tiles_for(which, tokens, 1000) is None
        assert products.tiles_for(which, tokens[:, 1:], 1024) is None
        assert products.tiles_for(which, tokens[:, :256], 1024) is (FEW if which == "up alone" else None)
        assert products.tiles_for(which, tokens.float(), 1024) is None
        assert products.tiles_for(which, wide, 3072) is sm90.PRODUCTS.wide.get(which)


def test_torch_compile_traces_both() -> None:
    def both(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        hidden, gate_up = project_up(x, up, True)
        return hidden, project_down_backward(x, down, gate_up)[0]

    arguments = random(1, 5, 8), random(64, 8), random(8, 32)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*arguments), both(*arguments), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("operation", [project_up, project_up_preparing, project_down_backward])
def test_operations_are_registered_rightly(operation) -> None:
    x = random(1, 5, 8)
    arguments = {
        project_up: (x, random(64, 8), True),
        project_up_preparing: (x, random(64, 8), [random(3, 4, dtype=torch.float32)], [random(3, dtype=torch.float32)]),
        project_down_backward: (x, random(8, 32), random(1, 5, 64)),
    }[operation]
    torch.library.opcheck(operation.registered, arguments, test_utils=("test_schema", "test_faketensor"))
