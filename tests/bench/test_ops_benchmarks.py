"""The benchmarks of single operations: options, steps and rows; their times need a GPU."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.ops import common, variants
from bench.ops.turns import Way
from dig import raster, raster_block

PROGRAMS = ["bench.ops.gla", "bench.ops.srem", "bench.ops.rowwise"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_options_are_checked(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(program)
    for wrong, message in (
        (["--samples", "0"], "--samples must be at least 1"),
        (["--warps", "4", "-1"], "--warps must be at least 1"),
        (["--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["--implementations", "magic"], "invalid choice: 'magic'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            module.options_of(wrong)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert module.options_of([]).samples == 50


def test_ways_to_prepare_weights_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("bench.ops.prepare").main(["--programs", "-1"])
    assert stopped.value.code == 2
    assert "--programs must be at least 0" in capsys.readouterr().err


SETTING = "dig.raster_block.HALVED_TOKENS=0"


@pytest.mark.parametrize("program", [*PROGRAMS, "bench.ops.prepare", "bench.ops.chain", "bench.ops.variants"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so(program: str) -> None:
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        importlib.import_module(program).main(["--set", SETTING] if program.endswith("variants") else [])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("HALVED_TOKENS=0", "a setting is MODULE.NAME=VALUE"),
        ("dig.raster_block.HALVED_TOKENS", "a setting is MODULE.NAME=VALUE"),
        ("dig.rasters.X=0", "there is no module dig.rasters"),
        ("dig.raster_block.HALVED=0", "dig.raster_block has no HALVED"),
        ("dig.raster_block.HALVED_TOKENS=many", "'many' is no Python literal"),
        ("dig.raster_block.HALVED_TOKENS=1.5", "is of type int, 1.5 of float"),
    ],
)
def test_settings_are_checked(setting: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        variants.main(["--set", SETTING, setting])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("program", ["bench.ops.prepare", "bench.ops.chain", "bench.ops.variants"])
def test_one_round_is_too_few(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--set", SETTING] if program.endswith("variants") else []
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(program).main([*arguments, "--rounds", "1"])
    assert stopped.value.code == 2
    assert "must be at least 2; got 1" in capsys.readouterr().err


def test_settings_hold_within_and_end_after() -> None:
    settings = [variants.Setting.parse(text) for text in (SETTING, "dig.raster._FEW_TOKENS=7")]
    before = raster_block.HALVED_TOKENS, raster._FEW_TOKENS
    with variants.applied(settings):
        assert (raster_block.HALVED_TOKENS, raster._FEW_TOKENS) == (0, 7)
    assert (raster_block.HALVED_TOKENS, raster._FEW_TOKENS) == before != (0, 7)


def test_a_way_says_what_it_took_and_how_far_off_it_is() -> None:
    one = Way(ms=[3.0, 1.0, 2.0], result=torch.tensor([3.0, 4.0]))
    assert one.describe().split() == ["2.000", "ms", "(1.000", "to", "3.000)"]
    assert Way(ms=[1.0], result=torch.tensor([3.0, 4.5])).distance(one) == pytest.approx(0.1)


def test_steps_run_forward_and_backward() -> None:
    x = torch.randn(3, requires_grad=True)
    forward = common.make_step(lambda a, none: 2 * a, common.MODES[0], [x, None], [torch.ones(3)])()
    assert torch.equal(forward, 2 * x)
    assert not forward.requires_grad
    (gradient,) = common.make_step(lambda a, none: 2 * a, common.MODES[1], [x, None], [torch.ones(3)])()
    assert torch.equal(gradient, torch.full((3,), 2.0))


def test_tiles_are_put_back_even_after_an_error() -> None:
    module = SimpleNamespace(tiles_for=lambda x: "own")

    def fail() -> None:
        with common.use_tiles(module, "chosen"):  # type: ignore[arg-type]
            raise RuntimeError(module.tiles_for(1))

    with pytest.raises(RuntimeError, match="chosen"):
        fail()
    assert module.tiles_for(1) == "own"


def test_what_cannot_run_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> list[common.Step]:
        raise ImportError("needs fla")

    options = SimpleNamespace(samples=5, kernels=False)
    row = common.measure({"operation": "gla"}, missing, size=1, rate=1.0, options=options)  # type: ignore[arg-type]
    path = tmp_path / "rows.jsonl"
    common.report(row, "gla", path)
    assert json.loads(path.read_text()) == {"operation": "gla", "status": "ImportError", "message": "needs fla"}
    assert capsys.readouterr().out == "gla ImportError: needs fla\n"
