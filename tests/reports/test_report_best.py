"""Every family at its best: which way stands for a family, and what the tables say of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dig.family import Look
from reports.__main__ import app
from reports.best import OURS, PUBLISHED, Role, Task, Ways, contests, memory, time
from reports.best_figure import best
from reports.figures import speed_memory
from reports.series import Setting, Sweep, merge_launches
from reports.tables import tables
from tests.reports.best_rows import BLOCK, MODEL, dig, failed, flash, three_points
from tests.reports.conftest import build_row

ROOT = Path(__file__).parents[2]
TIMES = "\N{MULTIPLICATION SIGN}"
FLASH = Role(family="Flash-DiT")


def section(rows, heading):
    """The lines of one table of "At its best", its heading left out."""
    text = tables(Sweep(rows=tuple(rows)))
    return text.partition(f"#### At its best: {heading}\n\n")[2].partition("\n\n#")[0].splitlines()


# Which way stands for a family.


def test_the_fastest_way_that_has_times_stands_for_a_family():
    rows = [
        dig(),
        dig(ms=9.0, **BLOCK),
        flash("sdpa-cudnn", ms=13.0),
        flash("flash-attn-4", ms=12.0),
        failed(flash("flash-attn-4-padded", ms=1.0), "error", "parity: dQ is off"),
        flash("flash-attn", ms=14.0, execution="graph"),
    ]
    (contest,) = contests(rows)
    assert contest.best(time, OURS) is rows[1]
    assert contest.best(time, FLASH) is rows[3]
    lead = contest.lead(time)
    assert (lead.ours, lead.peer, lead.value) == (rows[1], rows[3], pytest.approx(12 / 9))


def test_a_mark_is_shown_and_excludes_nothing():
    throttled = flash("sdpa-cudnn", ms=11.0, marks=("throttled",))
    rows = [dig(), throttled, flash("flash-attn-4", ms=12.0)]
    assert contests(rows)[0].lead(time).peer is throttled
    assert "11.0<sup>t</sup> · cuDNN, compiled by block, graph" in section(rows, "training step, time")[2]


def test_plain_attention_is_the_peer_where_it_is_the_fastest():
    rows = [dig(ms=10.0), flash("sdpa-cudnn", ms=12.0), build_row("DiT-S/2", 1024, 11.0, **BLOCK)]
    assert contests(rows)[0].lead(time).peer is rows[2]
    assert f"| 1.10{TIMES} DiT |" in section(rows, "training step, time")[2]


def test_memory_goes_by_the_leanest_way():
    lean, fast = flash("sdpa-cudnn", ms=13.0, gib=1.0), flash("flash-attn-4", ms=12.0, gib=3.0)
    (contest,) = contests([dig(gib=2.0), fast, lean])
    assert contest.best(memory, FLASH) is lean
    assert contest.lead(memory).value == pytest.approx(0.5)


def test_only_what_does_the_same_work_is_compared():
    rows = [dig(), flash("sdpa-cudnn", ms=12.0)]
    others = {
        "batch": {"batch": 8},
        "mode": {"mode": "forward"},
        "precision": {"mode": "forward", "weights": "bf16"},
        "dtype": {"dtype": "fp32"},
        "machine": {"environment": {"gpu_name": "NVIDIA H200"}},
        "size": {"size": "XL"},
    }
    rows += [flash("sdpa-cudnn", ms=1.0, **changes) for changes in others.values()]
    rows.append(flash("sdpa-cudnn", 2048, ms=1.0))
    assert len({Task.of(row) for row in rows}) == len(others) + 2
    assert [lead.value for contest in contests(rows) if (lead := contest.lead(time))] == [pytest.approx(1.2)]


def test_tasks_of_which_nothing_compiles_are_nobody_s_best():
    graph = [dig(), flash("sdpa-cudnn", execution="graph"), flash("sdpa-cudnn", execution="eager")]
    assert contests(graph) == []
    assert "At its best" not in tables(Sweep(rows=tuple(graph)))
    assert best(Sweep(rows=tuple(graph))) is None
    more = [*graph, dig(2048), flash("sdpa-cudnn", 2048)]
    assert [contest.task.resolution for contest in contests(more)] == [2048]


def test_dig_s_two_sets_of_kernels_are_two_roles_and_the_reference_is_none():
    assert Role.of(dig().case) == OURS
    assert Role.of(dig(backend="fla").case) == PUBLISHED
    assert Role.of(dig(backend="reference").case) is None
    assert Role.of(build_row("Mine-S/2").case) == Role(family="Mine")


@pytest.mark.parametrize(
    ("row", "way"),
    [
        (flash("flash-attn-4"), "FA4, compiled by block, graph"),
        (flash("flash-attn-4-padded", **MODEL), "FA4 padded, compiled by model, graph"),
        (flash("sdpa-cudnn", execution="graph"), "cuDNN, graph"),
        (flash("flash-attn", execution="eager"), "FA2, eager"),
        (flash("own", execution="compile", max_autotune=True), "own, compiled by block, max-autotune"),
        (dig(), "graph"),
    ],
)
def test_ways_have_short_names(row, way):
    rows = [row, flash("sdpa-cudnn")]
    sweep = Sweep(rows=tuple(rows))
    assert Ways(sweep, contests(rows)).way(row) == way


def test_options_that_differ_within_a_role_are_named():
    other = build_row("DiG-S/2", 2048, options=(("backend", "triton"), ("variant", "paper")), **BLOCK)
    rows = [dig(**BLOCK), other]
    ways = Ways(Sweep(rows=tuple(rows)), contests(rows))
    assert [ways.way(row) for row in rows] == [f"variant={v}, compiled by block, graph" for v in ("release", "paper")]


# The tables.


@pytest.fixture
def measured():
    return three_points()


def test_tables_at_its_best_in_full(measured):
    text = tables(Sweep(rows=tuple(measured)))
    body = text.partition("#### At its best")[2].partition("\n\n### S/2")[0]
    ways, none = "compiled by block, graph", "\N{EN DASH}"
    at = {side: f"| S/2 | {side} | 1 | bf16 |" for side in (256, 1024, 2048)}
    head = "| model | resolution | batch | precision | DiG (triton) | Flash-DiT | lead | DiG (fla) | DiT | DiS |"
    rule = "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert body == (
        f""": training step, time

{head} attention ways |
{rule}
{at[256]} 2.00 · graph | 1.80 · FA4, {ways} | **0.900{TIMES}** | 3.00 · {ways} | {none} | {none} | 2 of 2 |
{at[1024]} 10.0 · graph | 15.0 · cuDNN, {ways} | 1.50{TIMES} | {none} | OOM | 30.0 · {ways} | 1 of 3 |
{at[2048]} 40.0 · graph | timeout, parity | {none} | {none} | {none} | {none} | 0 of 2 |

Without a time:

- Flash-DiT: FA4, {ways}: parity: dQ is off &#124; at head width 72 (S/2 training step at 1024, batch 1, bf16; S/2 \
training step at 2048, batch 1, bf16)
- DiT: {ways}: OOM (S/2 training step at 1024, batch 1, bf16)
- Flash-DiT: cuDNN, {ways}: timeout (S/2 training step at 2048, batch 1, bf16)

#### At its best: training step, memory

{head} attention ways |
{rule}
{at[256]} 0.500 · graph | 0.750 · cuDNN, {ways} | 1.50{TIMES} | 1.00 · {ways} | {none} | {none} | 2 of 2 |
{at[1024]} 1.00 · graph | 0.500 · cuDNN, {ways} | **0.500{TIMES}** | {none} | OOM | 1.50 · {ways} | 1 of 3 |
{at[2048]} 2.00 · graph | timeout, parity | {none} | {none} | {none} | {none} | 0 of 2 |"""
    )


def test_modes_precisions_and_batches_have_lines_of_their_own():
    weights = {"mode": "forward", "weights": "bf16"}
    rows = [dig(size="XL", **weights), flash("sdpa-cudnn", size="XL", **weights)]
    rows += [flash("sdpa-cudnn", size="XL", mode="forward", batch=batch) for batch in (8, 1)]
    found = [line.split(" | ")[1:4] for line in section(rows, "forward pass, time")[2:]]
    assert found == [["1024", "1", "bf16"], ["1024", "8", "bf16"], ["1024", "1", "bf16 weights"]]
    assert "training step" not in tables(Sweep(rows=tuple(rows))).partition("#### ")[2].partition("\n\n### ")[0]


def test_several_launches_show_their_range_and_the_lead_s():
    ours = merge_launches([dig(ms=ms, launch=i) for i, ms in enumerate((10.0, 12.0, 11.0))])
    peer = merge_launches([flash("sdpa-cudnn", ms=ms, launch=i) for i, ms in enumerate((22.0, 24.0, 18.0))])
    line = section([ours, peer], "training step, time")[2]
    assert "| 11.0 [10.0, 12.0] · graph | 22.0 [18.0, 24.0] · cuDNN, compiled by block, graph |" in line
    assert f"| 2.00{TIMES} [1.50, 2.40] |" in line


def test_an_assumed_model_is_marked():
    rows = [dig(size="XL"), flash("sdpa-cudnn", size="XL"), build_row("DiS-XL/2", 1024, 40.0, **BLOCK)]
    assert r"40.0 · compiled by block, graph\* |" in section(rows, "training step, time")[2]


def test_a_family_that_takes_another_s_name_has_a_column_of_its_own(measured):
    mine = build_row("Mine-S/2", 256, 7.0, look=Look(label="lead"), **BLOCK)
    head, _, first = section([*measured, mine], "training step, time")[:3]
    assert head.endswith("| DiS | lead' | attention ways |")
    assert "| 7.00 · compiled by block, graph |" in first


# The other tables and figures tell ways apart.


def test_settings_tell_precision_scope_and_tuning_apart():
    shared = {"mode": "forward"}
    rows = [
        dig(**shared),
        dig(weights="bf16", **shared),
        dig(**shared, **BLOCK),
        dig(**shared, **MODEL),
        dig(**shared, max_autotune=True, **BLOCK),
        dig(execution="compile", **shared),
    ]
    told = [Setting.of(row).describe() for row in rows]
    assert told == [
        "forward pass, CUDA graph, bf16, batch 1",
        "forward pass, CUDA graph, bf16 weights, batch 1",
        "forward pass, torch.compile by block, CUDA graph, bf16, batch 1",
        "forward pass, torch.compile by model, CUDA graph, bf16, batch 1",
        "forward pass, torch.compile by block, max-autotune, CUDA graph, bf16, batch 1",
        "forward pass, torch.compile by block, bf16, batch 1",
    ]
    text = tables(Sweep(rows=tuple(rows)))
    assert all(text.count(f"\n### S/2: {setting}\n") == 1 for setting in told)


def test_a_figure_of_one_setting_draws_one_precision_and_one_scope():
    rows = [dig(256, mode="forward", **BLOCK), dig(512, mode="forward", **BLOCK), dig(512, mode="forward", **MODEL)]
    rows.append(dig(512, mode="forward", weights="bf16", **BLOCK))
    drawing = speed_memory(Sweep(rows=tuple(rows)))
    assert "(2 rows)" in drawing.notes[0]
    assert any("torch.compile by model, CUDA graph, bf16, batch 1 (1 row)" in note for note in drawing.notes)
    assert any("torch.compile by block, CUDA graph, bf16 weights, batch 1 (1 row)" in note for note in drawing.notes)
    assert "bf16 · batch 1 · forward pass · torch.compile by block" in drawing.figure.texts[1].get_text()


def test_the_published_rows_give_the_published_tables_and_figures(tmp_path):
    h100, h200 = (ROOT / "results" / name for name in ("h100", "h200"))
    for rows, drawn in (
        (h100 / "rows.jsonl", h100),
        (h100 / "best.jsonl", h100 / "best"),
        (h200 / "best.jsonl", h200 / "best"),
    ):
        result = CliRunner().invoke(app, [str(rows), "--out", str(tmp_path)])
        assert result.exit_code == 0, result.output
        assert (tmp_path / "tables.md").read_bytes() == (drawn / "tables.md").read_bytes()
