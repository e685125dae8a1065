"""The page's sections in order, and every figure by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from reports.page import against, bars, steps
from reports.page.chart import Chart, Missing
from reports.page.evidence import Evidence

Figure = Chart | Missing

SECTIONS: Mapping[str, tuple[str, str, str]] = {
    "claims": (
        "Claims",
        "Claims and verdicts",
        "What was said, what was measured here, and whether it holds. A ratio's interval here is of two medians "
        "(docs/method.md says how); in figures bars are where most steps lie, which is another thing. Of the "
        "commands, run in the project's folder, the first measures anew and judges that, the second judges these rows.",
    ),
    "explore": (
        "Explore",
        "Choose what to compare",
        "Rows differ in what stands across alone; the newest of all files may also differ in their commits. A series "
        "is one model with one set of kernels.",
    ),
    "speed": (
        "Speed, memory",
        "Speed and memory",
        "The paper's Figs. 1 and 2, each from one file: one run, mostly, on one card.",
    ),
    "lead": (
        "Lead",
        "DiG against attention at its best",
        "Each side in the fastest of the ways in which it was measured.",
    ),
    "parts": ("Time", "Where a step's time goes", "Launched kernel by kernel, as plain PyTorch does."),
    "memory": ("Memory", "Where memory goes", ""),
    "roofline": ("Roofline", "What the card could do", ""),
    "capacity": ("Capacity", "What fits", ""),
    "sampling": ("Sampling", "Whole sampling", "From noise to latents, with guidance."),
    "beside": ("Beside", "Side by side", ""),
    "training": ("Training", "Does it learn as well?", ""),
    "rows": (
        "Rows",
        "Every row",
        "One line a case and file; launches of a case are one line. A click on a heading sorts.",
    ),
}
"""Section → its name in the page's index, its title, and what to know first."""

MAKERS: Sequence[tuple[tuple[str, ...], Callable[[Evidence], list[Figure]]]] = (
    (("fig1a", "fig1b"), steps.figure_1),
    (("fig2a", "fig2b"), steps.figure_2),
    (("lead",), steps.lead),
    (("parts",), bars.parts),
    (("memory",), bars.memory),
    (("roofline",), against.roofline),
    (("achieved",), steps.achieved),
    (("capacity",), bars.capacity),
    (("sampling",), bars.sampling),
    (("beside",), against.beside),
)
NAMES = tuple(name for names, _ in MAKERS for name in names)
"""Every figure that can be asked for by name."""


def figures(evidence: Evidence, names: Sequence[str] = NAMES) -> list[Figure]:
    """The figures of these names, in the page's order."""
    found = []
    for own, make in MAKERS:
        if set(own) & set(names):
            found += [figure for figure in make(evidence) if figure.name in names]
    return found
