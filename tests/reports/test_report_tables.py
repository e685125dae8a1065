from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.series import Sweep, merge_launches
from reports.tables import environment, number, tables


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12.34, "12.3"),
        (1.8, "1.80"),
        (0.0456789, "0.0457"),
        (9.996, "10.0"),
        (999.6, "1000"),
        (320.7, "321"),
        (12345, "12300"),
        (0, "0"),
    ],
)
def test_three_significant_digits(value, text):
    assert number(value) == text


@given(st.floats(1e-6, 1e9))
def test_numbers_are_within_half_a_unit_of_the_third_digit(value):
    assert float(number(value)) == pytest.approx(value, rel=5.1e-3)
    assert "e" not in number(value)


def test_tiny_example_in_full(make_row):
    flash = {"options": (("backend", "flash-attn"),)}
    rows = (
        make_row("DiG-S/2", 2048, 12.0, gib=2.5, implementations={"recurrence": "triton"}),
        make_row("DiG-S/2", 512, 4.0, gib=0.5, implementations={"recurrence": "triton"}),
        make_row("Flash-DiT-S/2", 512, 6.0, gib=0.75, **flash),
        make_row("Flash-DiT-S/2", 2048, 60.0, gib=4.5, **flash),
        make_row("DiT-S/2", 512, 5.0, gib=1.0),
        make_row("DiT-S/2", 2048, status="oom"),
        make_row("DiG-S/2", 512, 2.0, mode="forward", gib=0.25, flops=7 * 10**10, matmul_ceiling=7e14),
        make_row("DiS-XL/2", 512, 50.0, mode="forward", gib=3.0),
    )
    text = tables(Sweep(rows=rows))
    _, _, body = text.partition("\n\n## ")
    assert body == (
        """NVIDIA H100 80GB HBM3

NVIDIA H100 80GB HBM3 · driver 580.82 · torch 2.11.0 · commit 0123456789ab · 2026-11-22

What ran:

- DiG: recurrence `triton`

### S/2: training step, CUDA graph, bf16, batch 1

Cells: ms · GiB.

| resolution | DiG | Flash-DiT (flash-attn) | DiT | speed of the fastest DiG |
| --- | ---: | ---: | ---: | ---: |
| 512 | 4.00 · 0.500 | 6.00 · 0.750 | 5.00 · 1.00 | 1.25X DiT |
| 2048 | 12.0 · 2.50 | 60.0 · 4.50 | OOM | 5.00X Flash-DiT (flash-attn) |

### S/2: forward pass, CUDA graph, bf16, batch 1

Cells: ms · GiB.

| resolution | DiG |
| --- | ---: |
| 512 | 2.00 · 0.250 |

### XL/2: forward pass, CUDA graph, bf16, batch 1

Cells: ms · GiB.

| resolution | DiS |
| --- | ---: |
| 512 | 50.0 · 3.00\\* |

### All sizes: forward pass, CUDA graph, bf16, batch 1

Cells: ms · FPS · share of the measured matmul ceiling (700 TFLOP/s).

| model | resolution | DiG | DiS |
| --- | --- | ---: | ---: |
| S/2 | 512 | 2.00 · 500 · 5.00% | - |
| XL/2 | 512 | - | 50.0 · 20.0 · -\\* |

\\* DiS-XL is assumed (1152 wide, 48 deep): the published DiS has no XL.
""".replace("X DiT", "\N{MULTIPLICATION SIGN} DiT")
        .replace("X Flash", "\N{MULTIPLICATION SIGN} Flash")
        .replace("| - |", "| \N{EN DASH} |")
        .replace("· -\\*", "· \N{EN DASH}\\*")
    )


def test_several_launches_show_their_range_and_how_many_failed(make_row):
    times = [make_row(ms=ms, launch=i) for i, ms in enumerate((10.0, 12.5, 11.0))]
    text = tables(Sweep(rows=(merge_launches(times),)))
    assert "| 1024 | 11.0 [10.0, 12.5] · 2.00 |" in text
    assert "fastest and the slowest launch" in text
    some = merge_launches([*times, make_row(status="timeout", launch=3)])
    assert "11.0 [10.0, 12.5; 3 of 4] · 2.00" in tables(Sweep(rows=(some,)))
    assert "slowest launch" not in tables(Sweep(rows=(times[0],)))


def test_doubtful_times_carry_letters_and_what_all_share_is_said_once(make_row):
    rows = (
        make_row("DiG-S/2", 512, 2.0, gib=0.5, marks=("unwatched", "measured-again")),
        make_row("DiG-S/2", 1024, 4.0, gib=0.5, marks=("unsteady", "unwatched", "throttled")),
        make_row("DiT-S/2", 1024, status="oom", marks=("shared-gpu",)),
    )
    text = tables(Sweep(rows=rows))
    assert "| 512 | 2.00 · 0.500 |" in text
    assert "| 1024 | 4.00<sup>tu</sup> · 0.500 |" in text
    assert "Of all times: clock and other processes were not watched." in text
    assert "Of times with a letter: t: the clock was held down in at least half of the readings; u: the times" in text
    assert "another process" not in text
    assert "letter" not in tables(Sweep(rows=(make_row("DiG-S/2", 512, 2.0),)))


def test_what_ran_beside_another_says_so(make_row):
    rows = (
        make_row("DiG-S/2", 512, 2.0, gib=0.5, marks=("beside-another", "built-beside")),
        make_row("DiG-S/2", 512, 9.0, gib=0.5, execution="eager", marks=("host-shared",)),
    )
    text = tables(Sweep(rows=rows))
    assert "| 512 | 2.00<sup>b</sup> · 0.500 |" in text
    assert "| 512 | 9.00<sup>h</sup> · 0.500 |" in text
    legend = (
        "h: launched by the host step by step while another case ran on a neighbouring GPU; b: another case ran on a"
    )
    assert legend in text


def test_sizes_and_resolutions_are_in_their_own_order(make_row):
    rows = tuple(make_row(f"DiG-{s}/2", r, mode="forward") for s in ("XL", "B", "S", "L") for r in (1024, 512))
    table = tables(Sweep(rows=rows)).partition("### All sizes")[2]
    keys = [line.split(" | ")[:2] for line in table.splitlines() if "/2 |" in line]
    assert keys == [[f"| {s}/2", r] for s in ("S", "B", "L", "XL") for r in ("512", "1024")]


def test_executions_and_machines_have_their_own_tables(make_row):
    rows = (
        make_row(device="cpu", execution="eager"),
        make_row(execution="compile"),
        make_row(execution="eager"),
        make_row(execution="graph"),
    )
    headings = [line for line in tables(Sweep(rows=rows)).splitlines() if line.startswith("##")]
    assert headings == [
        "## NVIDIA H100 80GB HBM3",
        "### S/2: training step, CUDA graph, bf16, batch 1",
        "### S/2: training step, eager, bf16, batch 1",
        "### S/2: training step, torch.compile by block, bf16, batch 1",
        "## CPU (reference implementations), not a GPU result: AMD EPYC 9654",
        "### S/2: training step, eager, bf16, batch 1",
    ]


def test_environment_tells_every_version_and_uncommitted_changes(make_row):
    rows = [
        make_row(environment={"torch": "2.11.0", "packages": {"flash-attn": "2.8.3", "torch": "2.11.0"}}),
        make_row(environment={"torch": "2.12.0", "commit": "abc", "dirty": True}, started_at="2026-12-01T00:00:00Z"),
    ]
    assert environment(rows) == (
        "torch 2.11.0, 2.12.0 · flash-attn 2.8.3 · commit abc with uncommitted changes · 2026-11-22 to 2026-12-01"
    )


def test_nothing_from_a_row_can_break_a_table(make_row):
    row = make_row(options=(("backend", "a|b"),), environment={"gpu_name": "A\nB"})
    text = tables(Sweep(rows=(row,)), title="one\ntwo")
    assert text.startswith("# one two\n")
    assert "## A B\n" in text
    assert "| resolution | DiG (a&#124;b) |" in text
