"""``python -m bench list``: every model there is. torch is imported late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.messages import refuse
from dig import registry
from dig.family import closest
from dig.packages import MissingPackageError
from dig.progress import following, open_console
from dig.registry import families, parse_name


def list_models(
    names: Annotated[
        list[str] | None, typer.Argument(help="Only models whose names begin like one of these: DiG, DiT-XL.")
    ] = None,
    count: Annotated[
        bool, typer.Option("--count", help="Count the figures of all models, without names too: half a minute.")
    ] = False,
) -> None:
    """List models, and of those that are named parameters and multiply-adds of a forward pass.

    Without names, all that there are, with their options; --count has their figures too. Multiply-adds are counted in
    full and as the paper does.
    """
    chosen = [name for name in registry.list_models() if name.startswith(tuple(names or [""]))]
    for word in names or []:
        if not any(name.startswith(word) for name in chosen):
            known = [*families(), *(name.partition("/")[0] for name in registry.list_models())]
            refuse(f"no model begins with {word!r}: {closest(word, dict.fromkeys(known))}")
    console = Console()
    if names or count:
        console.print(_counted(chosen))
    else:
        # Counting costs a build of each.
        sizes: dict[str, list[str]] = {}
        for name in chosen:
            sizes.setdefault(name.partition("/")[0], []).append(name)
        for size, models in sizes.items():
            mark = " (assumed)" if size.rpartition("-")[2] in parse_name(models[0])[0].assumed else ""
            console.print(" ".join(models) + mark, highlight=False)
        console.print("list NAME, or list --count, has parameters and multiply-adds", highlight=False)
    shown = [family for name, family in families().items() if any(parse_name(one)[0].name == name for one in chosen)]
    for family in shown:
        for option, values in family.options.items():
            console.print(f"{family.name}: {option} = {values[0]} (default)" + "".join(f" | {v}" for v in values[1:]))
    if any(family.assumed for family in shown):
        console.print("assumed: nobody published this size")


def _counted(names: Sequence[str]) -> Table:
    """The table of these models' figures."""
    table = Table(title="256x256 images, 1000 classes, default options")
    for heading in ("model", "parameters", "GMAC in full", "GMAC as the DiG paper counts"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    with following(open_console(), "counting", total=len(names), unit="model", images=0) as told:
        for name in told.counting(names, lambda _: 1):
            table.add_row(*_figures(name))
    return table


def _figures(name: str) -> tuple[str, str, str, str]:
    """A model's row of the table."""
    from bench.inspect.counts import count
    from dig.flops import UncountedError

    family, size, _ = parse_name(name)
    try:
        found = count(name)
    except (UncountedError, MissingPackageError) as error:
        return name, "", str(error), ""
    paper = "" if found.paper_macs is None else f"{found.paper_macs / 1e9:.3f}"
    mark = " (assumed)" if size in family.assumed else ""
    return name + mark, f"{found.parameters:,}", f"{found.macs / 1e9:.3f}", paper
