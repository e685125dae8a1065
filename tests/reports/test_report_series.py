from __future__ import annotations

from typing import get_args

import pytest

from bench.store.rows import Mark, ResultError
from reports.series import (
    DOUBTS,
    Launches,
    Series,
    Setting,
    launches_of,
    read_sweep,
    select,
    series_labels,
    span,
)

BOTH = ("train", "forward")


def series(family, **options):
    return Series(family=family, options=tuple(sorted(options.items())))


def test_labels_are_in_the_order_to_show_them():
    given = [series("DiS", scan="mamba-ssm"), series("DiT"), series("Mamba"), series("DiG", backend="fla"),
             series("Flash-DiT", backend="sdpa-cudnn"), series("DiG")]  # fmt: skip
    assert list(series_labels(given).values()) == [
        "DiG",
        "DiG (fla)",
        "Flash-DiT (sdpa-cudnn)",
        "DiT",
        "DiS (mamba-ssm)",
        "Mamba",
    ]


def test_values_that_would_not_tell_are_named():
    by_recurrence, by_srem = series("DiG", backend="triton"), series("DiG", srem="triton")
    heads, twice = series("DiG", heads="18"), series("DiG", backend="fla", srem="fla")
    labels = series_labels([by_recurrence, by_srem, heads, twice])
    assert labels[by_recurrence] == "DiG (backend=triton)"
    assert labels[by_srem] == "DiG (srem=triton)"
    assert labels[heads] == "DiG (heads=18)"
    assert labels[twice] == "DiG (backend=fla, srem=fla)"
    assert len(set(labels.values())) == 4


def test_graph_is_preferred_even_where_eager_has_more_rows(make_row):
    graph = [make_row(resolution=256)]
    eager = [make_row(resolution=r, execution="eager") for r in (256, 512)]
    chosen = select(eager + graph, modes=BOTH)
    assert chosen.rows == tuple(graph)
    assert chosen.left_out == {Setting.of(eager[0]): 2}


def test_an_execution_that_only_failed_is_not_preferred(make_row):
    rows = [make_row(status="error"), make_row(execution="eager")]
    assert select(rows, modes=BOTH).setting.execution == "eager"


def test_the_machine_with_most_rows_is_chosen_and_the_other_reported_in_any_mode(make_row):
    cpu = [make_row(resolution=r, device="cpu", execution="eager") for r in (32, 64)]
    gpu = [make_row(mode="forward")]
    chosen = select(gpu + cpu, modes=BOTH)
    assert chosen.setting.device == "cpu"
    assert chosen.left_out == {Setting.of(gpu[0]): 1}


def test_the_other_mode_of_the_same_machine_is_not_reported(make_row):
    assert select([make_row(), make_row(mode="forward")], modes=BOTH).left_out == {}


@pytest.mark.parametrize(("field", "values"), [("dtype", ("bf16", "fp32")), ("batch", (1, 32))])
def test_dtypes_and_batches_are_not_mixed(make_row, field, values):
    few = [make_row(resolution=256, **{field: values[0]})]
    many = [make_row(resolution=r, **{field: values[1]}) for r in (256, 512)]
    assert select(few + many, modes=BOTH).rows == tuple(many)


def test_two_gpus_of_different_names_are_two_settings(make_row):
    h100 = [make_row(resolution=r) for r in (256, 512)]
    h200 = [make_row(resolution=256, environment={"gpu_name": "NVIDIA H200"})]
    assert select(h200 + h100, modes=BOTH).rows == tuple(h100)


def test_equal_counts_choose_the_same_whatever_the_order(make_row):
    rows = [make_row(batch=1), make_row(batch=8), make_row(device="cpu")]
    assert select(rows, modes=BOTH).setting == select(rows[::-1], modes=BOTH).setting
    assert select(rows, modes=BOTH).setting.device == "cuda"


def test_nothing_timed_selects_nothing(make_row):
    assert select([], modes=BOTH) is None
    assert select([make_row(status="oom")], modes=BOTH) is None


def test_the_last_row_of_a_case_counts_but_two_machines_stay_apart(make_row, write_rows):
    first = write_rows([make_row(ms=10.0), make_row(ms=11.0)], "a.jsonl")
    second = write_rows([make_row(ms=5.0, environment={"gpu_name": "NVIDIA H200"})], "b.jsonl")
    assert [row.median_ms for row in read_sweep([first, second]).rows] == [11.0, 5.0]


def launches(make_row, times, **changes):
    return [make_row(ms=ms, launch=i, **changes) for i, ms in enumerate(times)]


def test_launches_become_one_row_with_their_median_and_range(make_row, write_rows):
    rows = [*launches(make_row, (10.0, 12.0, 11.0)), make_row(ms=10.5, launch=0), make_row("DiT-S/2", ms=40.0)]
    dig, dit = read_sweep([write_rows(rows)]).rows
    assert isinstance(dig, Launches)
    assert (dig.median_ms, dig.spread_ms, dig.failed, launches_of(dig)) == (11.0, (10.5, 12.0), 0, 3)
    assert dig.fps == pytest.approx(1000 / 11)
    assert len(dig.samples_ms) == 9
    assert not isinstance(dit, Launches)
    assert launches_of(dit) == 1


def test_launches_of_two_files_add_up_and_the_largest_peak_is_shown(make_row, write_rows):
    first = write_rows(launches(make_row, (10.0, 12.0), marks=("throttled",)), "a.jsonl")
    second = write_rows([make_row(ms=11.0, launch=2, gib=3.0)], "b.jsonl")
    (row,) = read_sweep([first, second]).rows
    assert (row.median_ms, row.memory.peak, row.marks) == (11.0, 3 * 2**30, ("throttled",))


def test_launches_of_other_code_are_not_mixed_in(make_row, write_rows):
    old = launches(make_row, (10.0, 10.1, 10.2), key="old")
    (row,) = read_sweep([write_rows([*old, make_row(ms=5.0, launch=0, key="new")])]).rows
    assert (row.median_ms, row.key) == (5.0, "new")
    (row,) = read_sweep([write_rows([make_row(ms=5.0, launch=4, key="new"), *old])]).rows
    assert (row.median_ms, launches_of(row)) == (10.1, 3)


def test_failed_launches_are_counted_and_all_failed_is_a_failure(make_row, write_rows):
    failed = [make_row(status="timeout", launch=i) for i in (2, 3)]
    (row,) = read_sweep([write_rows([*launches(make_row, (10.0, 12.0)), *failed])]).rows
    assert (row.status, row.median_ms, row.failed) == ("ok", 11.0, 2)
    (row,) = read_sweep([write_rows(failed)]).rows
    assert (row.status, row.median_ms) == ("timeout", None)


def test_a_torn_last_line_is_a_warning(make_row, write_rows):
    path = write_rows([make_row()])
    path.write_bytes(path.read_bytes() + b'{"schema":1,"ca')
    sweep = read_sweep([path])
    assert len(sweep.rows) == 1
    assert "15 bytes" in sweep.warnings[0]


def test_a_model_without_a_patch_is_refused(make_row, write_rows):
    with pytest.raises(ResultError, match="'DiG-S' is no model name"):
        read_sweep([write_rows([make_row("DiG-S")])])


def test_rows_of_several_gpus_are_another_reports(make_row, write_rows):
    rows = [make_row(), make_row(processes=2, parallel="ddp")]
    path = write_rows(rows)
    sweep = read_sweep([path])
    assert sweep.rows == (rows[0],)
    with pytest.raises(ResultError, match=r"1 rows of several GPUs left out; python -m reports\.scaling"):
        read_sweep([write_rows(rows[1:], "b.jsonl")])
    assert sweep.warnings == (f"{path}: 1 rows of several GPUs left out; python -m reports.scaling shows them",)


def test_span():
    assert span([20, 20]) == "20"
    assert span([100, 9]) == "9 to 100"


def test_every_mark_that_is_a_reason_to_doubt_has_a_letter_of_its_own():
    assert set(get_args(Mark)) - set(DOUBTS) == {"measured-again", "built-beside"}
    letters = [letter for letter, _ in DOUBTS.values()]
    assert len(set(letters)) == len(letters)
