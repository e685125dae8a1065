"""On two GPUs: cases side by side, each on its own card; ranks over NCCL, captured, launched and sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cases.case import Case
from bench.cases.jobs import BUDGETS, CaseJob, Limits, RankJob
from bench.measure.ranks import SENDING
from bench.run.gpus import choose_cards, visible_cards
from bench.run.lanes import Plan, run_on_cards
from bench.run.ranks import run_ranks
from bench.run.runner import Sweep
from bench.store.rows import ResultsWriter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
OPTIONS = (("backend", "triton"), ("variant", "release"))


def test_two_cases_side_by_side_are_on_two_cards(tmp_path: Path) -> None:
    cards = choose_cards("0,1", visible_cards())
    cases = tuple(
        Case(model="DiG-S/2", options=OPTIONS, resolution=side, mode="forward", execution="graph")
        for side in (256, 512)
    )
    with ResultsWriter(tmp_path / "r.jsonl") as writer:
        plan = Plan(sweep=Sweep(cases=cases, again_s=0.0), cards=cards)
        rows = list(run_on_cards(plan, writer, on_start=lambda case, doing: None))
    assert [row.status for row in rows] == ["ok", "ok"], [row.message for row in rows]
    assert {row.environment["gpu_uuid"] for row in rows} == {card.uuid for card in cards}
    # Each worker watched its own card: the other one's process was none of its neighbours.
    assert not any("shared-gpu" in row.marks for row in rows)
    assert all(row.clocks is not None and row.clocks.others in (None, 0) for row in rows)


@pytest.mark.parametrize(
    ("sending", "parallel", "execution", "scope", "family"),
    [
        ("collectives", "ddp", "graph", "", "DiG"),
        ("collectives", "ddp", "eager", "", "DiG"),
        ("collectives", "fsdp", "graph", "", "DiG"),
        ("collectives", "fsdp", "eager", "", "DiG"),
        ("collectives", "ddp", "compiled-graph", "block", "Flash-DiT"),
        ("collectives", "fsdp", "compiled-graph", "block", "Flash-DiT"),
        ("collectives", "fsdp", "compile", "block", "Flash-DiT"),
        ("copies", "ddp", "graph", "", "DiG"),
        ("copies", "ddp", "eager", "", "DiG"),
        ("copies", "fsdp", "graph", "", "DiG"),
        ("copies", "fsdp", "eager", "", "DiG"),
        ("copies", "ddp", "compiled-graph", "block", "Flash-DiT"),
        ("copies", "fsdp", "compile", "block", "Flash-DiT"),
    ],
)
def test_two_ranks_send_in_the_timed_step_and_not_in_the_silent_one(
    sending: Any, parallel: Any, execution: Any, scope: Any, family: str
) -> None:
    cards = choose_cards("0,1", visible_cards())
    case = Case(
        model=f"{family}-S/2",
        options=OPTIONS if family == "DiG" else (("backend", "sdpa-cudnn"),),
        resolution=256,
        batch=4,
        execution=execution,
        scope=scope,
        processes=2,
        parallel=parallel,
        sending=sending,
    )
    job = CaseJob(case=case, budget=BUDGETS["cuda"], environment={}, matmul_ceiling=None)
    row = run_ranks(RankJob(job=job, run="now", patience=600), cards=cards, limits=Limits(prepare=300, measure=120))
    assert row.scaling is not None
    assert row.scaling.backend == "nccl"
    assert {rank.gpu_uuid for rank in row.scaling.ranks} == {card.uuid for card in cards}
    assert row.checks is not None
    assert any(SENDING[sending] in name.lower() for name in row.checks.kernels)
    assert row.scaling.silent_ms
    assert row.memory is not None
    weights = 4 * (row.parameters or 0)
    assert row.memory.parameters == pytest.approx(weights if parallel == "ddp" else weights / 2, rel=0.05)
