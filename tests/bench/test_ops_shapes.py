"""``bench ops shapes``: what neighbours let expect, on planted times; its real steps on a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cases.case import Case
from bench.cli import ops_in_steps
from bench.cli.ops import ops
from bench.ops import shapes as module
from bench.ops.shapes import Shape, compare_shapes, expected, judged, shapes_of

CASE = Case(model="DiG-S/2", options=(("backend", "triton"), ("variant", "release")), resolution=256, execution="graph")


def test_a_step_is_expected_from_the_nearest_on_either_side() -> None:
    others = [(1.0, 10.0), (2.0, 12.0), (8.0, 24.0), (32.0, 72.0)]
    assert expected(3.0, others) == 14.0
    assert expected(16.0, others) == 40.0
    # Beyond an end, by the two nearest to it.
    assert expected(33.0, others) == 74.0
    assert expected(1.0, others[1:]) == 10.0
    # Less work takes no less than its share, whatever the line says.
    assert expected(1.0, [(2.0, 4.0), (3.0, 9.0)]) == 2.0
    # Nor does more work take less, or more than its share: 255 and 256 tokens differ by noise alone.
    noisy = [(225.0, 2.1), (255.0, 2.1), (256.0, 2.0)]
    assert expected(289.0, noisy) == 2.0
    assert expected(289.0, [(255.0, 2.0), (256.0, 2.1)]) == pytest.approx(2.1 * 289 / 256)
    assert expected(225.0, noisy[1:]) == 2.1
    # Of the same work, by those of it alone.
    assert expected(2.0, [*others, (2.0, 14.0)]) == 13.0
    assert expected(7.0, [(7.0, 5.0)]) == 5.0
    with pytest.raises(ValueError, match="from two others"):
        expected(3.0, others[:1])


def test_each_comparison_varies_one_thing() -> None:
    found = shapes_of(CASE, batches=[1, 3, 8], grids=[(15, 17), (16, 16)], patches=[2, 8])
    assert [(s.case.batch, s.grid, s.case.patch, s.work) for s in found["batch"]] == [
        (1, (16, 16), 2, 256), (3, (16, 16), 2, 768), (8, (16, 16), 2, 2048),
    ]  # fmt: skip
    # The square of the case, and those beside it; none twice.
    assert [s.grid for s in found["grid"]] == [(15, 15), (16, 16), (17, 17), (15, 17)]
    assert [s.input_size for s in found["grid"]][-1] == (30, 34)
    patches = found["patch"]
    assert [(s.case.model, s.case.resolution, s.input_size) for s in patches] == [
        ("DiG-S/2", 256, (32, 32)), ("DiG-S/8", 1024, (128, 128)),
    ]  # fmt: skip
    assert {shape.case.options for several in found.values() for shape in several} == {CASE.options}


def test_a_slow_shape_is_slower_than_its_neighbours_let_expect() -> None:
    shapes = shapes_of(CASE, batches=[1, 2, 3, 8], grids=[], patches=[2, 4])["batch"]
    findings = judged("batch", list(zip(shapes, (2.0, 3.0, 6.0, 9.0), strict=True)))
    assert [finding.expected_ms for finding in findings] == pytest.approx([1.5, 4.0, 4.0, 16.0])
    assert findings[2].ratio == pytest.approx(1.5)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """Times without a GPU: a millisecond for every 256 tokens and one more, but twice that for 33 images."""
    steps: list[Shape] = []

    def capture(shape: Shape) -> Callable[[], object]:
        steps.append(shape)
        ms = (1 + shape.work / 256) * (2 if shape.case.batch == 33 else 1)
        return lambda: ms

    def timed(runs: Sequence[Callable[[], object]], rounds: int, replays: int) -> list[list[float]]:
        return [[float(run())] * rounds for run in runs]  # type: ignore[arg-type]

    def compare(shapes: object, **named: object) -> object:
        return compare_shapes(shapes, **named, captured=capture, timed=timed)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "compare_shapes", compare)
    monkeypatch.setattr(ops_in_steps, "_graph", lambda model, **named: CASE)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a card")
    return steps


def test_the_command_prints_every_step_and_fails_where_one_is_uneven(planted: list[Shape], tmp_path: Path) -> None:
    file = tmp_path / "shapes.jsonl"
    words = ["shapes", "--models", "DiG-S/2:triton", "--modes", "train", "--json", str(file)]
    even = CliRunner().invoke(ops, [*words, "--batches", "1,2,3,8,32"])
    assert even.exit_code == 0, even.output
    steps = 5 + 7 + 3
    assert len(planted) == steps
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == steps == sum("times" in line and "expected  " in line for line in even.output.splitlines())
    assert lines[5 + 3]["grid"] == [15, 17]
    assert f"{steps} steps, 0 above 1.3 times as expected; most: 1.00" in even.output
    uneven = CliRunner().invoke(ops, words)
    assert uneven.exit_code == 1
    assert "16 steps, 1 above 1.3 times as expected; most: 2.00, DiG-S/2 train, 33 images" in uneven.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batches", "1,2"], "--batches takes three numbers or more"),
        (["--patches", "2"], "--patches two"),
        (["--patches", "2,3"], "--patches must be one of 2, 4, 8; got 3"),
        (["--grids", "15"], "--grids takes tokens down and across, such as 15x17, separated by commas; got '15'"),
        (["--grids", "0x17"], "got '0x17'"),
        (["--limit", "0"], "--limit must be positive"),
        (["--modes", "sleep"], "--modes"),
    ],
)
def test_bad_options_are_refused_in_one_line(words: list[str], message: str) -> None:
    result = CliRunner().invoke(ops, ["shapes", *words])
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.gpu
def test_real_steps_of_awkward_shapes_are_timed(tmp_path: Path) -> None:
    file = tmp_path / "shapes.jsonl"
    words = ["shapes", "--models", "DiG-S/2:triton:variant=release", "--modes", "forward", "--batches", "1,2,3"]
    result = CliRunner().invoke(ops, [*words, "--rounds", "2", "--json", str(file), "--limit", "100"])
    assert result.exit_code == 0, result.output
    assert all(json.loads(line)["ms"] > 0 for line in file.read_text().splitlines())
