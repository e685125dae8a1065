"""How families look: their own way, the row's where nobody here knows them, and never two alike."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench.store.rows import Row
from dig.environment import ROOT
from dig.family import FamilyError, Look
from dig.registry import families
from reports.figures import speed_memory
from reports.looks import Looks
from reports.series import Sweep
from tests.test_imports import imported, within

LOOK = Look(label="Mine", colors=("#123456",), markers="X", dashes=((0, (3, 1)),), width=3.0)
SEAM = ("layout", "drawing")
"""Of figures: what all have in common, and below it what draws a panel."""


def test_the_families_of_this_project_look_as_they_always_did():
    styles = {family: Looks().style(family, 0) for family in ("DiG", "Flash-DiT", "DiT", "DiS")}
    assert {family: style.color for family, style in styles.items()} == {
        "DiG": "#D55E00", "Flash-DiT": "#0072B2", "DiT": "#222222", "DiS": "#009E73",
    }  # fmt: skip
    assert "".join(style.marker for style in styles.values()) == "os^v"
    assert [style.width for style in styles.values()] == [2.2, 1.5, 1.5, 1.5]
    second = Looks().style("DiG", 1)
    assert (second.color, second.width, second.hollow) == ("#B8860B", 1.5, True)


def options(backend, **others):
    return tuple(sorted({"backend": backend, **others}.items()))


def test_a_backend_has_one_colour_whatever_else_is_shown():
    """DiG on this project's kernels is the main line, the published one lighter."""
    released = options("triton", variant="release")
    alone = Looks(series=[("DiG", released)]).of("DiG", released)
    looks = Looks(series=[("DiG", options(word, variant="release")) for word in ("fla", "reference", "triton")])
    ours, published = looks.of("DiG", released), looks.of("DiG", options("fla", variant="release"))
    assert alone == ours == Looks().style("DiG", 0)
    assert luminance(published.color) > luminance(ours.color) + 0.15
    assert published.width < ours.width


def test_series_of_one_backend_share_its_colour_and_differ_otherwise():
    series = [("DiG", options("triton", variant=word)) for word in ("paper", "release")]
    looks = Looks(series=series)
    first, second = (looks.of(*each) for each in series)
    assert first.color == second.color
    assert first.marker != second.marker
    assert first.hollow != second.hollow


def test_all_backends_of_a_family_differ():
    for family in families().values():
        if family.backends:
            looks = Looks(series=[(family.name, options(word)) for word in family.backends])
            found = [looks.of(family.name, options(word)) for word in family.backends]
            assert len({(style.color, style.marker, style.hollow) for style in found}) == len(found)


def luminance(color):
    """Relative luminance of ``#RRGGBB``, as WCAG has it: how bright it is in grey."""
    channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_family_that_is_not_known_here_brings_its_look_in_its_rows(make_row):
    row = Row.from_json(make_row("Own-S/2", 1024, 3.0, look=LOOK).to_json())
    looks = Looks([row])
    style = looks.style("Own", 0)
    assert (style.color, style.marker, style.dashes, style.width) == ("#123456", "X", (0, (3, 1)), 3.0)
    assert looks.label("Own") == "Mine"
    sweep = Sweep(rows=(row, make_row("DiG-S/2", 1024, 2.0)))
    assert list(sweep.labels.values()) == ["DiG", "Mine"]
    (legend,) = speed_memory(sweep).figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["DiG", "Mine"]


def test_what_a_look_leaves_out_is_chosen(make_row):
    looks = Looks([make_row("Own-S/2", 1024, 3.0, look=Look(colors=("#123456",)))])
    assert looks.style("Own", 0).color == looks.style("Own", 1).color == "#123456"
    assert looks.style("Own", 0).marker != looks.style("Own", 1).marker


def test_strangers_are_told_apart_and_keep_their_looks():
    looks = Looks()
    first = [looks.style(family, i) for family in ("A", "B", "C") for i in range(3)]
    assert len({(style.color, style.marker, str(style.dashes)) for style in first}) == 9
    assert len({str(style.dashes) for style in first}) == 9
    assert [looks.style(family, i) for family in ("A", "B", "C") for i in range(3)] == first
    assert looks.style("D", 0).color


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"colors": ("orange",)}, "#RRGGBB; got 'orange'"),
        ({"markers": "ox"}, "got 'x'"),
        ({"dashes": ("dashed",)}, "got 'dashed'"),
        ({"dashes": ((0, (4, -1)),)}, "positive numbers"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(fields, message):
    with pytest.raises(FamilyError, match=message):
        Look(**fields)


def test_no_torch_is_asked_for():
    code = "import sys, reports.__main__, reports.sampling, reports.looks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_what_figures_have_in_common_knows_nothing_of_panels_or_rows() -> None:
    names = {name: within(imported(ROOT / "reports" / f"{name}.py"), "reports", "bench") for name in SEAM}
    assert names["layout"] == {"bench.messages.visible"}
    assert names["drawing"] - within(names["drawing"], "reports.layout") == {"bench.messages.visible"}
