"""Whose data may have stayed in the L2 cache from step to step says so: its row is marked ``l2-warm``."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.cases.jobs import CaseJob, RankJob
from bench.measure import case as measuring
from bench.measure import ranks
from bench.store.rows import Row
from tests.bench.harness import QUICK, small

pytestmark = pytest.mark.usefixtures("shallow")

L2 = 50 << 20


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with a cache, and nothing else."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=L2))


def by_peak(asked: list[int | None], fits: bool) -> Callable[..., bool]:
    def fits_in_l2(case: Any, working_set: int | None) -> bool:
        asked.append(working_set)
        return fits

    return fits_in_l2


@pytest.mark.parametrize(("flushes", "fits", "warm"), [(False, True, True), (False, False, False), (True, True, False)])
def test_a_case_whose_data_fits_and_was_not_flushed_is_marked(
    flushes: bool, fits: bool, warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []
    monkeypatch.setattr(measuring, "_l2_flush", lambda device: (lambda: None) if flushes else None)
    monkeypatch.setattr(measuring, "fits_in_l2", by_peak(asked, fits))
    row = measuring.measure_case(CaseJob(case=small(), budget=QUICK, environment={}, matmul_ceiling=None))
    assert row.status == "ok", row.message
    assert ("l2-warm" in row.marks) == warm
    assert row.timing is not None
    assert row.timing.l2_flushed == flushes
    assert row.memory is not None
    assert set(asked) <= {row.memory.allocator_peak}


@pytest.mark.parametrize("fits", [True, False])
def test_a_rank_flushes_nothing_and_is_marked_where_its_data_fits(fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of one rank, in this process."""
    asked: list[int | None] = []
    rows: list[Row] = []
    monkeypatch.setattr(ranks, "fits_in_l2", by_peak(asked, fits))
    job = CaseJob(
        case=small(mode="train", processes=2, parallel="ddp"), budget=QUICK, environment={}, matmul_ceiling=None
    )
    ranks.measure_rank(RankJob(job=job, run="r", patience=30.0), lambda phase: None, rows.append)
    (row,) = rows
    assert row.status == "ok", row.message
    assert ("l2-warm" in row.marks) == fits
    assert row.timing is not None
    assert not row.timing.l2_flushed
    assert row.memory is not None
    assert asked == [row.memory.allocator_peak]


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("working_set", "fits"), [(L2, True), (2 * L2, True), (2 * L2 + 1, False), (None, True)])
def test_up_to_twice_the_cache_may_stay_in_it(working_set: int | None, fits: bool) -> None:
    """What is written takes turns with what is read; of a peak that nobody knows the worst is assumed."""
    assert measuring.fits_in_l2(small(device="cuda"), working_set) == fits
    assert not measuring.fits_in_l2(small(), working_set)


@pytest.mark.usefixtures("card")
def test_a_flush_overwrites_twice_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    right = torch.empty

    def empty(size: int, *, dtype: torch.dtype, device: str) -> torch.Tensor:
        assert device == "cuda"
        made.append(right(size, dtype=dtype).fill_(1))
        return made[-1]

    monkeypatch.setattr(torch, "empty", empty)
    assert measuring._l2_flush("cpu") is None
    flush = measuring._l2_flush("cuda")
    assert flush is not None
    flush()
    (written,) = made
    assert written.nbytes == 2 * L2
    assert not written.any()


@pytest.mark.usefixtures("card")
def test_no_memory_for_a_flush_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*size: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    assert measuring._l2_flush("cuda") is None
