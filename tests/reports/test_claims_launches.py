"""A ratio of single launches: its interval against committed launches of equal code, which differ by nothing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from bench.store.rows import Row, read_results
from dig.environment import ROOT
from reports.claims.ratio import CAPTURED_APART, LAUNCHED_APART, ratio_of

FILES = [
    *sorted((ROOT / "tests" / "data" / "regression").rglob("*.jsonl")),
    *(ROOT / "results" / "h100" / f"{name}.jsonl" for name in ("rows", "extra", "best")),
]


@pytest.fixture(scope="module")
def launches() -> list[list[Row]]:
    """The launches of one case by one code on one card, group by group."""
    found: dict[Any, list[Row]] = {}
    for path in FILES:
        for row in read_results(path).rows:
            if row.status == "ok" and not row.case.parallel:
                found.setdefault((row.case, row.key, row.environment.get("gpu_uuid")), []).append(row)
    return list(found.values())


@pytest.mark.parametrize(("captures", "apart"), [(True, CAPTURED_APART), (False, LAUNCHED_APART)])
def test_equal_code_is_equal_in_95_percent_and_by_its_steps_alone_in_three_of_four(
    launches: list[list[Row]], captures: bool, apart: float
) -> None:
    pairs = [
        ratio_of(*sides, "time")
        for rows in launches
        if rows[0].case.captures == captures
        for sides in itertools.islice(itertools.combinations(rows, 2), 600)
    ]
    ends = [(pair.low, pair.high) for pair in pairs if pair is not None]
    assert len(ends) > 500
    assert sum(low <= 1 <= high for low, high in ends) >= 0.95 * len(ends)
    # Were this as much, the width that launches add would not be needed.
    assert sum(low * (1 + apart) <= 1 <= high / (1 + apart) for low, high in ends) < 0.85 * len(ends)
