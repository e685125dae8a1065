"""A step's kernels in order, from a trace."""

from __future__ import annotations

import pytest

from bench.inspect.timeline import Span, spans_of


def event(name: str, start: float, us: float, stream: int = 7, category: str = "kernel") -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": us, "args": {"stream": stream}}


def step(start: float) -> list[dict]:
    """Of four, listed in no order: one after the other, one beside it, one in a gap's distance after both."""
    return [
        event("beside(int)", start + 4, 10, stream=9),
        event("void first<float>(int)", start, 5),
        event("Memset (Device)", start + 5, 1, category="gpu_memset"),
        event("last(int)", start + 20, 2),
    ]


def test_the_last_step_in_order_with_gaps() -> None:
    other = [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1, "dur": 2, "args": {}}, {"ph": "M", "name": "x"}]
    spans = spans_of([*step(1000), *other, *step(500)], steps=2)
    assert spans == [
        Span(name="first<float>", stream=7, start_us=0, us=5, gap_us=0),
        Span(name="beside", stream=9, start_us=4, us=10, gap_us=-1),
        Span(name="Memset ", stream=7, start_us=5, us=1, gap_us=-9),
        Span(name="last", stream=7, start_us=20, us=2, gap_us=6),
    ]


def test_nothing_ran() -> None:
    assert spans_of([], steps=3) == []


def test_steps_that_differ_are_not_shown() -> None:
    with pytest.raises(ValueError, match="7 kernels are not 2 equal steps"):
        spans_of([*step(0), *step(100)[1:]], steps=2)
