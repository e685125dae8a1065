"""What the driver says, and what is made of its silence."""

from __future__ import annotations

import os

import pytest

from bench.measure.clocks import Watch
from dig.nvml import Gpu, Reading


class Card:
    """A GPU whose answers are written down: used bytes, processes before, then readings."""

    def __init__(self, *, used: int | None = 0, before: dict[int, int] | None = None, readings: tuple = ()) -> None:
        self._used, self._before, self._readings = used, before, list(readings)

    def used(self) -> int | None:
        return self._used

    def processes(self) -> dict[int, int] | None:
        return self._before

    def read(self) -> Reading:
        return self._readings.pop(0)


def watched(card: Card) -> Watch:
    watch = Watch(card)  # type: ignore[arg-type]
    while card._readings:
        watch()
    return watch


def test_clocks_are_summed_up() -> None:
    readings = [Reading(sm_mhz=1980, temperature=60, power=500.0, processes=1), Reading(sm_mhz=1700, temperature=64)]
    readings += [Reading(sm_mhz=1755, temperature=66, power=690.0, reasons=("sw-power-cap",), processes=1)]
    watch = watched(Card(before={}, readings=tuple(readings)))
    clocks = watch.clocks()
    assert clocks is not None
    assert (clocks.sm_mhz_min, clocks.sm_mhz_median, clocks.sm_mhz_max) == (1700, 1755, 1980)
    assert (clocks.temperature_max, clocks.power_max, clocks.throttled) == (66, 690.0, {"sw-power-cap": 0.333})
    assert clocks.others == 0
    assert watch.marks() == []


def test_a_clock_held_down_in_half_of_the_readings_is_marked() -> None:
    hot = Reading(sm_mhz=1200, reasons=("hw-thermal",), processes=1)
    assert watched(Card(before={}, readings=(hot, Reading(processes=1)))).marks() == ["throttled"]
    assert watched(Card(before={}, readings=(hot, Reading(processes=1), Reading(processes=1)))).marks() == []


@pytest.mark.parametrize(
    ("card", "others", "shared"),
    [
        (Card(before={7: 100}, readings=(Reading(processes=2),)), 1, True),
        (Card(before={}, readings=(Reading(processes=1), Reading(processes=3))), 2, True),
        (Card(before={}, readings=(Reading(processes=1),)), 0, False),
        # Hidden: not even this process is listed. Then memory in use before is all there is to go by.
        (Card(before={}, used=600 << 20, readings=(Reading(processes=0),)), None, False),
        (Card(before={}, used=20 << 30, readings=(Reading(processes=0),)), None, True),
        (Card(before=None, used=None, readings=(Reading(),)), None, False),
    ],
)
def test_other_processes_are_noticed_also_where_they_are_hidden(card: Card, others: int | None, shared: bool) -> None:
    watch = watched(card)
    assert watch.others() == others
    assert (watch.marks() == ["shared-gpu"]) is shared


def test_without_a_driver_the_row_says_that_nobody_watched() -> None:
    watch = Watch(None)
    watch()
    assert watch.clocks() is None
    assert watch.marks() == ["unwatched"]


@pytest.mark.parametrize("visible", ["", "-1", "MIG-1234", "GPU-none", "99"])
def test_a_device_that_is_not_there_is_none(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert Gpu.open() is None


def test_the_cpus_near_a_gpu_are_read_from_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    monkeypatch.setattr(os, "cpu_count", lambda: 100)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCpuAffinity", lambda handle, words: [0b1001, 1 << 63][:words])
    assert Gpu(None).near_cpus() == {0, 3, 127}

    def refuse(handle: object, words: int) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCpuAffinity", refuse)
    assert Gpu(None).near_cpus() is None


@pytest.mark.parametrize(
    ("near", "allowed", "bound"),
    [
        ({0, 1, 2, 3, 8}, {1, 2, 3, 8, 9}, {1, 2, 3, 8}),
        ({0, 1, 2, 3}, {0, 1, 2, 3}, None),  # Nothing to change.
        ({0, 1, 2}, {0, 1, 2, 3, 4}, None),  # Too few.
        ({8, 9, 10, 11}, {0, 1, 2, 3}, None),  # None that this process may use.
        (None, {0, 1, 2, 3}, None),
    ],
)
def test_a_worker_stays_near_its_gpu(
    near: set[int] | None, allowed: set[int], bound: set[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.measure.case import stay_near

    card, chosen = Card(), []
    card.near_cpus = lambda: near  # type: ignore[attr-defined]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: chosen.append(cpus), raising=False)
    assert stay_near(card) == (None if bound is None else len(bound))  # type: ignore[arg-type]
    assert chosen == ([] if bound is None else [bound])
    assert stay_near(None) is None
