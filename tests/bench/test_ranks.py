"""One model on several processes: real ranks over gloo, what their row says, and that none is waited for."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cases.case import Case
from bench.cases.jobs import Budget, CaseJob, Limits, RankJob
from bench.measure import ranks
from bench.measure.timing import follow, sample
from bench.run.gpus import Card
from bench.run.process import WorkerError
from bench.run.ranks import merge_ranks, rank_variables, run_ranks
from bench.store.ledgers import Memory, Rank, Scaling
from bench.store.rows import Row
from dig.environment import ROOT
from tests.bench.harness import TWO_MINUTES, alive, children

QUICK = Budget(settle_s=0.0, settle_max_s=0.0, least_s=0.0, min_samples=6, target_s=0.0, max_samples=6)
TINY = '''
"""A backbone of three products, and what may happen to it on rank 1 of several."""
import os
import signal
import time

import torch
from torch import nn

from dig.layers import Backbone
from dig.registry import register

MOODS = ("calm", "full", "dead", "stuck", "moody")


@register(name="Tiny", sizes=("S",), options={"mood": MOODS})
class Tiny(Backbone):
    def __init__(self, size, *, mood="calm", **shape):
        super().__init__(**shape)
        width = 2 * shape["in_channels"]
        self.mood, self.calls = mood, 0
        self.inlet = nn.Conv2d(shape["in_channels"], width, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(2))

    def forward(self, x, t, y):
        self.calls += 1
        if os.environ.get("RANK") == "1":
            if self.mood == "full":
                raise torch.OutOfMemoryError("CUDA out of memory: a card of this test")
            if self.mood == "dead":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.mood == "stuck":
                time.sleep(600)
        x = self.inlet(x) * (1 + t.view(-1, 1, 1, 1) / 1000)
        for block in self.blocks:
            x = x + block(x)
        return x * (self.calls if self.mood == "moody" and "RANK" in os.environ else 1)
'''


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str) -> str:
    """The family's import path, in this process and in workers; all is forgotten afterwards (`own`)."""
    name = f"tiny_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(TINY)
    from dig.registry import load_source

    source = f"{name}:Tiny"
    load_source(source)
    return source


def tiny_case(source: str, mood: str = "calm", **changes: Any) -> Case:
    fields = {"processes": 2, "parallel": "ddp", "resolution": 64, "batch": 2, "dtype": "fp32", "device": "cpu"}
    return Case(model="Tiny-S/2", options=(("mood", mood),), source=source, **{**fields, **changes})


def job(case: Case, budget: Budget = QUICK) -> RankJob:
    of_case = CaseJob(case=case, budget=budget, environment={"commit": "abc"}, matmul_ceiling=None, key="k")
    return RankJob(job=of_case, run="now", patience=60)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_train_one_model_and_leave_one_row(kind: Any, tiny: str) -> None:
    told: list[str] = []
    case = tiny_case(tiny, parallel=kind)
    row = run_ranks(job(case), cards=(), limits=TWO_MINUTES, on_phase=told.append)
    assert Row.from_json(row.to_json()) == row
    assert told == ["building", "compiling", "measuring"]
    assert (row.status, row.case, row.key, row.environment["commit"]) == ("ok", case, "k", "abc")
    assert len(row.samples_ms) == 6
    scaling = row.scaling
    assert scaling is not None
    assert (scaling.run, scaling.backend, len(scaling.ranks), len(scaling.silent_ms)) == ("now", "gloo", 2, 6)
    assert 0 <= scaling.gradient_error <= 1e-5  # type: ignore[operator]
    assert row.fps == pytest.approx(1000 * 4 / row.median_ms)  # type: ignore[operator]
    whole = 4 * (4 * 8 + 8 + 2 * (8 * 8 + 8))
    assert row.parameters == whole // 4
    assert row.memory is not None
    assert row.memory.parameters == (whole if kind == "ddp" else whole // 2)
    assert row.memory.optimizer >= 2 * row.memory.parameters  # type: ignore[operator]
    assert {"small-parity", "not-rechecked"} <= set(row.marks)


@pytest.mark.parametrize(
    ("mood", "status", "message"),
    [
        ("full", "oom", "rank 1 of 2: CUDA out of memory: a card of this test"),
        ("dead", "error", "rank 1 of 2: the process was ended by SIGKILL"),
        ("moody", "error", "its gradient is off the mean of the ranks' own by"),
    ],
)
def test_a_rank_that_fails_ends_all_and_says_why(mood: str, status: str, message: str, tiny: str) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerError) as raised:
        run_ranks(job(tiny_case(tiny, mood)), cards=(), limits=TWO_MINUTES)
    assert (raised.value.status, message in str(raised.value)) == (status, True), str(raised.value)
    assert time.monotonic() - started < 60


def test_a_rank_that_hangs_is_killed_with_the_others(tiny: str) -> None:
    started = time.monotonic()
    with pytest.raises(
        WorkerError, match="no result from rank 0, 1 after 12 s of building and tuning kernels"
    ) as raised:
        run_ranks(job(tiny_case(tiny, "stuck")), cards=(), limits=Limits(prepare=12, measure=60))
    assert raised.value.status == "timeout"
    assert time.monotonic() - started < 60


def test_the_first_word_of_a_failure_may_be_a_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several failures the row names the one that the others follow from."""
    (tmp_path / "talking_ranks.py").write_text(
        "import os, time\nfrom bench.store.rows import Row\n\n"
        "def begin(connection, job):\n"
        "    rank = int(os.environ['RANK'])\n"
        "    time.sleep(0.3 * rank)\n"
        "    words = ['Connection closed by peer', 'ValueError: the mistake', 'DistStoreError: gone'][rank]\n"
        "    row = Row(case=job.case, status='error', started_at='', message=words)\n"
        "    connection.send(('answer', row.to_json()))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    case = Case(model="DiT-S/8", resolution=64, processes=3, parallel="ddp", device="cpu")
    with pytest.raises(WorkerError, match="rank 1 of 3: ValueError: the mistake"):
        run_ranks(job(case), cards=(), limits=TWO_MINUTES, entry="talking_ranks:begin")


def test_a_failure_is_told_before_the_group_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """To leave a group may take for ever where the others wait in it."""
    from bench.measure import ranks

    happened: list[str] = []

    @contextlib.contextmanager
    def joined(device: str, *, hang_seconds: float) -> Iterator[None]:
        yield
        happened.append("left")
        raise RuntimeError("the group is gone")

    def measure(*given: Any) -> Row:
        raise ValueError("the mistake")

    monkeypatch.setattr(ranks, "joined", joined)
    monkeypatch.setattr(ranks, "_measure", measure)
    case = Case(model="DiT-S/8", resolution=64, processes=2, parallel="ddp", device="cpu")
    ranks.measure_rank(job(case), lambda phase: None, lambda row: happened.append(row.message))
    assert happened == ["ValueError: the mistake", "left"]


STUCK = """
import sys

from bench.cases.jobs import Limits
from bench.run.ranks import run_ranks
from dig.registry import load_source
from tests.bench.test_ranks import job, tiny_case

if __name__ == "__main__":
    load_source(sys.argv[1])
    case = tiny_case(sys.argv[1], "stuck")
    run_ranks(job(case), cards=(), limits=Limits(), on_phase=lambda phase: print(phase, flush=True))
"""


@pytest.mark.slow
def test_ranks_end_with_a_harness_that_is_killed(tiny: str, tmp_path: Path) -> None:
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, str(script), tiny]
    harness = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert harness.stdout is not None
    while (said := harness.stdout.readline().strip()) != "compiling":
        assert said, "it ended before its ranks were at work"
    descendants = children(harness.pid)
    harness.kill()
    harness.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(alive(pid) for pid in descendants):
        time.sleep(0.1)
    assert len(descendants) >= 3
    assert [pid for pid in descendants if alive(pid)] == []


def test_each_rank_sees_all_cards_in_one_order_and_multicast_stays_off() -> None:
    cards = [Card(index=i, uuid=f"GPU-{i}") for i in range(4)]
    found = [rank_variables(rank, 3, port=1234, cards=cards) for rank in range(3)]
    assert {each["CUDA_VISIBLE_DEVICES"] for each in found} == {"GPU-0,GPU-1,GPU-2"}
    assert [(each["RANK"], each["WORLD_SIZE"], each["LOCAL_RANK"]) for each in found] == [
        (str(r), "3", str(r)) for r in range(3)
    ]
    assert {each["NCCL_NVLS_ENABLE"] for each in found} == {"0"}
    assert {each["TORCH_SYMM_MEM_DISABLE_MULTICAST"] for each in found} == {"1"}
    # Whoever launched the harness has launched another job.
    assert {each["TORCHELASTIC_USE_AGENT_STORE"] for each in found} == {"False"}
    assert "CUDA_VISIBLE_DEVICES" not in rank_variables(0, 2, port=1, cards=())


def test_a_rank_starts_cuda_on_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the meter, which touches it first: a context on the first card would be foreign to whoever has that."""
    order: list[Any] = []
    stop = RuntimeError("far enough")

    def meter(device: str, gpu: Any) -> None:
        order.append("meter")
        raise stop

    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks.Gpu, "open", classmethod(lambda cls, device=None, place=0: order.append(place)))
    monkeypatch.setattr(ranks, "stay_near", lambda gpu: None)
    monkeypatch.setattr(ranks, "versions", lambda device: {})
    monkeypatch.setattr(ranks, "MemoryMeter", meter)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: order.append(("current", device)))
    case = Case(model="DiT-S/8", resolution=64, processes=2, parallel="ddp")
    job = CaseJob(case=case, budget=QUICK, environment={}, matmul_ceiling=None)
    rows: list[Row] = []
    ranks.measure_rank(RankJob(job=job, run="r", patience=9.0), lambda phase: None, rows.append)
    assert order == [1, ("current", 1), "meter"]
    assert "far enough" in rows[0].message


def test_windows_are_in_the_ledger() -> None:
    memory = Memory(parameters=1, resident=10, activations=5, allocator_peak=15, process_peak=40)
    counted = ranks._and_windows(memory, 7)
    assert (counted.resident, counted.activations, counted.allocator_peak) == (17, 5, 22)
    # The process' own peak has them, and what was not read stays so.
    assert (counted.process_peak, counted.reserved_peak) == (40, None)


def rank_row(samples: tuple[float, ...], peak: int, silent: tuple[float, ...] = (), **changes: Any) -> Row:
    case = Case(model="DiG-XL/2", resolution=256, batch=32, processes=2, parallel="ddp", execution="graph")
    scaling = Scaling(
        run="r", backend="nccl", ranks=(Rank(median_ms=samples[0]),), silent_ms=silent, gradient_error=peak / 1e3
    )
    memory = Memory(parameters=1, allocator_peak=peak)
    return Row(case=case, status="ok", started_at="", samples_ms=samples, memory=memory, scaling=scaling, **changes)


def test_ranks_become_one_row_of_the_slowest_and_the_largest() -> None:
    row = merge_ranks(
        [
            rank_row((10.0, 12.0, 11.0), 5, (8.0, 9.0), marks=("throttled",)),
            rank_row((11.0, 11.0, 11.0), 7, (9.0, 8.0), marks=("unsteady", "throttled")),
        ]
    )
    assert row.samples_ms == (11.0, 12.0, 11.0)
    assert row.marks == ("throttled", "unsteady")
    assert row.memory is not None
    assert row.memory.allocator_peak == 7
    assert row.scaling == Scaling(
        run="r",
        backend="nccl",
        ranks=(Rank(median_ms=10.0), Rank(median_ms=11.0)),
        silent_ms=(9.0, 9.0),
        gradient_error=0.007,
    )
    assert row.fps == pytest.approx(64_000 / 11)
    with pytest.raises(WorkerError, match="different numbers of steps"):
        merge_ranks([rank_row((1.0,), 1), rank_row((1.0, 2.0), 1)])


def test_a_follower_runs_the_steps_that_are_announced() -> None:
    said: list[Any] = []
    ran = [0, 0]

    def step(which: int) -> None:
        ran[which] += 1
        torch.zeros(1000).sum()

    budget = Budget(settle_s=0.0, settle_max_s=0.01, least_s=0.0, min_samples=20, target_s=0.0, max_samples=23)
    led = sample(lambda: step(0), device="cpu", budget=budget, fewest=5, announce=said.append)
    assert said[-1] is None
    assert said[0] == (1, False)
    assert min(steps for steps, timed in said[1:-1] if not timed) >= 5
    heard = iter(said)
    followed = follow(lambda: step(1), device="cpu", hear=lambda: next(heard))
    assert ran[0] == ran[1] == sum(steps for steps, _ in said[:-1])
    assert len(followed.samples_ms) == len(led.samples_ms)
    assert followed.warmup_steps == led.warmup_steps
