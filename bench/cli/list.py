"""``python -m bench list``: every model there is. torch is imported late."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dig import registry
from dig.packages import MissingPackageError
from dig.registry import VAE_FACTOR, ModelSpec, families, parse_name


def list_models() -> None:
    """List every model: parameters, and multiply-adds of a forward pass, counted in full and as the paper does."""
    import torch

    from bench.measure.flops import paper_macs
    from dig.flops import UncountedError, forward_macs, model_macs
    from dig.model import DiG

    table = Table(title="256x256 images, 1000 classes, default options")
    for heading in ("model", "parameters", "GMAC in full", "GMAC as the DiG paper counts"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    side = 256 // VAE_FACTOR
    for name in registry.list_models():
        family, size, _ = parse_name(name)
        spec = ModelSpec(name=name, input_size=(side, side), in_channels=4, num_classes=1000)
        try:
            with torch.device("meta"):
                model = spec.build()
            macs = forward_macs(model) if spec.reference() == spec else model_macs(spec)
        except (UncountedError, MissingPackageError) as error:
            table.add_row(name, "", str(error), "")
            continue
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        paper = f"{paper_macs(model, macs) / 1e9:.3f}" if isinstance(model, DiG) else ""
        mark = " (assumed)" if size in family.assumed else ""
        table.add_row(name + mark, f"{count:,}", f"{macs / 1e9:.3f}", paper)
    console = Console()
    console.print(table)
    for family in families().values():
        for option, values in family.options.items():
            console.print(f"{family.name}: {option} = {values[0]} (default)" + "".join(f" | {v}" for v in values[1:]))
    if any(family.assumed for family in families().values()):
        console.print("assumed: nobody published this size")
