"""``python -m bench list``: every model there is. torch is imported late."""

from __future__ import annotations

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
from dig.spec import VAE_FACTOR, ModelSpec


def list_models(
    names: Annotated[
        list[str] | None, typer.Argument(help="Only models whose names begin like one of these: DiG, DiT-XL.")
    ] = None,
) -> None:
    """List models: parameters, and multiply-adds of a forward pass, counted in full and as the paper does.

    All that there are, without names; counting them takes most of a minute.
    """
    chosen = [name for name in registry.list_models() if name.startswith(tuple(names or [""]))]
    for word in names or []:
        if not any(name.startswith(word) for name in chosen):
            known = [*families(), *(name.partition("/")[0] for name in registry.list_models())]
            refuse(f"no model begins with {word!r}: {closest(word, dict.fromkeys(known))}")
    table = Table(title="256x256 images, 1000 classes, default options")
    for heading in ("model", "parameters", "GMAC in full", "GMAC as the DiG paper counts"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    with following(open_console(), "counting", total=len(chosen), unit="model", images=0) as told:
        for name in told.counting(chosen, lambda _: 1):
            table.add_row(*_figures(name))
    console = Console()
    console.print(table)
    shown = [family for name, family in families().items() if any(parse_name(one)[0].name == name for one in chosen)]
    for family in shown:
        for option, values in family.options.items():
            console.print(f"{family.name}: {option} = {values[0]} (default)" + "".join(f" | {v}" for v in values[1:]))
    if any(family.assumed for family in shown):
        console.print("assumed: nobody published this size")


def _figures(name: str) -> tuple[str, str, str, str]:
    """A model's row of the table."""
    import torch

    from bench.measure.flops import paper_macs
    from dig.flops import UncountedError, forward_macs, model_macs
    from dig.model import DiG

    family, size, _ = parse_name(name)
    side = 256 // VAE_FACTOR
    spec = ModelSpec(name=name, input_size=(side, side), in_channels=4, num_classes=1000)
    try:
        with torch.device("meta"):
            model = spec.build()
        macs = forward_macs(model) if spec.reference() == spec else model_macs(spec)
    except (UncountedError, MissingPackageError) as error:
        return name, "", str(error), ""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    paper = f"{paper_macs(model, macs) / 1e9:.3f}" if isinstance(model, DiG) else ""
    mark = " (assumed)" if size in family.assumed else ""
    return name + mark, f"{count:,}", f"{macs / 1e9:.3f}", paper
