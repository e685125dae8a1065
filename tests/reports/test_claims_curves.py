"""Claims of curves: where two cross, and to which power of the tokens one grows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.store.rows import Row
from reports.claims.curves import crossing, judge_crossover, judge_exponent, slope, slope_range
from reports.claims.readme import Section
from reports.claims.rows import Files
from reports.claims.spec import Crossover, Exponent, names_of

NOTHING = Section(prose="", tables=())
TRITON, PLAIN = (("backend", "triton"),), (("backend", "materialized"),)
Rows = Callable[..., Path]


@pytest.mark.parametrize(
    ("leads", "expected"),
    [
        ([0.1, 0.2, 0.3], 256.0),
        ([-0.1, -0.2, -0.3], None),
        # Halfway in the logarithm of 512 and 1024.
        ([-0.1, -0.2, 0.2], 512 * math.sqrt(2)),
        # What it loses again doesn't count.
        ([0.1, -0.1, 0.3], 512 * 2**0.25),
        ([-0.1, -0.1, math.inf], 1024.0),
        # Ours did not fit in memory in between, or at the end.
        ([0.1, -math.inf, 0.3], 1024.0),
        ([0.1, -math.inf, math.inf], 1024.0),
        ([0.1, 0.2, -math.inf], None),
    ],
)
def test_where_curves_cross(leads: list[float], expected: float | None) -> None:
    found = crossing([256, 512, 1024], leads)
    assert found == (expected if expected is None else pytest.approx(expected))


def curve(
    make_row: Callable[..., Row], model: str, options: Any, times: dict[int, float], spread: float = 0.0
) -> list[Row]:
    return [
        make_row(
            model,
            resolution=size,
            options=options,
            samples_ms=tuple(ms * (1 + spread * k / 10) for k in range(-10, 11)),
        )
        for size, ms in times.items()
    ]


def crossover(**changes: Any) -> Crossover:
    fields: dict[str, Any] = {"id": "cross", "source": "here", "said": "DiG overtakes DiT", "rows": "rows.jsonl"}
    return Crossover(**{**fields, "ours": "DiG-S/2:triton@*:train", "peer": "DiT-S/2@*:train", **changes})


def test_a_crossover_has_an_interval(make_row: Callable[..., Row], write_rows: Rows) -> None:
    rows = curve(make_row, "DiG-S/2", TRITON, {256: 1.0, 512: 2.0, 2048: 8.0}, 0.05)
    rows += curve(make_row, "DiT-S/2", PLAIN, {256: 0.5, 512: 1.0, 2048: 16.0}, 0.05)
    finding = judge_crossover(crossover(), Files([write_rows(rows)], {"rows.jsonl"}), NOTHING)
    assert finding.verdict == "holds"
    assert finding.measured == "ahead from about 1020 pixels, interpolated between 512 and 2048"
    # However exact the times are, what lies between two resolutions was not measured.
    assert finding.interval == (512, 2048)
    # The times at 512 may be ours already, or not: then the place may also lie before.
    rows = curve(make_row, "DiG-S/2", TRITON, {256: 1.0, 512: 1.02, 2048: 8.0}, 0.1)
    rows += curve(make_row, "DiT-S/2", PLAIN, {256: 0.5, 512: 1.0, 2048: 16.0}, 0.1)
    finding = judge_crossover(crossover(), Files([write_rows(rows)], {"rows.jsonl"}), NOTHING)
    assert finding.measured == "ahead from about 530 pixels, interpolated between 512 and 2048"
    assert finding.interval == (256, 2048)


def test_ours_that_does_not_fit_where_the_peer_does_is_behind(make_row: Callable[..., Row], write_rows: Rows) -> None:
    rows = curve(make_row, "DiG-S/2", TRITON, {256: 1.0, 512: 2.0}) + curve(
        make_row, "DiT-S/2", PLAIN, {256: 2.0, 512: 4.0, 2048: 16.0}
    )
    rows.append(make_row("DiG-S/2", resolution=2048, options=TRITON, status="oom"))
    finding = judge_crossover(crossover(), Files([write_rows(rows)], {"rows.jsonl"}), NOTHING)
    assert (finding.verdict, finding.interval) == ("does not hold", None)
    assert finding.measured == "not ahead at 2048, the largest measured"
    assert finding.notes[0].endswith("256: 2, 512: 2, 2048: ours not at all")
    assert "DiG-S/2 (triton) at 2048: OOM" in finding.notes


def test_a_crossover_beyond_what_was_measured_is_not_measured(make_row: Callable[..., Row], write_rows: Rows) -> None:
    rows = curve(make_row, "DiG-S/2", TRITON, {256: 1.0, 512: 2.0}) + curve(
        make_row, "DiT-S/2", PLAIN, {256: 0.5, 512: 1.5}
    )
    files = Files([write_rows(rows)], {"rows.jsonl"})
    assert judge_crossover(crossover(), files, NOTHING).verdict == "not measured"
    rows += curve(make_row, "DiG-S/2", TRITON, {2048: 2.0}) + curve(make_row, "DiT-S/2", PLAIN, {2048: 1.5})
    assert judge_crossover(crossover(), Files([write_rows(rows)], {"rows.jsonl"}), NOTHING).verdict == "does not hold"
    ahead = curve(make_row, "DiG-S/2", TRITON, {256: 1.0}) + curve(make_row, "DiT-S/2", PLAIN, {256: 1.5})
    found = judge_crossover(crossover(), Files([write_rows(ahead)], {"rows.jsonl"}), NOTHING)
    assert (found.verdict, found.measured) == ("holds in part", "ahead from 256 pixels, the only one measured")


def test_a_crossover_reads_several_files_and_of_a_case_the_first_that_has_it(
    make_row: Callable[..., Row], write_rows: Rows
) -> None:
    first = curve(make_row, "DiG-S/2", TRITON, {256: 1.0}) + curve(make_row, "DiT-S/2", PLAIN, {256: 0.5})
    # What is newer, of the case that the first file has, would put ours ahead from the start.
    more = curve(make_row, "DiG-S/2", TRITON, {256: 0.1, 1024: 2.0}) + curve(make_row, "DiT-S/2", PLAIN, {1024: 4.0})
    paths = [write_rows(more, "more.jsonl"), write_rows(first)]
    claim = crossover(also=("more.jsonl", "none.jsonl"))
    files = Files(paths, names_of(claim))
    finding = judge_crossover(claim, files, NOTHING)
    assert finding.measured == "ahead from about 510 pixels, interpolated between 256 and 1024"
    assert finding.notes[0] == "rows.jsonl, more.jsonl: the peer's time over ours at 256: 0.5, 1024: 2"
    assert files.read_for(*names_of(claim)) == paths[::-1]
    assert files.used == set(paths)


def test_exponents(make_row: Callable[..., Row], write_rows: Rows) -> None:
    tokens = [1024.0, 4096.0, 16384.0]
    assert slope(tokens, [t**1.5 for t in tokens]) == pytest.approx(1.5)
    assert slope_range(tokens, [(t, t) for t in tokens]) == pytest.approx((1.0, 1.0))
    # Each 10% either way: the ends of neighbours lie a factor of 1.21 closer, or further, over one of 4.
    low, high = slope_range(tokens, [(t / 1.1, t * 1.1) for t in tokens])
    assert (low, high) == pytest.approx((1 - math.log(1.21) / math.log(4), 1 + math.log(1.21) / math.log(4)))
    # T and T² in parts: no power, and the neighbours' slopes say how far from one.
    low, high = slope_range(tokens, [(t + t**2 / 4096,) * 2 for t in tokens])
    assert 1.2 < low < 1.4 < 1.6 < high < 1.8
    rows = curve(make_row, "DiT-S/2", PLAIN, {512: 1.0, 1024: 16.0, 2048: 256.0})
    files = Files([write_rows(rows)], {"rows.jsonl"})

    def verdict(theory: float) -> str:
        claim = Exponent(
            id="grows",
            source="theory",
            said="grows",
            of="DiT-S/2@*:train",
            figure="time",
            theory=theory,
            rows="rows.jsonl",
        )
        return judge_exponent(claim, files).verdict

    assert [verdict(theory) for theory in (1, 2)] == ["does not hold", "holds"]


def test_of_a_sets_memory_the_leanest_counts(make_row: Callable[..., Row], write_rows: Rows) -> None:
    """The fastest way may be another one at each resolution, and take more."""
    lean, fast = (("backend", "sdpa-cudnn"),), (("backend", "flash-attn"),)
    rows = [
        make_row("Flash-DiT-S/2", size, ms, options=options, gib=gib)
        for size in (256, 512, 1024)
        for options, ms, gib in ((lean, 2.0, (size / 256) ** 2), (fast, 1.0, 2 * (size / 256) ** 4))
    ]
    claim = Exponent(
        id="leanest", source="here", said="linear", of="best Flash-DiT-S/2@*:train", figure="memory", theory=1.0,
        rows="rows.jsonl",
    )  # fmt: skip
    finding = judge_exponent(claim, Files([write_rows(rows)], {"rows.jsonl"}))
    assert (finding.verdict, finding.measured) == ("holds", "to the power 1.00")
    assert "--models Flash-DiT:sdpa-cudnn " in finding.command
