"""What the commands share: choosing the device, refusing bad input, progress, opening data and VAEs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dig.packages import MissingPackageError

if TYPE_CHECKING:
    from torch import Tensor

    from dig.training.data import DataSet

DataOption = Annotated[
    Path, typer.Option(help="Class folders (cat/1.jpg), idx files (Fashion-MNIST's), or latent shards from encode.")
]
ImageSizeOption = Annotated[
    int | None, typer.Option(help="Side of the images in pixels. Default: 256 for class folders, 32 for idx files.")
]
ChannelsOption = Annotated[
    int | None, typer.Option(help="1 (grey) or 3. Default: 3 for class folders, 1 for idx files.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cuda, or cpu.")]
WorkersOption = Annotated[
    int | None, typer.Option(help="Processes that read images. Default: a process a core; none for data in memory.")
]


@contextmanager
def refusing() -> Iterator[None]:
    """End with exit status 2 and one clear message on input that can't be used, and on a full disk or device."""
    try:
        yield
    except (ValueError, MissingPackageError) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    except RuntimeError as error:
        from torch import OutOfMemoryError

        from dig.graphs import CaptureError
        from dig.training.trainer import TrainingError

        if isinstance(error, OutOfMemoryError):
            message = "the GPU's memory is not enough; try a smaller --batch, or in training a larger --accumulate"
        elif isinstance(error, (TrainingError, CaptureError)):
            message = str(error)
        else:
            raise
    else:
        return
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2) from None


def choose_device(device: str) -> str:
    """``auto``, ``cuda``, ``cuda:1`` or ``cpu`` to what is there.

    Raises:
        ValueError: Another word, or a GPU that isn't there.
    """
    import torch

    present = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if present else "cpu"
    if device.partition(":")[0] not in ("cuda", "cpu"):
        raise ValueError(f"unknown device {device!r}: choose auto, cuda or cpu")
    if device != "cpu" and not present:
        raise ValueError("no NVIDIA GPU was found; use --device cpu, or run on a machine with one")
    return device


def one_device(device: str) -> str:
    """`choose_device` for commands that run on the first GPU: ``cuda`` or ``cpu``."""
    chosen = choose_device(device)
    if ":" in chosen:
        raise ValueError(f"choose a GPU with CUDA_VISIBLE_DEVICES={chosen.partition(':')[2]}, and --device cuda")
    return chosen


def choose_precision(dtype: str | None, device: str) -> str:
    """``bf16`` or ``fp32``, checked; by default what the device is good at."""
    chosen = dtype or ("bf16" if device == "cuda" else "fp32")
    if chosen not in ("bf16", "fp32"):
        raise ValueError(f"dtype must be bf16 or fp32; got {chosen!r}")
    return chosen


def open_console() -> Console:
    """The console for people, on stderr; warnings of the library go there too."""
    console = Console(stderr=True, soft_wrap=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    return console


def progress_bar(console: Console, *columns: str) -> Progress:
    """A bar with what is done, how long it took and what is left; ``columns`` are more texts, as rich writes them."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(text, markup=False) for text in columns),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def open_data(path: Path, *, image_size: int | None, channels: int | None, mirror: bool | None = None) -> DataSet:
    """Open a data set with the options that were given."""
    from dig.training.data import open_dataset

    return open_dataset(path, image_size=image_size, channels=channels, mirror=mirror)


def open_decoder(vae: str | None, scale: float | None, device: str) -> Callable[[Tensor], Tensor] | None:
    """Scaled latents to images, by the VAE of that name; None without one, or in pixel space.

    Raises:
        ValueError: There is no such VAE, or a model of pixels needs none.
    """
    if vae is None:
        return None
    if scale is None:
        raise ValueError("this model works on pixels: it needs no --vae")
    import torch

    from dig.training.data.vae import load_vae

    model: Any = load_vae(vae, torch.device(device))

    def decode(x: Tensor) -> Tensor:
        with torch.inference_mode():
            # One image at a time: a decoder's activations are hundreds of times its input.
            return torch.cat([model.decode(part / scale).sample for part in x.split(1)])

    return decode
