"""Sampling throughput: rows and intervals by hand, then the command with real processes and the smallest models."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bench.cli import sampling as commands
from bench.cli.main import app
from bench.cli.sampling import default_batch
from bench.measure.intervals import MedianInterval
from bench.sampling import run as turns
from bench.sampling.measure import Contestant
from bench.sampling.rows import RowsWriter, SamplingCase, SamplingRow, compare, read_rows
from bench.sampling.run import measure
from bench.store.lines import ResultError
from dig.diffusion import sample
from dig.environment import ROOT
from dig.sampling import runner as runs

CASE = SamplingCase(
    model="Flash-DiT-S/8",
    options=(("backend", "sdpa-flash"),),
    resolution=64,
    steps=2,
    batch=2,
    dtype="fp32",
    device="cpu",
    execution="eager",
)
DIG = replace(CASE, model="DiG-S/8", options=(("backend", "reference"),))


def row(case: SamplingCase = CASE, *seconds: float, **fields: Any) -> SamplingRow:
    return SamplingRow(case=case, **{"status": "ok", "run": "1", "seconds": seconds or (1.0,), **fields})


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    assert MedianInterval.of([3.0]) == MedianInterval(median=3, low=3, high=3, confidence=0)
    five = MedianInterval.of([5, 1, 4, 2, 3])
    assert (five.median, five.low, five.high, five.confidence) == (3, 1, 5, 0.9375)
    assert MedianInterval.of(range(1, 7)).confidence == pytest.approx(0.96875)
    with pytest.raises(ValueError, match="needs values"):
        MedianInterval.of([])
    # Twenty values: the 6th and the 15th, of the binomial distribution's tables.
    twenty = MedianInterval.of(range(1, 21))
    assert (twenty.low, twenty.high) == (6, 15)
    draw = random.Random(0)
    held = 0
    for _ in range(4000):
        found = MedianInterval.of([draw.expovariate(1.0) for _ in range(20)])
        held += found.low <= math.log(2) <= found.high
    assert held / 4000 == pytest.approx(twenty.confidence, abs=0.01)


def test_rows_survive_the_file_and_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "rows" / "a.jsonl"
    first = row(CASE, 1.0, 2.0, environment={"gpu_name": "H100"}, peak_memory_gib=1.5)
    with RowsWriter(path) as writer:
        writer.write(first)
        with pytest.raises(ResultError, match="being written by another run"):
            RowsWriter(path)
    path.write_bytes(path.read_bytes() + b'{"kind":"samp')
    assert read_rows(path).torn == b'{"kind":"samp'
    failed = row(DIG, status="oom", seconds=(), message="full")
    missing = row(DIG, status="unsupported", seconds=(), message="needs fla")
    with RowsWriter(path) as writer:
        assert writer.said_of_torn_line == f"{path} ended inside a row; the torn line was moved to {path}.torn"
        writer.write(failed)
        writer.write(missing)
    found = read_rows(path)
    assert (found.rows, found.torn) == ((first, failed, missing), b"")
    record = json.loads(path.read_text().splitlines()[0])
    assert record["samples_per_second"]["median"] == 1.5
    for line, message in (("{}", "line 1"), ('{"kind":"step","schema":1}', "not a row of sampling")):
        path.write_text(line + "\n")
        with pytest.raises(ResultError, match=message):
            read_rows(path)
    with pytest.raises(ValueError, match="needs seconds"):
        row(status="ok", seconds=())
    with pytest.raises(ValueError, match="finite and positive"):
        row(CASE, 0.0)


def test_published_rows_of_schema_1_are_read_and_written_as_today(tmp_path: Path) -> None:
    published = ROOT / "results" / "h100" / "sampling.jsonl"
    assert json.loads(published.read_text().splitlines()[0])["schema"] == 1
    rows = read_rows(published).rows
    assert [r.case.label for r in rows[:2]] == ["DiG-XL/2 (triton, release)", "Flash-DiT-XL/2 (sdpa-cudnn)"]
    assert all(dict(r.case.options)["backend"] in ("triton", "sdpa-cudnn") for r in rows)
    with RowsWriter(tmp_path / "again.jsonl") as writer:
        for each in rows:
            writer.write(each)
    assert read_rows(tmp_path / "again.jsonl").rows == rows
    assert json.loads((tmp_path / "again.jsonl").read_text().splitlines()[0])["schema"] == 3


def test_ratios_are_of_the_same_turn() -> None:
    """A card that slows down by half between turns changes no ratio; ratios of medians over turns would show it."""
    ours, theirs = row(DIG, 1.0, 2.0, 4.0), row(CASE, 3.0, 6.0, 12.0)
    found = compare([ours, theirs])
    assert [entry.peer for entry in found] == [CASE.label, None]
    assert found[0].ratio == MedianInterval(median=3, low=3, high=3, confidence=0.75)
    # Another run's peer, or another setting's, is none.
    assert compare([ours, row(CASE, 1.0, run="2")])[0].ratio is None
    assert compare([ours, row(replace(CASE, batch=4), 1.0)])[0].peer is None
    failed = compare([ours, row(CASE, status="oom", seconds=())])
    assert (failed[0].peer, failed[0].ratio) == (CASE.label, None)
    # Measured again, the later row counts.
    assert [entry.row.run for entry in compare([ours, theirs, row(DIG, 1.0, run="2")])] == ["2", "1"]


def test_the_batch_falls_with_the_pixels() -> None:
    assert [default_batch(side) for side in (256, 512, 1024, 2048, 8192)] == [32, 16, 4, 1, 1]


def test_what_is_timed_is_the_guided_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents of the right steps, guidance and classes, by `dig.diffusion.sample`; new noise for every batch."""
    made: list[Any] = []
    batch = runs.BatchSampler.batch
    monkeypatch.setattr(runs.BatchSampler, "batch", lambda self, n: made.append(batch(self, n)) or made[-1])
    contestant = Contestant(replace(DIG, steps=3, cfg=2.0, cfg_channels="all"))
    assert contestant.sample() > 0
    assert contestant.sample() > 0
    model = contestant._sampler._loop.denoiser.model
    assert all(parameter.any() for parameter in model.parameters())
    for i, found in enumerate(made):
        y = torch.tensor([2 * i, 2 * i + 1])
        arguments: dict[str, Any] = {"sampler": "ddim", "steps": 3, "cfg_channels": "all", "first_index": 2 * i}
        assert torch.allclose(torch.from_numpy(found), sample(model, y, cfg_scale=2.0, **arguments), atol=1e-3)
        assert not torch.allclose(torch.from_numpy(found), sample(model, y, cfg_scale=1.0, **arguments), atol=1e-3)
    assert contestant.peak_memory_gib() is None


@pytest.mark.slow
def test_the_command_measures_in_turns(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    options = ["--models", "DiG,Flash-DiT", "--size", "S", "--patch", "8", "--resolutions", "64", "--device", "cpu"]
    options += ["--steps", "2", "--repeats", "3", "--batch", "2", "--out", str(out)]
    command = [sys.executable, "-m", "bench", "sampling", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = read_rows(out).rows
    assert not read_rows(out).torn
    assert [r.case for r in rows] == [DIG, CASE]
    assert all(len(r.seconds) == 3 and r.setup_seconds and r.environment["torch"] for r in rows)
    assert rows[0].run == rows[1].run
    assert "commit" in rows[0].environment
    assert "peer" in done.stdout


def test_every_other_turn_is_in_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    """What gets slower within a turn, the card as it warms up, then costs no model more than another."""
    order: list[str] = []

    class Told:
        def __init__(self, entry: str, case: SamplingCase) -> None:
            self.family, self.word = case.family, ""

        def tell(self, word: str) -> None:
            self.word = word
            if word == "sample":
                order.append(self.family)

        def answer(self, time_limit: float) -> tuple[str, Any]:
            return "ok", {"peak_memory_gib": None, "versions": {}} if self.word == "finish" else float(len(order) + 1)

        def end(self) -> None:
            pass

    monkeypatch.setattr(turns, "Worker", Told)
    third = replace(CASE, model="DiT-S/8")
    rows = list(measure([[DIG, CASE, third]], repeats=3, time_limit=1, environment={}))
    forth = ["DiG", "Flash-DiT", "DiT"]
    assert order == [*forth, *reversed(forth), *forth]
    # Each row has its own model's times, whatever the order was.
    assert [each.seconds for each in rows] == [(2.0, 7.0, 8.0), (3.0, 6.0, 9.0), (4.0, 5.0, 10.0)]


@pytest.mark.slow
def test_one_failure_costs_no_other_row(tmp_path: Path) -> None:
    """Out of memory, too slow, or dead: a row each, and the neighbour's figures are there."""
    many = replace(CASE, resolution=2**20)  # 17 thousand million tokens: the allocator refuses their positions at once
    with_many = list(measure([[many], [CASE]], repeats=1, time_limit=120, environment={}))
    assert [r.status for r in with_many] == ["oom", "ok"]
    steps: list[str] = []
    found = list(
        measure(
            [[replace(CASE, steps=1000, batch=64), CASE]],
            repeats=2,
            time_limit=12,
            environment={},
            on_step=steps.append,
        )
    )
    assert {r.status for r in found} == {"timeout", "ok"}
    assert len(next(r for r in found if r.status == "ok").seconds) == 2
    assert "the process was killed" in next(r for r in found if r.status == "timeout").message
    assert not any("batch 1 of 2" in step for step in steps if "1000" in step)


def test_samples_that_are_not_finite_are_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    contestant = Contestant(CASE)
    with torch.no_grad():
        next(contestant._sampler._loop.denoiser.model.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        contestant.sample()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--models DiGG", "did you mean DiG"),
        ("--models DiG:triton", "needs an NVIDIA GPU"),
        ("--models ,", "nothing to measure"),
        ("--size XXL", "unknown --size 'XXL' of DiG: did you mean XL?"),
        ("--resolutions 100", "not a multiple of 16"),
        ("--resolutions a", "whole numbers"),
        ("--sampler euler", "unknown --sampler"),
        ("--cfg-channels two", "unknown --cfg-channels"),
        ("--dtype fp16", "unknown --dtype"),
        ("--dtype=", "unknown --dtype ''"),
        ("--execution=", "unknown --execution ''"),
        ("--models=", "nothing to measure"),
        ("--models DiG@graphs", "unknown execution of --models DiG 'graphs'"),
        ("--models DiG@", "unknown execution of --models DiG ''"),
        ("--size=", "unknown --size '' of DiG"),
        ("--compile-scope x", "unknown --compile-scope 'x': Known: block, model"),
        ("--weights fp8", "unknown --weights 'fp8'"),
        ("--patch 3", "--patch must be one of 2, 4, 8; got 3"),
        ("--execution graph", "needs an NVIDIA GPU"),
        ("--repeats 0", "--repeats must be at least 1"),
        ("--batch 0", "--batch must be at least 1"),
        ("--time-limit 0", "--time-limit must be positive"),
    ],
)
def test_bad_input(options: str, message: str, tmp_path: Path) -> None:
    words = ["sampling", "--device", "cpu", "--out", str(tmp_path / "a.jsonl"), *options.split()]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "a.jsonl").exists()


def test_what_is_waited_for_is_said_in_lines_where_nobody_watches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(groups: Any, *, on_step: Any, **_: Any) -> Any:
        on_step("a model: batch 1 of 5")
        yield from (row(case) for group in groups for case in group)

    monkeypatch.setattr(commands, "measure", measured)
    words = ["--models", "DiG,Flash-DiT", "--device", "cpu", "--out", str(tmp_path / "a.jsonl")]
    result = CliRunner().invoke(app, ["sampling", *words])
    assert result.exit_code == 0, result.output
    assert re.search(r"\[0 of 2 done\] a model: batch 1 of 5 \(0:\d\d elapsed\)", result.stderr)
    assert len(read_rows(tmp_path / "a.jsonl").rows) == 2


def test_compiled_models_are_compared_with_others_and_weights_are_not() -> None:
    graph = replace(CASE, device="cuda", dtype="bf16", execution="graph")
    compiled = replace(graph, model="DiT-S/8", execution="compiled-graph", scope="block")
    assert compiled.setting == graph.setting
    assert compiled.label == "DiT-S/8 (sdpa-flash, compiled by block)"
    assert replace(graph, weights="bf16").setting != graph.setting
    assert "bf16 weights, graph" in replace(graph, weights="bf16").describe()
    for fields in ({"scope": "block"}, {"execution": "compile"}, {"dtype": "fp32", "weights": "bf16"}):
        with pytest.raises(ValueError, match=r"scope|weights"):
            replace(graph, **fields)


def test_each_model_may_have_an_execution_of_its_own() -> None:
    setting = {"device": "cuda", "execution": "graph", "scope": "model"}
    choice, how = commands._way("Flash-DiT:sdpa-cudnn@compiled-graph", setting)
    assert (choice.family.name, how) == ("Flash-DiT", {"execution": "compiled-graph", "scope": "model"})
    assert commands._way("DiG", setting)[1] == {"execution": "graph", "scope": ""}


def test_a_model_that_was_cast_samples_in_bf16() -> None:
    plain = Contestant(replace(CASE, dtype="bf16"))
    cast = Contestant(replace(CASE, dtype="bf16", weights="bf16"))
    assert {p.dtype for p in cast._sampler._loop.denoiser.model.parameters()} == {torch.bfloat16}
    a, b = (contestant._sampler.batch(0) for contestant in (plain, cast))
    assert 0 < np.abs(a - b).max() < 0.2 * np.abs(a).max()
