"""``python -m reports.ablation FILE --out DIR``: the paper's ablations, from the runs of ``examples/ablation.py``.

Arms are trained from the same seeds, which give them the same images, timesteps and noise in the same order. So two
arms are compared seed by seed: the mean of the differences, with its 95% interval by Student's t. An order holds where
that interval lies on its side of zero, is reversed on the other, and is not told apart across it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, Literal, NamedTuple

import matplotlib as mpl
import pandas as pd
import typer

from bench.messages import OneLineCommand, cell, say
from bench.store.files import write_file
from bench.store.sheets import to_csv
from dig.family import BACKEND
from dig.registry import parse_name
from reports import drawing, layout
from reports.ablation_runs import TIMED, Run, read_ablation
from reports.cells import MISSING, markdown, number
from reports.drawing import Line, Point
from reports.figures import Drawing
from reports.logs import RunError
from reports.looks import Looks
from reports.refusing import refusing

Measure = Literal["loss", "frechet"]
MEASURES: Mapping[Measure, str] = {"frechet": "Fréchet distance", "loss": "Loss on held-out images"}
FEWEST = 2
"""Seeds that an interval takes."""
SREM = (
    ("causal", "bidirectional"), ("default-init", "bidirectional"), ("bidirectional", "identity-init"),
    ("default-init", "identity-init"), ("identity-init", "crisscross"), ("crisscross", "u-shape"),
    ("crisscross", "u-shape-zero"),
)  # fmt: skip
"""Worse and better, as the paper's Tab. 2 has them, and the U shape of its later version."""
NAMES = {
    "causal": "one scan", "bidirectional": "+ bidirectional", "default-init": "+ 3×3 convolution, default init",
    "identity-init": "+ 3×3 convolution, identity init", "crisscross": "+ crisscross: DiG", "u-shape": "DiG, U shape",
    "u-shape-zero": "DiG, U shape that begins as none", "attention": "attention (Flash-DiT)",
}  # fmt: skip
SIZES, TOKENS = ("S/4", "B/4", "L/4"), ("S/8", "S/4", "S/2")
"""The paper's Fig. 5, each from worse to better: larger models, and smaller patches."""
SIDE = 32
"""Pixels of an image."""

app = typer.Typer(add_completion=False)


class Estimate(NamedTuple):
    """A mean over seeds; the ends of its 95% interval are NaN where there are too few."""

    middle: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        """``12.3 [11.9, 12.7]``."""
        if math.isnan(self.low):
            return number(self.middle)
        return f"{number(self.middle)} [{number(self.low)}, {number(self.high)}]"


class Order(NamedTuple):
    """Of two arms, whether the first is worse, as was said: the difference seed by seed, and what follows."""

    worse: str
    better: str
    difference: Estimate
    verdict: str


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values of different seeds, with its 95% interval by Student's t."""
    from scipy.stats import t

    if len(values) < FEWEST:
        return Estimate(values[0], math.nan, math.nan, len(values))
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean(values), mean(values) - half, mean(values) + half, len(values))


def arms_of(runs: Iterable[Run], experiment: str) -> dict[str, dict[int, Run]]:
    """Runs of an experiment by arm and seed: the arms in the paper's order, unknown ones in the file's behind them."""
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run.experiment == experiment:
            found.setdefault(run.arm, {})[run.seed] = run
    known = [*NAMES, *TOKENS, *SIZES]
    return dict(sorted(found.items(), key=lambda arm: known.index(arm[0]) if arm[0] in known else len(known)))


def compare(arms: Mapping[str, Mapping[int, Run]], worse: str, better: str, measure: Measure) -> Order | None:
    """Whether one arm is worse than another; None where one of them has no run of a seed of the other's.

    Raises:
        RunError: Their runs are of different length.
    """
    shared = sorted(arms.get(worse, {}).keys() & arms.get(better, {}).keys())
    if not shared:
        return None
    pairs = [(arms[worse][seed], arms[better][seed]) for seed in shared]
    for one, other in pairs:
        if (one.steps, one.batch) != (other.steps, other.batch):
            raise RunError(
                f"{worse} and {better} were trained for {one.steps} and {other.steps} steps of {one.batch} and "
                f"{other.batch} images, and can't be compared; train them alike"
            )
    difference = estimate([getattr(one, measure) - getattr(other, measure) for one, other in pairs])
    if math.isnan(difference.low):
        verdict = "one seed: not told apart"
    elif difference.low > 0:
        verdict = "holds"
    else:
        verdict = "reversed" if difference.high < 0 else "not told apart"
    return Order(worse, better, difference, verdict)


def orders(runs: Sequence[Run], measure: Measure) -> dict[str, list[Order]]:
    """Every order that the paper states and the runs can test: of SREM's parts, of sizes, of tokens."""
    srem, scaling = arms_of(runs, "srem"), arms_of(runs, "scaling")
    asked = {"srem": (srem, SREM), "sizes": (scaling, pairwise(SIZES)), "tokens": (scaling, pairwise(TOKENS))}
    found = {
        name: [compare(arms, worse, better, measure) for worse, better in pairs]
        for name, (arms, pairs) in asked.items()
    }
    return {name: [order for order in several if order is not None] for name, several in found.items()}


def page(runs: Sequence[Run]) -> str:
    """Tables and verdicts as Markdown."""
    parts = [
        "# SREM, size and tokens, trained small",
        "Fashion-MNIST, 32×32 pixels. Cells: mean over seeds and its 95% interval (Student's t). Differences are taken "
        "seed by seed. The Fréchet distance is the classifier's, of samples without guidance; the loss is the mean "
        "squared error of the noise that averaged weights predict on the test split.",
        cell(_about(runs)),
    ]
    srem = arms_of(runs, "srem")
    if srem:
        parts += ["## SREM's parts: the paper's Tab. 2", _arms_table(srem, NAMES)]
        parts += [_orders_table(runs, ("srem",), NAMES)]
    scaling = arms_of(runs, "scaling")
    if scaling:
        parts += ["## Size and tokens: the paper's Fig. 5", _arms_table(scaling, {})]
        parts += [_orders_table(runs, ("sizes", "tokens"), {})]
    equal = arms_of(runs, TIMED)
    if equal:
        parts += ["## The same seconds of training", _seconds_table(equal)]
        order = compare_seconds(equal)
        parts += [order] if order else []
    return "\n\n".join(parts) + "\n"


def _about(runs: Sequence[Run]) -> str:
    """What all runs are of, and what differs."""
    return " · ".join(" and ".join(dict.fromkeys(words)) for words in zip(*(run.about for run in runs), strict=True))


def _arms_table(arms: Mapping[str, Mapping[int, Run]], names: Mapping[str, str]) -> str:
    rows = [
        {
            "arm": names.get(arm, cell(arm)),
            "model": cell(next(iter(seeds.values())).model),
            **{said: str(estimate([getattr(run, key) for run in seeds.values()])) for key, said in MEASURES.items()},
            "steps": " and ".join(dict.fromkeys(str(run.steps) for run in seeds.values())),
            "seeds": len(seeds),
        }
        for arm, seeds in arms.items()
    ]
    return markdown(pd.DataFrame(rows).set_index(["arm", "model"]))


def _orders_table(runs: Sequence[Run], groups: Sequence[str], names: Mapping[str, str]) -> str:
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for measure, said in MEASURES.items():
        found = orders(runs, measure)
        for order in (order for group in groups for order in found[group]):
            row = rows.setdefault((names.get(order.better, order.better), names.get(order.worse, order.worse)), {})
            row[f"{said}: worse less better"] = str(order.difference)
            row[f"{said}: the order"] = order.verdict
    if not rows:
        return "No two arms of an order have a seed in common yet."
    table = pd.DataFrame([{"said to be better": a, "than": b, **row} for (a, b), row in rows.items()])
    return markdown(table.set_index(["said to be better", "than"]).fillna(MISSING))


def _seconds_table(arms: Mapping[str, Mapping[int, Run]]) -> str:
    rows = []
    for arm, seeds in arms.items():
        several = list(seeds.values())
        rate = estimate([run.steps * run.batch / run.seconds for run in several])
        ready = [run.ready for run in several if run.ready is not None]
        row = {
            "arm": cell(arm),
            "model": cell(several[0].model),
            "seconds": number(mean(run.seconds for run in several)),
        }
        row |= {"images/s": str(rate), "seconds before the second step": number(mean(ready)) if ready else MISSING}
        row |= {said: str(estimate([getattr(run, key) for run in several])) for key, said in MEASURES.items()}
        rows.append({**row, "seeds": str(len(several))})
    return markdown(pd.DataFrame(rows).set_index(["arm", "model"]))


def compare_seconds(arms: Mapping[str, Mapping[int, Run]]) -> str:
    """Which of two models is better after the same seconds, in words; empty where they can't be compared."""
    if not {"DiG", "Flash-DiT"} <= arms.keys():
        return ""
    shared = sorted(arms["DiG"].keys() & arms["Flash-DiT"].keys())
    words = []
    for measure, said in MEASURES.items():
        if not shared:
            break
        pairs = [(arms["Flash-DiT"][seed], arms["DiG"][seed]) for seed in shared]
        difference = estimate([getattr(one, measure) - getattr(other, measure) for one, other in pairs])
        told = not math.isnan(difference.low) and difference.low * difference.high > 0
        verdict = ("DiG is better" if difference.middle > 0 else "Flash-DiT is better") if told else "not told apart"
        words.append(f"{said}, Flash-DiT less DiG: {difference}: {verdict}.")
    return " ".join(words)


def data(runs: Sequence[Run]) -> str:
    """What the figure draws, as CSV: a line for each arm and measure, the loss too."""
    lines: list[list[object]] = []
    for experiment in dict.fromkeys(run.experiment for run in runs if run.experiment != TIMED):
        for arm, seeds in arms_of(runs, experiment).items():
            own = list(seeds.values())
            for measure in MEASURES:
                found = estimate([getattr(run, measure) for run in own])
                ends = ["" if math.isnan(end) else f"{end:.6g}" for end in (found.low, found.high)]
                numbers = [f"{found.middle:.6g}", *ends, found.seeds, own[-1].steps, own[-1].batch]
                lines.append([experiment, arm, own[-1].model, measure, *numbers])
    names = ("experiment", "arm", "model", "measure", "mean", "low", "high", "seeds", "steps", "batch")
    return to_csv(names, lines)


def draw(runs: Sequence[Run], title: str | None = None) -> Drawing:
    """The Fréchet distance of SREM's arms, and against size and tokens, in the form of the paper's Fig. 5."""
    # With its kernels: a colour is a model with those, in every figure.
    families = {parse_name(run.model)[0].name: run.backend for run in runs}
    styles = {name: Looks().of(name, ((BACKEND, backend),) if backend else ()) for name, backend in families.items()}
    srem, scaling = arms_of(runs, "srem"), arms_of(runs, "scaling")
    panels = [panel for panel in (srem, scaling, scaling) if panel]
    if not panels:
        raise RunError("there is no run of srem or scaling to draw")
    caption = f"{_about(runs)}. Points: mean over seeds; bars: its 95% interval (Student's t)."
    with mpl.rc_context(dict(layout.RC)):
        figure, axes = layout.assemble(
            len(panels), title=title or "DiG's parts, size and tokens on Fashion-MNIST", caption=caption, styles=styles
        )
        places = iter(axes)
        if srem:
            _draw_arms(next(places), srem, styles)
        if scaling:
            for names, heading, label, x in (
                (SIZES, "Larger models, patches of 4", "Parameters (millions, log axis)", _millions),
                (TOKENS, "More tokens, size S", "Tokens of an image (log axis)", _tokens),
            ):
                _draw_curve(next(places), scaling, styles["DiG"], names, title=heading, x_label=label, x=x)
    return Drawing(figure=figure)


def _draw_arms(axes: Any, arms: Mapping[str, Mapping[int, Run]], styles: Mapping[str, layout.Style]) -> None:
    """A row an arm, its name above it: names are too long for ticks."""
    axes.set_title("SREM's parts, S/4", loc="left", fontsize=10, fontweight="bold", pad=7)
    axes.set_xlabel("Fréchet distance (log axis)", labelpad=5)
    axes.set_xscale("log")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_yticks([])
    axes.set_ylim(len(arms) - 0.4, -0.7)
    ends: list[float] = []
    for place, (arm, seeds) in enumerate(arms.items()):
        look = styles[parse_name(next(iter(seeds.values())).model)[0].name]
        found = estimate([run.frechet for run in seeds.values()])
        low, high = (found.middle, found.middle) if math.isnan(found.low) else (found.low, found.high)
        ends += [max(low, found.middle / 10), high]
        axes.hlines(place, max(low, found.middle / 10), high, color=look.color, linewidth=3, alpha=0.4)
        axes.plot([found.middle], [place], marker=look.marker, color=look.color, gid=f"arm:{arm}", markersize=6)
        axes.annotate(
            NAMES.get(arm, arm), (0.02, place), xycoords=("axes fraction", "data"), xytext=(0, 4),
            textcoords="offset points", fontsize=7.5, color=layout.SOFT_INK,
        )  # fmt: skip
    low, high = min(ends) / 1.1, max(ends) * 1.1
    axes.set_xlim(low, high)
    ticks = drawing.log_ticks(low, high)
    axes.xaxis.set_major_locator(mpl.ticker.FixedLocator(ticks))
    axes.xaxis.set_major_formatter(mpl.ticker.FixedFormatter([f"{tick:g}" for tick in ticks]))
    axes.xaxis.set_minor_locator(mpl.ticker.FixedLocator([]))


def _millions(seeds: Mapping[int, Run]) -> float:
    known = [run.parameters for run in seeds.values() if run.parameters]
    if not known:
        raise RunError("no run of a size has its count of parameters; the run of seed 0 has it")
    return known[0] / 1e6


def _tokens(seeds: Mapping[int, Run]) -> float:
    patch = int(next(iter(seeds.values())).model.rpartition("/")[2])
    return float((SIDE // patch) ** 2)


def _draw_curve(
    axes: Any,
    arms: Mapping[str, Mapping[int, Run]],
    look: layout.Style,
    names: Sequence[str],
    *,
    title: str,
    x_label: str,
    x: Any,
) -> None:
    points, ticks = [], {}
    for name in names:
        if name not in arms:
            continue
        found = estimate([run.frechet for run in arms[name].values()])
        low, high = (found.middle, found.middle) if math.isnan(found.low) else (found.low, found.high)
        at = x(arms[name])
        # A t interval of few seeds may pass zero, which a log axis doesn't have.
        points.append(Point(x=math.log10(at), y=found.middle, low=max(low, found.middle / 10), high=high))
        ticks[math.log10(at)] = f"{at:.0f}"
    drawing.draw_panel(
        axes, [Line(label="DiG", style=look, points=tuple(points))], title=title, x_label=x_label,
        y_label="Fréchet distance (log axis)", x_ticks=ticks, failures_at="top",
    )  # fmt: skip


@app.command(cls=OneLineCommand)
def report(
    path: Annotated[Path, typer.Argument(metavar="ablation.jsonl", help="Runs of examples/ablation.py.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write into; made if it is not there.")],
    title: Annotated[str | None, typer.Option(help="Title, instead of the figure's own.")] = None,
) -> None:
    """Write ablation.md, and ablation.png, .svg and .csv, from the runs of examples/ablation.py.

    Exit status 2: a file cannot be read or written, or there are no runs.
    """
    with refusing(RunError, folder=out):
        runs = read_ablation(path)
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / "ablation.md", page(runs).encode())
        say(f"wrote {out / 'ablation.md'}")
        if any(run.experiment != TIMED for run in runs):
            for file in draw(runs, title).save(out, "ablation"):
                say(f"wrote {file}")
            write_file(out / "ablation.csv", data(runs).encode())
            say(f"wrote {out / 'ablation.csv'}")


if __name__ == "__main__":
    app(prog_name="python -m reports.ablation")
