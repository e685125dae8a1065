"""More GPUs on paper: the formulas by hand, the page as it is generated, and rows that are measured."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.cases.case import Case
from bench.judge.scaling import points
from bench.measure.intervals import MedianInterval
from bench.store.ledgers import Memory, Scaling, Timing
from bench.store.rows import Row, read_results
from dig.config import SIZES
from dig.environment import ROOT
from reports import scaling
from reports.scaling_model import (
    BLOCKS,
    Assumed,
    MissingRowError,
    Work,
    all_reduce_s,
    check_on_s,
    ddp_step,
    find,
    fsdp_step,
    gather_s,
    nodes_of,
    step_of,
    stops_at,
    work_of,
)

runner = CliRunner()
PAGE = ROOT / "docs" / "scaling.md"
EASY = Assumed(
    nvlink=100.0, nic=10.0, achieved=0.5, per_node=4, nvlink_latency=0.0, nic_latency=0.0, bucket=1e9, overlap=1.0,
    memory=1e9, gradient_bytes=4.0, weight_bytes=2.0,
)  # fmt: skip
WORK = Work(parameters=1000, floor_s=3.0, image_s=6.0, optimizer_s=8.0, image_bytes=1e6)


def published() -> list[Row]:
    return [row for path in scaling.ROWS for row in read_results(path).rows]


def test_a_ring_within_a_node_and_a_share_across() -> None:
    # 3/4 of 2000 bytes at 50 bytes a second; then 1/2 of a fourth of them at 5.
    assert gather_s(2000, 4, EASY) == pytest.approx(30.0)
    assert gather_s(2000, 8, EASY) == pytest.approx(30.0 + 50.0)
    assert gather_s(2000, 1, EASY) == 0.0
    assert gather_s(2000, 2, EASY) == pytest.approx(20.0)
    assert all_reduce_s(2000, 4, EASY) == pytest.approx(2 * 3 / 4 * 2000 / 50)
    slow = replace(EASY, nvlink_latency=1.0, nic_latency=100.0)
    # 3 hops in the node, 2 of four nodes, for each of 5 messages.
    assert gather_s(0, 16, slow, messages=5) == pytest.approx(5 * (3 + 200))
    assert gather_s(0, 1, slow, messages=5) == 0.0


@pytest.mark.parametrize(("gpus", "nodes"), [(1, (1, 1)), (3, (1, 3)), (4, (1, 4)), (12, (3, 4))])
def test_nodes_are_full(gpus: int, nodes: tuple[int, int]) -> None:
    assert nodes_of(gpus, EASY) == nodes
    for wrong in (0, 6, -4):
        with pytest.raises(ValueError, match="full nodes of 4"):
            nodes_of(wrong, EASY)


def test_ddp_hides_under_the_backward_of_the_last_pass() -> None:
    # Forward and backward of 2 images: 3 + 12; two thirds are 10. Gradients: 4000 bytes, 2 · 3/4 of them at 50.
    assert ddp_step(WORK, 2, 4, EASY) == pytest.approx((23.0, 120.0, 110.0))
    assert ddp_step(WORK, 2, 4, replace(EASY, overlap=0.5)) == pytest.approx((23.0, 120.0, 115.0))
    assert ddp_step(WORK, 2, 4, replace(EASY, gradient_bytes=0.1)) == pytest.approx((23.0, 3.0, 0.0))
    # One image fits at a time: the floor twice, and the second one's 9 seconds alone to hide under.
    one = replace(EASY, memory=(1.5e6 + 20 * 1000) / 0.95)
    assert ddp_step(WORK, 2, 4, one) == pytest.approx((26.0, 120.0, 120.0 - 6.0))
    # As many messages as buckets.
    late = replace(EASY, bucket=1000, nvlink_latency=1.0)
    assert ddp_step(WORK, 2, 4, late)[1] == pytest.approx(120.0 + 2 * 4 * 3)


def test_fsdp_gathers_once_reduces_once_and_shares_the_optimizer() -> None:
    # 2000 bytes of weights: 30 s; 4000 of gradients: 60 s. Forward hides 5, backward 10.
    assert fsdp_step(WORK, 2, 4, EASY) == pytest.approx((15 + 2, 90.0, (30 - 5) + (60 - 10)))
    one = replace(EASY, memory=(1.5e6 + 20 * 1000) / 0.95)
    # Two passes: weights and gradients once all the same.
    assert fsdp_step(WORK, 2, 4, one) == pytest.approx((18 + 2, 90.0, (30 - 3) + (60 - 6)))


def test_what_fits_is_left_by_weights_gradients_buckets_and_moments() -> None:
    assumed = replace(EASY, memory=1e7)
    assert WORK.images_at_once(assumed) == int((9.5e6 - 20_000) / 1e6)
    assert (WORK.passes(9, assumed), WORK.passes(10, assumed)) == (1, 2)
    assert WORK.images_at_once(replace(EASY, memory=1.0)) == 1


def test_efficiency_is_of_images_a_second() -> None:
    step = step_of("ddp", WORK, images=2, gpus=4, assumed=EASY)
    assert step.step_s == pytest.approx(133.0)
    assert step.images_per_second == pytest.approx(8 / 133)
    assert step.efficiency == pytest.approx(23 / 133)
    # Against one GPU with 4 images: 35 seconds.
    assert step_of("ddp", WORK, images=2, gpus=4, assumed=EASY, alone=4).efficiency == pytest.approx(
        (2 / 133) / (4 / 35)
    )
    assert step_of("ddp", WORK, images=2, gpus=1, assumed=EASY).efficiency == 1.0
    few = [replace(step, gpus=gpus, efficiency=share) for gpus, share in ((1, 1.0), (8, 0.5), (16, 0.49))]
    assert stops_at(few, EASY) == 8
    assert stops_at(few[2:], EASY) == 0


def row(mode: Any, resolution: int, batch: int, ms: float, **changes: Any) -> Row:
    options = (("backend", "triton"), ("variant", "release"))
    case = Case(model="DiG-XL/2", options=options, resolution=resolution, batch=batch, mode=mode, execution="graph")
    timing = Timing(warmup="steady", warmup_steps=3, ci_low=ms, ci_high=ms)
    memory = Memory(parameters=400, gradients=400, activations=3600)
    given = {"status": "ok", "samples_ms": (ms,) * 3, "parameters": 100, "started_at": "2026-01-01", "timing": timing}
    return Row(case=case, **{"memory": memory, "flops": resolution**2 * batch, **given, **changes})


def test_a_step_is_taken_apart_by_three_rows() -> None:
    rows = [
        row("train", 256, 32, 1000.0),
        row("forward", 256, 1, 11.0),
        row("forward", 256, 64, 74.0),
        row("forward", 512, 1, 99.0),
    ]
    assumed = replace(EASY, hbm=28_000.0)
    # Forward: 10 ms and 1 an image. So 30 ms a pass; AdamW 2800 bytes, 100 ms; 870 ms of 32 images.
    found = work_of(rows, resolution=256, assumed=assumed)
    assert (found.floor_s, found.optimizer_s, found.image_s) == pytest.approx((0.030, 0.100, 0.870 / 32))
    assert (found.parameters, found.image_bytes) == (100, 100.0)
    four = work_of(rows, resolution=512, assumed=assumed)
    assert (four.image_s, four.image_bytes) == pytest.approx((4 * 0.870 / 32, 400.0))
    assert four.floor_s == found.floor_s
    # The newest of a case counts.
    later = [*rows, row("train", 256, 32, 1320.0, started_at="2026-02-01", key="b")]
    assert work_of(later, resolution=256, assumed=assumed).image_s == pytest.approx(1.190 / 32)


@pytest.mark.parametrize(
    ("left_out", "message"), [(0, "mode train"), (1, "batch 1, mode forward"), (2, "batch 64"), (3, "resolution 512")]
)
def test_a_row_that_is_missing_is_named(left_out: int, message: str) -> None:
    rows = [
        row("train", 256, 32, 1000.0),
        row("forward", 256, 1, 11.0),
        row("forward", 256, 64, 74.0),
        row("forward", 512, 1, 99.0),
    ]
    del rows[left_out]
    with pytest.raises(MissingRowError, match=message):
        work_of(rows, resolution=512, assumed=EASY)


def test_rows_of_several_gpus_are_no_step_of_one() -> None:
    several = row("train", 256, 32, 50.0)
    several = replace(several, case=replace(several.case, processes=2, parallel="ddp"))
    with pytest.raises(MissingRowError):
        find([several], model="DiG-XL/2", resolution=256, batch=32, mode="train")


def test_a_ledger_that_is_missing_is_said() -> None:
    rows = [row("forward", 256, 1, 11.0), row("forward", 256, 64, 74.0)]
    with pytest.raises(MissingRowError, match="memory ledger"):
        work_of([*rows, row("train", 256, 32, 1000.0, memory=None)], resolution=256, assumed=EASY)


def test_the_estimate_is_near_what_was_measured() -> None:
    """Of S/2, whose step at 1024 pixels is there: within a seventh."""
    estimated, measured = check_on_s(published())
    assert estimated == pytest.approx(measured, rel=1 / 7)


def test_an_estimate_is_of_one_device() -> None:
    """A newer row of another card leaves it as it is; its times would not add up with those of the first."""
    first = scaling.of_one_device(published())
    known = find(first, model="DiG-XL/2", resolution=256, batch=32, mode="train")
    other = replace(
        known,
        environment={**known.environment, "gpu_name": "NVIDIA H200"},
        samples_ms=tuple(ms / 2 for ms in known.samples_ms),
        started_at="2999-01-01",
    )
    assert scaling.on_paper([*first, other], Assumed()) == scaling.on_paper(first, Assumed())
    assert scaling.on_paper([*first, replace(other, environment=known.environment)], Assumed()) != scaling.on_paper(
        first, Assumed()
    )


def test_the_page_is_what_the_command_prints() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert scaling.into_page(text, scaling.told(published(), Assumed())) == text
    printed = runner.invoke(scaling.app, [])
    assert printed.exit_code == 0, printed.output
    assert printed.stdout.strip() in text


def test_the_page_names_every_assumption_with_its_value() -> None:
    text = PAGE.read_text(encoding="utf-8")
    told = text.partition("| assumed, not measured")[2].partition("\n\n")[0]
    named = {field.name for field in fields(Assumed)} - {"worth"}  # Said beside the tables.
    assert {name for name in named if f"`{name}`" in told} == named
    assumed = Assumed()
    said = (
        f"{assumed.nvlink / 1e9:g} GB/s", f"{assumed.nic / 1e9:g} GB/s", f"{assumed.achieved:.0%}",
        f"{assumed.nvlink_latency * 1e6:g} and {assumed.nic_latency * 1e6:g} µs", f"{assumed.bucket / 2**20:g} MiB",
        f"{assumed.overlap:.0%}", f"{assumed.hbm / 1e12:g} TB/s, {assumed.memory / 1e9:g} GB",
        f"| {assumed.per_node} |",
        f"{assumed.optimizer_bytes:g}, {assumed.gradient_bytes:g}, {assumed.weight_bytes:g}",
    )  # fmt: skip
    assert [words for words in said if words not in told] == []
    assert "python -m reports.scaling" in text


def said(found: MedianInterval | None, form: str) -> str:
    """The middle of an interval, as the page writes it."""
    assert found is not None
    return format(found.median, form)


def silent_more(rows: list[Row], family: str) -> float:
    """Milliseconds by which the sharded step with nothing sent is longer than one GPU's of the same run."""
    (sharded,) = (
        row for row in rows if row.case.family == family and row.case.parallel == "fsdp" and row.case.captures
    )
    assert sharded.scaling is not None
    (alone,) = (
        row
        for row in rows
        if row.scaling is not None
        and row.scaling.run == sharded.scaling.run
        and row.case == replace(sharded.case, processes=1, parallel="", sending="")
    )
    assert alone.median_ms is not None
    return median(sharded.scaling.silent_ms) - alone.median_ms


def test_what_the_page_says_of_its_tables() -> None:
    """The sentences below the tables, held against them."""
    assumed, rows = Assumed(), scaling.of_one_device(published())
    small, large = (work_of(rows, resolution=resolution, assumed=assumed) for resolution in scaling.RESOLUTIONS)
    weak, strong = scaling.steps_of(large, 1024, assumed)
    assert all(step.exposed_s == 0 for step in weak)
    assert stops_at([step for step in strong if step.kind == "ddp"], assumed) == 128
    assert stops_at([step for step in strong if step.kind == "fsdp"], assumed) == 2 * 128
    fsdp, ddp = ([step for step in strong if step.kind == kind and step.gpus > 1] for kind in ("fsdp", "ddp"))
    assert all(a.communication_s < b.communication_s for a, b in zip(fsdp, ddp, strict=True))
    assert large.image_s / work_of(rows, resolution=256, assumed=assumed).image_s == pytest.approx(16, rel=0.01)
    weak, strong = scaling.steps_of(small, 256, assumed)
    assert {step.gpus for step in weak if step.kind == "ddp" and step.exposed_s} == {64, 1024}
    assert step_of("ddp", small, images=32, gpus=32, assumed=assumed).exposed_s == 0
    assert step_of("ddp", small, images=32, gpus=40, assumed=assumed).exposed_s > 0
    assert stops_at([step for step in strong if step.kind == "ddp"], assumed) == 16
    assert stops_at([step for step in strong if step.kind == "fsdp"], assumed) == 2 * 16
    sends = {step.gpus for step in strong if step.kind == "ddp" and step.communication_s > step.compute_s}
    assert sends == {32, 64, 128, 256}
    two = {
        (point.row.case.family, point.row.case.parallel, point.row.case.captures): point
        for point in points(rows)
        if point.row.case.processes == 2
    }
    keys = (("DiG", "ddp"), ("Flash-DiT", "ddp"), ("DiG", "fsdp"), ("Flash-DiT", "fsdp"))
    dig, flash, sharded, flash_sharded = (two[*key, True] for key in keys)
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert f"`ddp` reaches {said(dig.efficiency, '.0%')} of twice one GPU with DiG-XL/2 and" in text
    assert f"and {said(flash.efficiency, '.0%')} with Flash-DiT-XL/2, and" in text
    assert f"{said(dig.exposed_ms, '.1f')} and {said(flash.exposed_ms, '.1f')} ms of sending are exposed" in text
    gib = [point.row.memory.allocator_peak / 2**30 for point in (sharded, dig) if point.row.memory is not None]
    shares = [said(point.efficiency, ".0%") for point in (sharded, flash_sharded)]
    assert f"reach {shares[0]} of twice one with DiG-XL/2 and {shares[1]} with Flash-DiT-XL/2: a step takes" in text
    steps = [said(point.step_ms, ".1f") for point in (sharded, dig)]
    assert f"{steps[0]} ms, by `ddp` {steps[1]}, and {gib[0]:.1f} GiB a GPU instead of {gib[1]:.1f}" in text
    assert f": {said(two['DiG', 'fsdp', False].step_ms, '.0f')} ms, for its hooks" in text
    more = [silent_more(rows, family) for family in ("DiG", "Flash-DiT")]
    assert f"take {more[0]:.1f} ms more than one, Flash-DiT's {more[1]:.1f}" in text


def test_xl_has_so_many_blocks() -> None:
    assert SIZES["XL"][0] == BLOCKS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--assume", "speed=1"], "--assume takes one of nvlink, nic"),
        (["--assume", "nic=fast"], "--assume nic takes a number, as nic=5e+10; got 'fast'"),
        (["--assume", "per_node=2.5"], "takes a whole number"),
        (["--assume", "nic=0"], "must be above 0"),
        (["--assume", "nic=nan"], "must be above 0"),
        (["--assume", "overlap=1.5"], "above 0 and at most 1"),
        (["absent.jsonl"], "cannot read absent.jsonl"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str) -> None:
    result = runner.invoke(scaling.app, words)
    assert (result.exit_code, len(result.output.splitlines())) == (2, 1), result.output
    assert message in result.output


def test_rows_that_say_too_little_and_pages_without_marks(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(row("train", 256, 32, 10.0).to_json() + "\n")
    result = runner.invoke(scaling.app, [str(path)])
    assert (result.exit_code, "no row of DiG:triton" in result.output) == (2, True), result.output
    page = tmp_path / "page.md"
    page.write_text("# A page")
    result = runner.invoke(scaling.app, ["--page", str(page)])
    assert (result.exit_code, "the page has no" in result.output) == (2, True), result.output
    page.write_bytes(b"\x89PNG")
    result = runner.invoke(scaling.app, ["--page", str(page)])
    assert (result.exit_code, "page.md is no text in UTF-8" in result.output) == (2, True), result.output
    result = runner.invoke(scaling.app, ["--page", str(tmp_path / "none.md")])
    assert (result.exit_code, "cannot read" in result.output) == (2, True), result.output
    result = runner.invoke(scaling.app, ["--assume", "hbm=1e-300"])
    assert (result.exit_code, "leave its images no time" in result.output) == (2, True), result.output
    page.write_text(f"# A page\n{scaling.BEGIN}\nold\n{scaling.END}\nafter\n")
    result = runner.invoke(scaling.app, ["--page", str(page), "--assume", "nic=25e9"])
    assert result.exit_code == 0, result.output
    assert "old" not in page.read_text()
    assert page.read_text().endswith(f"\n{scaling.END}\nafter\n")
    assert page.read_text() != scaling.into_page(page.read_text(), scaling.told(published(), Assumed()))


def test_what_was_measured_stands_below(tmp_path: Path) -> None:
    def measured(ms: float, silent: tuple[float, ...] = (), **changes: Any) -> Row:
        one = row("train", 256, 32, ms, marks=changes.pop("marks", ()))
        case = replace(one.case, **changes)
        return replace(one, case=case, scaling=Scaling(run="r", silent_ms=silent), environment={"gpu_name": "H100"})

    rows = [measured(70.0), measured(80.0, (75.0,) * 3, processes=2, parallel="ddp", marks=("throttled",))]
    path = tmp_path / "s.jsonl"
    path.write_text("".join(one.to_json() + "\n" for one in rows))
    result = runner.invoke(scaling.app, [*map(str, scaling.ROWS), str(path)])
    assert result.exit_code == 0, result.output
    table = result.stdout.partition("### Measured")[2]
    assert (
        "| DiG-XL/2 (triton, release) | 2 | ddp, graph | 800 | 80.0<sup>t</sup> | 0.875 (0.875 to 0.875) | 5 (5 to 5) |"
        in table
    )
    assert "Of times with a letter: t: the clock was held down" in table
    assert scaling.as_measured(points(rows[:1])) == ""
