"""The benchmarks of single operations: options, steps and rows; their times need a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer.main
from typer.testing import CliRunner, Result

from bench.cli.main import app
from bench.ops import common, rowwise, srem, variants
from bench.ops import products as timed_products
from bench.ops.turns import Way
from dig import config
from dig.ops import tiles

runner = CliRunner()
SETTING = "dig.config.EPS=0.5"
TIMED = ("gla", "srem", "rowwise", "products")
IN_STEPS = ("prepare", "chain", "variants")


def ops(program: str, *words: str) -> Result:
    given = ("--set", SETTING) if program == "variants" else ()
    return runner.invoke(app, ["ops", program, *given, *words])


def refused(found: Result, message: str) -> None:
    assert found.exit_code == 2, found.output
    assert found.output.count("\n") == 1, found.output
    assert message in found.output


@pytest.mark.parametrize("program", ["gla", "srem", "rowwise"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--samples", "0"), "--samples must be at least 1"),
        (("--warps", "4,-1"), "--warps must be at least 1"),
        (("--warps", "4 8"), "--warps takes whole numbers separated by commas"),
        (("--warps", ""), "--warps needs at least one number"),
        (("--dtype", "fp8"), "unknown --dtype 'fp8'"),
        (("--dtype", "bf16,fp32"), "unknown --dtype 'bf16,fp32'"),
        (("--implementations", "magic"), "unknown --implementations 'magic'"),
        (("--implementations", ","), "--implementations needs at least one of triton"),
        (("--json", "."), "choose another --json"),
        (("--nothing",), "--help"),
    ],
)
def test_options_are_checked(program: str, words: tuple[str, ...], message: str) -> None:
    refused(ops(program, *words), message)


def test_products_and_ways_to_prepare_weights_are_checked() -> None:
    refused(ops("products", "--passes", "sideways"), "unknown --passes 'sideways'")
    refused(ops("prepare", "--programs", "-1"), "--programs must be at least 0")


@pytest.mark.parametrize("program", [*TIMED, *IN_STEPS])
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so(program: str) -> None:
    refused(ops(program), "no NVIDIA GPU was found")


def test_help_needs_neither_torch_nor_scipy_and_shows_every_command() -> None:
    code = (
        "import sys, typer.main; from bench.cli.main import app; group = typer.main.get_command(app)\n"
        "print(*group.commands, *group.commands['ops'].commands)\n"
        "sys.exit(bool({'torch', 'scipy.stats'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"run", "list", "sampling", "coverage", "ops", "registers", *TIMED, *IN_STEPS} <= set(done.stdout.split())


def test_defaults_are_what_the_modules_know() -> None:
    """The command line names implementations without torch; the modules that measure are the ones that have them."""
    group = typer.main.get_command(app).commands["ops"].commands  # type: ignore[attr-defined]
    defaults = {name: {p.name: p.default for p in command.params} for name, command in group.items()}
    assert defaults["srem"]["implementations"] == ",".join(srem.IMPLEMENTATIONS)
    assert defaults["rowwise"]["implementations"] == ",".join(rowwise.IMPLEMENTATIONS)
    assert defaults["rowwise"]["operations"] == ",".join(rowwise.OPERATIONS)
    assert defaults["products"]["implementations"] == ",".join(timed_products.IMPLEMENTATIONS)
    assert defaults["products"]["passes"] == ",".join(timed_products.PASSES)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("EPS=0.5", "a setting is MODULE.NAME=VALUE"),
        ("dig.config.EPS", "a setting is MODULE.NAME=VALUE"),
        ("dig.rasters.X=0", "there is no module dig.rasters"),
        ("dig.config.ESP=0", "dig.config has no ESP"),
        ("dig.config.EPS=many", "'many' is no Python literal"),
        ("dig.config.EPS=1", "is of type float, 1 of int"),
        ("dig.ops.tiles.sm90.GLA.walks=8", "dig.ops.tiles.sm90.GLA has no walks"),
        ("dig.ops.tiles.sm90.GLA.chunk=48", "chunk must be 16 times a power of two"),
        ("dig.ops.tiles.sm90.GLA.chunk=big", "'big' is no Python literal"),
        ("dig.ops.tiles.sm90.PASSES.walks=8", "dig.ops.tiles.sm90.PASSES has no walks"),
        ("dig.ops.tiles.sm90.KIB.rows=8", "there is no module dig.ops.tiles.sm90.KIB"),
    ],
)
def test_settings_are_checked(setting: str, message: str) -> None:
    refused(ops("variants", "--set", f"{SETTING}; {setting}"), message)


@pytest.mark.parametrize("program", IN_STEPS)
def test_one_round_is_too_few(program: str) -> None:
    refused(ops(program, "--rounds", "1"), "--rounds must be at least 2; got 1")


def test_registers_that_no_entry_counts_can_be_counted() -> None:
    setting = variants.Setting.parse("dig.ops.tiles.sm90.GLA.output_registers=168")
    before = {place: entry.output_registers for place, entry in tiles.sm90.GLA.items()}
    assert set(before.values()) == {None}
    with setting.applied():
        assert {entry.output_registers for entry in tiles.sm90.GLA.values()} == {168}
    assert {place: entry.output_registers for place, entry in tiles.sm90.GLA.items()} == before


def test_settings_of_one_variant_may_need_each_other() -> None:
    """Two groups are too few for four warps, and are enough for two."""
    groups, warps = (f"dig.ops.tiles.sm90.SREM.{name}=2" for name in ("groups", "warps"))
    with pytest.raises(ValueError, match="warps must be at most"):
        variants.parse_variants([groups])
    before = dict(tiles.sm90.SREM)
    found = variants.parse_variants([f"{warps}; {groups}", warps])
    assert [len(settings) for settings in found.values()] == [0, 2, 1]
    assert before == tiles.sm90.SREM
    with variants.applied(found[f"{warps}; {groups}"]):
        assert {(entry.groups, entry.warps) for entry in tiles.sm90.SREM.values()} == {(2, 2)}


def test_settings_hold_within_and_end_after() -> None:
    other = "dig.ops.tiles.sm90.PASSES.halved_tokens=7"
    settings = [variants.Setting.parse(text) for text in (SETTING, other)]
    assert variants.parse_variants([f"{SETTING}; {other}"]) == {
        "as it is": (),
        f"{SETTING}; {other}": tuple(settings),
    }

    def now() -> tuple[float, int]:
        return config.EPS, tiles.INTERPRETER.passes.halved_tokens

    before = now()
    with variants.applied(settings):
        assert now() == (0.5, 7)
    assert now() == before != (0.5, 7)


def test_a_field_of_a_table_holds_within_and_ends_after() -> None:
    setting = variants.Setting.parse("dig.ops.tiles.interpreter.GLA.chunk=32")
    before = tiles.INTERPRETER.gla_tiles(32, 64, torch.float32)
    with variants.applied([setting]):
        assert tiles.INTERPRETER.gla_tiles(32, 64, torch.float32).chunk == 32 != before.chunk
    assert tiles.INTERPRETER.gla_tiles(32, 64, torch.float32) == before


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

    row = common.measure({"operation": "gla"}, missing, size=1, times=common.Times(rate=1.0, samples=5))
    path = tmp_path / "rows.jsonl"
    common.report(row, "gla", path)
    assert json.loads(path.read_text()) == {"operation": "gla", "status": "ImportError", "message": "needs fla"}
    assert capsys.readouterr().out == "gla ImportError: needs fla\n"
