from __future__ import annotations

import pytest

from bench.results import ResultError
from reports.series import Series, Setting, read_sweep, select, series_labels, span

BOTH = ("train", "forward")


def series(family, **options):
    return Series(family=family, options=tuple(sorted(options.items())))


def test_labels_are_in_the_order_to_show_them():
    given = [series("DiS", scan="mamba-ssm"), series("DiT"), series("Mamba"), series("DiG", recurrence="fla"),
             series("Flash-DiT", attention="sdpa-cudnn"), series("DiG")]  # fmt: skip
    assert list(series_labels(given).values()) == [
        "DiG",
        "DiG (fla)",
        "Flash-DiT (sdpa-cudnn)",
        "DiT",
        "DiS (mamba-ssm)",
        "Mamba",
    ]


def test_values_that_would_not_tell_are_named():
    by_recurrence, by_srem = series("DiG", recurrence="triton"), series("DiG", srem="triton")
    heads, twice = series("DiG", heads="18"), series("DiG", recurrence="fla", srem="fla")
    labels = series_labels([by_recurrence, by_srem, heads, twice])
    assert labels[by_recurrence] == "DiG (recurrence=triton)"
    assert labels[by_srem] == "DiG (srem=triton)"
    assert labels[heads] == "DiG (heads=18)"
    assert labels[twice] == "DiG (recurrence=fla, srem=fla)"
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


def test_a_torn_last_line_is_a_warning(make_row, write_rows):
    path = write_rows([make_row()])
    path.write_bytes(path.read_bytes() + b'{"schema":1,"ca')
    sweep = read_sweep([path])
    assert len(sweep.rows) == 1
    assert "15 bytes" in sweep.warnings[0]


def test_a_model_without_a_patch_is_refused(make_row, write_rows):
    with pytest.raises(ResultError, match="'DiG-S' is no model name"):
        read_sweep([write_rows([make_row("DiG-S")])])


def test_span():
    assert span([20, 20]) == "20"
    assert span([100, 9]) == "9 to 100"
