"""Samples into a folder of PNG files, one a sample: whole or not there, kept by the next command, more at any time.

A sample is a function of the seed and its index, so a folder holds any of them: those that are missing are made.
"""

from __future__ import annotations

import dataclasses
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dig.locks import only_process
from dig.memory import check_disk
from dig.sampling.files import ABOUT, Progress
from dig.sampling.images import write_png
from dig.sampling.runner import BatchSampler, SamplePlan
from dig.sampling.sharing import ALONE, Sharing
from dig.sampling.trained import Trained
from dig.training.data.files import write_atomically

_END = b"IEND\xaeB`\x82"
"""The last bytes of every whole PNG file."""
_NAME = re.compile(r"\d{8,}-.*\.png")
_FREE = ("count", "first")
"""Of a plan: which samples there are, not what they are."""


def sample_name(index: int, label: int, class_names: Sequence[str], num_classes: int) -> str:
    """``00000012-3-cat.png``: index, label, and the class' name as far as a file can hold it; or ``null``."""
    if label >= num_classes:
        return f"{index:08d}-null.png"
    name = unicodedata.normalize("NFKC", class_names[label]) if class_names else ""
    word = re.sub(r"[^\w]+", "-", name).strip("-")[:40]
    # Where the name is the label's number, once is enough.
    return f"{index:08d}-{label}{f'-{word}' if word and word != str(label) else ''}.png"


def open_folder(folder: Path) -> None:
    """Make the folder and write there, before there is anything to lose.

    Raises:
        ValueError: Something else lies there.
        OSError: It can't be made or written to.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} is no folder; choose another for the images")
    others = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    if others and ABOUT not in others:
        raise ValueError(f"{folder} holds something else than samples ({min(others)}); choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        pass


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    message = f"another process is sampling into {folder}; wait for it, or choose another folder"
    with only_process(folder / ".lock", message):
        yield


def sample_to_folder(
    sampler: BatchSampler,
    folder: Path,
    *,
    about: dict[str, Any],
    class_names: Sequence[str] = (),
    sharing: Sharing = ALONE,
) -> Iterator[Progress]:
    """Make a plan's samples that the folder has not yet, each a PNG file; ``about.json`` says what they are of.

    Args:
        sampler: Samples by index, as (H, W, 3) uint8.
        folder: By `open_folder`.
        about: What the samples are of; samples of something else are never mixed in.
        class_names: Of the labels, where they are known.
        sharing: Of several processes that call this alike, each makes some of the samples.

    Raises:
        ValueError: The folder holds other samples.
        LockedError: Another process samples into it.
        TooLargeError: The disk has no room for them.
        NotFiniteError: What was sampled is not finite.
        OSError: A file can't be written; those before are kept.
    """
    plan, model_batch = sampler.plan, sampler.plan.model_batch
    described = {name: value for name, value in dataclasses.asdict(plan).items() if name not in _FREE}
    manifest = (json.dumps({**about, "plan": described}, indent=1) + "\n").encode()
    stop = plan.first + plan.count
    drawn: dict[int, NDArray[Any]] = {}
    numbers = range(plan.first // model_batch, -(-stop // model_batch))

    def names_of(number: int) -> dict[int, str]:
        """Names of the wanted samples of one of the model's batches, by index."""
        indices = range(max(plan.first, number * model_batch), min(stop, (number + 1) * model_batch))
        labelled = zip(indices, plan.labels(indices), strict=True)
        return {index: sample_name(index, label, class_names, sampler.num_classes) for index, label in labelled}

    def begin() -> list[tuple[int, list[int]]]:
        """Say what the folder holds; the model's batches of which samples are missing, and which those are."""
        # What a kill left before the first picture is of nobody.
        begun = any(_NAME.fullmatch(path.name) for path in folder.iterdir())
        if begun and (folder / ABOUT).read_bytes() != manifest:
            raise ValueError(
                f"{folder} holds other samples; repeat their options to go on with them, or choose another folder"
            )
        write_atomically(folder / ABOUT, manifest)
        missing: list[tuple[int, list[int]]] = []
        for number in numbers:
            if indices := _lacking(folder, names_of(number)):
                if not missing:
                    # One of each shows what all need.
                    names = names_of(number)
                    drawn[number] = sampler.samples(range(min(names), max(names) + 1))
                    needs = drawn[number][0].nbytes * plan.count
                    check_disk(folder, needs, f"{plan.count:,} images", "try fewer --samples")
                missing.append((number, indices))
        return missing

    with _only_writer(folder) if sharing.leads else nullcontext():
        sharing.agree({**about, **dataclasses.asdict(plan), "class names": list(class_names)})
        missing = sharing.from_leader(begin)
        sharing.sees(folder)
        skipped = plan.count - sum(len(indices) for _, indices in missing)
        done = skipped
        for number, indices in sharing.mine(missing):
            sharing.begins(f"sampling {indices[0]} to {indices[-1]}")
            names = names_of(number)
            found = drawn.pop(number) if number in drawn else sampler.samples(range(min(names), max(names) + 1))
            images = dict(zip(names, found, strict=True))
            for index in indices:
                write_png(folder / names[index], images[index])
            done += len(indices)
            yield Progress(done=done, skipped=skipped, total=plan.count)
        sharing.meet()
        yield Progress(done=plan.count, skipped=skipped, total=plan.count)


def _lacking(folder: Path, names: Mapping[int, str]) -> list[int]:
    """Indices of the samples, by name, that the folder has not, or not whole."""
    return [index for index, name in names.items() if not _is_whole(folder / name)]


def count_images(folder: Path) -> int:
    """How many whole samples a folder holds."""
    if not folder.is_dir():
        return 0
    return sum(bool(_NAME.fullmatch(path.name)) and _is_whole(path) for path in folder.iterdir())


def first_images(folder: Path, plan: SamplePlan, indices: range, trained: Trained) -> NDArray[np.uint8]:
    """(N, H, W, 3) uint8 of samples that `sample_to_folder` wrote."""
    names = [
        sample_name(index, label, trained.class_names, trained.num_classes)
        for index, label in zip(indices, plan.labels(indices), strict=True)
    ]
    return np.stack([read_png(folder / name) for name in names])


def read_png(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of a file of 8 bits a channel, in colour or grey."""
    with Image.open(path, formats=["PNG"]) as image:
        if image.mode not in ("RGB", "L"):
            raise ValueError(f"{path} must be a PNG of 8 bits, RGB or grey; its mode is {image.mode}")
        return np.asarray(image.convert("RGB"))


def _is_whole(path: Path) -> bool:
    """Whether a file is there with the end that a PNG has; one that was cut by something else is made again."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_END), 2)
            return file.read() == _END
    except OSError:
        return False
