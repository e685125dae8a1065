"""Tile choices by architecture, without a GPU: which file a GPU takes, and what is done where a tile does not fit."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.ops.kernel_variants import kernel_variants
from dig.ops import modulation, tiles
from dig.ops.gla import launches, recurrent_gla
from dig.ops.gla.tiled import tiled_gla
from dig.ops.launch import Launch, LaunchContext
from dig.ops.swiglu import products
from dig.ops.tiles import INTERPRETER, KIB, architectures, choices, for_capability, for_device, sm90
from dig.ops.tiles import products as of_products
from dig.ops.tiles.choices import CopyTiles, VectorTiles
from tests.helpers import relative_error

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="launches on the CPU, in the interpreter")

BF16, FP32 = torch.bfloat16, torch.float32
HOPPER = sm90.ARCHITECTURE


@pytest.fixture(autouse=True)
def looked_up_anew() -> Iterator[None]:
    """What was found for a GPU that a test made up is forgotten."""
    yield
    tiles._of_gpu.cache_clear()
    architectures.cache_clear()


def test_what_an_architecture_has() -> None:
    found = {each.capability: (each.shared_memory // KIB, each.early_launch) for each in architectures()}
    assert found == {
        (8, 0): (163, False),
        (8, 9): (99, False),
        (9, 0): (227, True),
        (10, 0): (227, True),
        (12, 0): (99, True),
    }
    # Which tiles beat a GEMM and a pass apart was only measured on Hopper.
    assert [each.capability for each in architectures() if each.product_tiles("up", 4096, 384, 1024)] == [(9, 0)]


@pytest.mark.parametrize(
    ("capability", "taken"),
    [
        ((9, 0), (9, 0)),
        ((8, 6), (8, 0)),
        ((9, 1), (9, 0)),
        ((10, 3), (10, 0)),
        ((11, 0), (10, 0)),
        ((12, 1), (12, 0)),
        ((13, 0), (12, 0)),
    ],
)
def test_a_gpu_without_a_file_takes_the_nearest_older(capability: tuple[int, int], taken: tuple[int, int]) -> None:
    assert for_capability(capability).capability == taken


def test_a_gpu_without_bf16_is_told_what_to_take() -> None:
    with pytest.raises(ValueError, match=r"from compute capability 8\.0 on; this one has 7\.5: use backend"):
        for_capability((7, 5))


def test_how_much_shared_memory_there_is_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """An RTX 30 takes the A100's file and has 64 KiB less."""
    properties = SimpleNamespace(shared_memory_per_block_optin=99 * KIB)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    found = for_device(torch.device("cuda"))
    assert found == replace(for_capability((8, 0)), shared_memory=99 * KIB)
    assert for_device(torch.device("cuda:1")) is found
    assert for_device(torch.device("cpu")) is INTERPRETER


def test_one_file_adds_an_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sm86.py").write_text(
        "from dataclasses import replace\n"
        "from dig.ops.tiles import sm80\n"
        "ARCHITECTURE = replace(sm80.ARCHITECTURE, name='Ampere, small', capability=(8, 6), shared_memory=99 * 1024)\n"
    )
    monkeypatch.setattr(tiles, "__path__", [*tiles.__path__, str(tmp_path)])
    architectures.cache_clear()
    assert str(for_capability((8, 6))) == "Ampere, small (8.6)"
    assert for_capability((8, 0)).name == "Ampere"
    for name, content, message in (
        ("sm110", "from dig.ops.tiles.sm100 import ARCHITECTURE", r"sm110\.py must have the capability \(11, 0\); got"),
        ("sm111", "", r"dig/ops/tiles/sm111\.py must have an ARCHITECTURE, as sm80\.py has"),
        (
            "sm75",
            "from dataclasses import replace\nfrom dig.ops.tiles import sm80\n"
            "ARCHITECTURE = replace(sm80.ARCHITECTURE, capability=(7, 5))",
            r"sm75\.py: the kernels compute in bf16",
        ),
    ):
        (tmp_path / f"{name}.py").write_text(f"{content}\n")
        importlib.invalidate_caches()
        architectures.cache_clear()
        with pytest.raises(ValueError, match=f"^{message}"):
            architectures()
        (tmp_path / f"{name}.py").unlink()


def test_other_heads_take_the_next_wider_tiles() -> None:
    narrow, wide = sm90.GLA[32, 64, BF16], sm90.GLA[36, 72, BF16]
    assert narrow != wide
    assert HOPPER.gla_tiles(32, 64, BF16) == HOPPER.gla_tiles(16, 64, BF16) == narrow
    assert HOPPER.gla_tiles(36, 72, BF16) == HOPPER.gla_tiles(32, 72, BF16) == HOPPER.gla_tiles(64, 128, BF16) == wide
    assert HOPPER.gla_tiles(32, 32, FP32) == sm90.GLA[32, 64, FP32]
    assert HOPPER.gla_tiles(48, 96, FP32) == sm90.GLA[36, 72, FP32]


def test_other_widths_take_the_next_wider_tiles() -> None:
    assert HOPPER.adaln_tiles(1, BF16) == HOPPER.adaln_tiles(384, BF16) == sm90.ADALN[384, BF16]
    assert HOPPER.adaln_tiles(385, FP32) == sm90.ADALN[768, FP32]
    assert HOPPER.adaln_tiles(2048, BF16) == sm90.ADALN[1152, BF16]


@INTERPRETED
def test_a_chunk_that_does_not_fit_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """And computes the same recurrence."""
    assert HOPPER.gla_tiles(32, 64, BF16).shared_memory(32, 64, BF16) == 52 * KIB
    for limit, chunk in ((52, 64), (51, 32), (28, 32), (27, 16)):
        small = replace(HOPPER, shared_memory=limit * KIB)
        assert small.gla_tiles(32, 64, BF16) == replace(sm90.GLA[32, 64, BF16], chunk=chunk)
    levels = replace(HOPPER, gla=sm90.GLA_BY_LEVELS)
    for limit, chunk in ((28, 64), (27, 32), (16, 32), (15, 16), (10, 16)):
        assert replace(levels, shared_memory=limit * KIB).gla_tiles(32, 64, BF16).chunk == chunk
    one = {heads: replace(tiles, gradient_rounds=False) for heads, tiles in INTERPRETER.gla.items()}
    small = replace(INTERPRETER, gla=one, shared_memory=26 * KIB)
    assert small.gla_tiles(16, 16, FP32).chunk == 64 > small.gla_tiles(32, 64, FP32).chunk == 16
    monkeypatch.setattr(launches, "for_device", lambda device: small)
    q, k, v = (torch.randn(1, 40, 1, width) for width in (32, 32, 64))
    decay = -torch.rand(1, 40, 1, 32) / 4
    expected = recurrent_gla(*(x.double() for x in (q, k, v, decay)))
    assert relative_error(tiled_gla(q, k, v, decay), expected) < 2e-3


def test_programs_that_walk_need_room_for_a_state_more() -> None:
    """Where they have none, the forward pass is three launches; what few programs take is looked at by itself."""
    assert sm90.GLA[32, 64, BF16].walk_shared_memory(32, 64, BF16) == 32 * KIB
    table = sm90.GLA_BY_LEVELS[32, 64, BF16]
    assert table.walk_shared_memory(32, 64, BF16) == 32 * KIB
    q, v = (torch.empty(64, 256, 6, width, dtype=BF16, device="meta") for width in (32, 64))
    for limit, walk_chunks, few_walk_chunks in ((32, 8, 8), (31, 0, 8), (13, 0, 0)):
        small = replace(HOPPER, gla=sm90.GLA_BY_LEVELS, shared_memory=limit * KIB)
        found = small.gla_tiles(32, 64, BF16)
        assert found.few is not None
        assert (found.walk_chunks, found.few.walk_chunks) == (walk_chunks, few_walk_chunks)
        assert found.few == replace(table.few, walk_chunks=few_walk_chunks)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launches, "for_device", lambda device, own=small: own)
            assert launches.plan_of(q, v, 1.0, 1.0).walks == bool(walk_chunks)
    # Hopper itself has no room for the widest heads' states twice.
    assert (HOPPER.gla_tiles(128, 256, FP32).walk_chunks, HOPPER.gla_tiles(64, 128, FP32).walk_chunks) == (0, 1)


def test_what_does_not_fit_is_not_compiled_either() -> None:
    def walks(shared_memory: int) -> set[str]:
        small = replace(HOPPER, shared_memory=shared_memory * KIB)
        return {each.sizes for each in kernel_variants(small) if each.function.__name__ == "walk_kernel"}

    assert walks(227) > walks(57) > set()


@INTERPRETED
def test_modulation_keeps_as_many_loads_in_flight_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With other stages the sums are the same."""
    own = sm90.WEIGHTS.modulation
    assert own.shared_memory() == 57 * KIB
    for limit, stages in ((57, 3), (56, 2), (41, 2), (40, 1), (25, 1)):
        small = replace(HOPPER, shared_memory=limit * KIB)
        assert small.modulation_tiles() == replace(own, stages=stages)
    c, weight, bias = torch.randn(3, 20), torch.randn(30, 20), torch.randn(30)
    seen: list[int] = []
    monkeypatch.setattr(modulation, "for_device", lambda device: replace(HOPPER, shared_memory=40 * KIB))
    start = LaunchContext.start

    def seeing(context: LaunchContext, launch: Launch, *tensors: Any) -> None:
        seen.append(launch.constants["num_stages"])
        start(context, launch, *tensors)

    monkeypatch.setattr(LaunchContext, "start", seeing)
    found = modulation.modulation(c, weight, bias)
    modulation.modulation_backward(found, c, weight)
    assert seen == [1, 1, 1]
    assert relative_error(found, c.double() @ weight.double().T + bias.double()) < 2e-6
    message = (
        r"^adaLN's linear layer for a batch needs 25 KiB of shared memory a block; Tiny \(5.3\) has 24: use backend "
        r"'reference'$"
    )
    tiny = replace(HOPPER, name="Tiny", capability=(5, 3), shared_memory=24 * KIB)
    monkeypatch.setattr(modulation, "for_device", lambda device: tiny)
    for call in (modulation.modulation, lambda *inputs: modulation.modulation_backward(found, *inputs[:2])):
        with pytest.raises(ValueError, match=message):
            call(c, weight, bias)


@INTERPRETED
def test_heads_that_do_not_fit_at_all_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(HOPPER, name="Tiny", capability=(5, 3), shared_memory=40 * KIB)
    message = (
        r"^gated linear attention with heads of K = 64 and V = 128 in torch.float32 needs 56 KiB of shared memory a "
        r"block; Tiny \(5.3\) has 40: use backend 'reference' or 'fla', or narrower heads$"
    )
    with pytest.raises(ValueError, match=message):
        small.gla_tiles(64, 128, FP32)
    monkeypatch.setattr(launches, "for_device", lambda device: small)
    q, k, v = (torch.randn(1, 4, 1, width) for width in (64, 64, 128))
    with pytest.raises(ValueError, match=message):
        tiled_gla(q, k, v, -torch.rand_like(q))


@INTERPRETED
def test_a_gemm_whose_stages_do_not_fit_is_done_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Hopper's, 97 KiB is what two take and 193 the third."""
    small = replace(HOPPER, shared_memory=99 * KIB)
    sizes = ((384, 1024), (1152, 3072))
    taken = [
        small.product_tiles(which, 4096, *size) is not None for which in ("up", "up alone", "down") for size in sizes
    ]
    assert taken == [True, False, True, False, True, False]
    assert HOPPER.product_tiles("up alone", 4096, 1152, 3072) is not None
    tokens, F = torch.zeros(1, sm90.PRODUCTS.least_tokens, 384, dtype=BF16), 1024
    for limit, fits in ((97, True), (96, False)):
        limited = replace(HOPPER, shared_memory=limit * KIB)
        monkeypatch.setattr(products, "for_device", lambda device, own=limited: own)
        assert (products.tiles_for("up", tokens, F) is not None) == fits
    hidden, _ = products.project_up(tokens, torch.zeros(2 * F, 384, dtype=BF16), False)
    assert not hidden.any()


def test_few_tokens_take_small_tiles_of_which_there_are_not_too_many() -> None:
    few = sm90.PRODUCTS.few["up alone"]
    assert HOPPER.product_tiles("up alone", 256, 1152, 3072) is few
    assert HOPPER.product_tiles("up alone", 1024, 384, 1024) is few
    assert HOPPER.product_tiles("up alone", 1024, 1152, 3072) is None  # 768 programs
    assert HOPPER.product_tiles("up", 256, 384, 1024) is None
    assert HOPPER.product_tiles("up alone", 256, 384, 1000) is None
    tokens = torch.zeros(1, 256, 1152, dtype=BF16)
    assert not products.fuses_cast(tokens, 3072, [torch.zeros(8, 128)], 0)


def test_gemms_that_read_by_descriptors_need_those() -> None:
    with pytest.raises(ValueError, match=r"^products must be apart on Hopper: its kernels need tensor descriptors"):
        replace(HOPPER, descriptors=False)


def test_few_programs_take_other_tiles() -> None:
    weights = sm90.WEIGHTS
    assert weights.copy_for(None) == weights.copy_for(65) == CopyTiles(elements=4096, warps=8)
    assert weights.copy_for(64) == CopyTiles(elements=16384, warps=32)
    assert weights.vector_for(None) == weights.vector_for(65) == VectorTiles(rows=8, columns=512, warps=4)
    assert weights.vector_for(64) == VectorTiles(rows=32, columns=512, warps=16)


def test_bad_tiles_are_named() -> None:
    with pytest.raises(ValueError, match=r"^chunk must be 16 times a power of two; got 48"):
        replace(sm90.GLA[32, 64, BF16], chunk=48)
    with pytest.raises(ValueError, match=r"^scan_steps must be at least 1; got 0"):
        replace(sm90.GLA[32, 64, BF16], scan_steps=0)
    with pytest.raises(ValueError, match=r"^part must be a power of two; got 100"):
        replace(sm90.ADALN[384, BF16], part=100)


def test_each_number_stands_in_an_architectures_file() -> None:
    """Where it says how it was found: a default would be chosen for all of them, and by nobody.

    Of a kernel's forms the first is no number.
    """
    named = {**vars(choices), **vars(of_products)}
    classes = [each for each in named.values() if isinstance(each, type) and is_dataclass(each)]
    assert {"GlaTiles", "NormTiles", "SremTiles", "ProductChoices", "ModulationTiles"} <= {c.__name__ for c in classes}
    defaults = {
        f"{each.__name__}.{field.name}": field.default if field.default_factory is MISSING else field.default_factory
        for each in classes
        for field in fields(each)
        if field.default is not MISSING or field.default_factory is not MISSING
    }
    assert all(default is None or default is False for default in defaults.values()), defaults
    assert {"GlaTiles.few", "ProductTiles.registers"} <= set(defaults)
