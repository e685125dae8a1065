"""What the commands share: choosing the device, refusing bad input, progress, opening data."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dig.launched import launched, speaks
from dig.messages import describe, in_words_of_the_command, one_line
from dig.packages import MissingPackageError

if TYPE_CHECKING:
    from dig.sampling.decoder import Decoder
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
QuietOption = Annotated[
    bool, typer.Option("--quiet", help="No progress and no notes: only warnings, errors and the last line.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be done, and estimates of memory and time; write nothing.")
]


_OF_FILES = (
    ".bin .ckpt .csv .gif .gz .h5 .jpeg .jpg .json .jsonl .log .md .npy .npz .parquet .png .pt .pth .safetensors .tar "
    ".tgz .toml .txt .webp .yaml .yml .zip"
)
"""Suffixes that no folder has on purpose; ``.v2`` and ``.final`` are some people's."""


def check_folder_name(option: str, path: Path | None) -> None:
    """Raise ValueError where a folder that isn't there yet has the name of a file: it would be made, and not expected.

    Args:
        option: That names it, ``--out``.
        path: The folder.
    """
    if path is not None and path.suffix and path.suffix.lower() in _OF_FILES.split() and not path.exists():
        raise ValueError(f"{option} names a folder, and {path} would be a file's name: leave out {path.suffix}")


def check_file_name(option: str, path: Path, suffix: str) -> None:
    """Raise ValueError where a new file's name says that it holds something else; without a suffix it says nothing."""
    others = [other for other in _OF_FILES.split() if other != suffix]
    if path.suffix.lower() in others and not path.exists():
        raise ValueError(f"{option} writes a file in {suffix}, and {path} has the name of another: give it that suffix")


@contextmanager
def interruptible(kept: Callable[[], str]) -> Iterator[None]:
    """End with exit status 130 and a line on what is kept, on SIGINT, SIGTERM or SIGHUP.

    Not one of several processes, which end together and with one message (`dig.commands.job`).

    Args:
        kept: Says so, once it is over: ``3 of 8 images are in DIR; go on with the same command``.
    """

    if launched():
        yield
        return

    def interrupt(*_: Any) -> None:
        # Once: a scheduler sends more of them while files are closed.
        for number in heeded:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    # One that is ignored, as SIGHUP under nohup, stays so. Only a process' first thread may set them.
    first = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if first else ()
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"stopped: {one_line(kept())}", err=True)
        raise typer.Exit(130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


MAX_SIDE = 2**16
"""Pixels along a side of an image; beyond are typing errors."""
_SMALLER = "try a smaller --batch or --image-size, or in training a larger --accumulate"


@contextmanager
def refusing() -> Iterator[None]:
    """End with exit status 2 and one clear message on input that can't be used, and on a full disk or device.

    Of several processes that a launcher started, one says it (`dig.launched.speaks`).
    """
    try:
        yield
        return
    except (ValueError, MissingPackageError, OSError, MemoryError, RuntimeError) as error:
        message = explain(error)
        if message is None:
            raise
    if speaks():
        typer.echo(f"error: {one_line(in_words_of_the_command(message))}", err=True)
    raise typer.Exit(2) from None


def explain(error: BaseException) -> str | None:
    """What to say of an error that input, a full disk or a full device made; None of a fault of the program."""
    if isinstance(error, (ValueError, MissingPackageError, OSError)):
        return describe(error)
    if isinstance(error, MemoryError):
        return f"the host's memory is not enough; {_SMALLER}"
    if not isinstance(error, RuntimeError):
        return None
    from torch import OutOfMemoryError

    from dig.graphs import CaptureError
    from dig.training.watch import TrainingError

    if isinstance(error, OutOfMemoryError):
        return f"the GPU's memory is not enough; {_SMALLER}"
    if isinstance(error, (TrainingError, CaptureError)):
        return str(error)
    if "can't allocate memory" in str(error):  # torch's allocator of the host has no class of its own
        return f"the host's memory is not enough; {_SMALLER}"
    return None


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


def open_data(path: Path, *, image_size: int | None, channels: int | None, mirror: bool | None = None) -> DataSet:
    """Open a data set with the options that were given."""
    if image_size is not None and not 1 <= image_size <= MAX_SIDE:
        raise ValueError(f"image_size must be 1 to {MAX_SIDE:,} pixels; got {image_size}")
    from dig.training.data import open_dataset

    return open_dataset(path, image_size=image_size, channels=channels, mirror=mirror)


def open_decoder(vae: str | None, scale: float | None, device: str, **said: Any) -> Decoder | None:
    """The VAE of that name; None without one: `dig.sampling.decoder.open_decoder`, imported once it is needed."""
    if vae is None:
        return None
    from dig.sampling import decoder

    return decoder.open_decoder(vae, scale, device, **said)
