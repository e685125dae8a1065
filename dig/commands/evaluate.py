"""The command ``evaluate``: how good samples are."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dig.commands.common import (
    ChannelsOption,
    DataOption,
    DeviceOption,
    DryRunOption,
    ImageSizeOption,
    QuietOption,
    check_file_name,
    interruptible,
    one_device,
    open_data,
    refusing,
)
from dig.commands.drawing import Asked, draw_folder, prepare
from dig.commands.dry_run import NOTHING, tell
from dig.launched import place_in_job
from dig.progress import following, open_console

if TYPE_CHECKING:
    from dig.training.data import DataSet

logger = logging.getLogger(__name__)

NEEDED = 4
"""Images of either kind: precision and recall look at the third neighbour of each."""


def evaluate_command(
    samples: Annotated[
        list[str],
        typer.Option(
            help="npz file or folder of PNG files, as python -m dig sample writes them; may be given repeatedly. With "
            "--checkpoint, how many to make."
        ),
    ],
    data: DataOption,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Make the samples first, as python -m dig sample --images does."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder for them; the same command goes on where it was. Default: evaluation/step-... of the run.",
        ),
    ] = None,
    classes: Annotated[str | None, typer.Option(help="As of sample. Default: all.")] = None,
    sampler: Annotated[str | None, typer.Option(help="As of sample. Default: ddim, or euler.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps. Default: 50.")] = None,
    cfg: Annotated[float, typer.Option(help="Guidance; 1 is none.")] = 1.0,
    cfg_channels: Annotated[str, typer.Option(help="Which noise channels are guided: three or all.")] = "three",
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    weights: Annotated[str | None, typer.Option(help="Of a run: averaged or raw. Default: averaged.")] = None,
    vae: Annotated[str | None, typer.Option(help="Decodes latents.")] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="File of a classifier (python -m dig classifier): a Fréchet distance, not FID.")
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(help="File of torch-fidelity's Inception weights: FID. Needs the extra fid.")
    ] = None,
    reference: Annotated[
        int | None, typer.Option(help="Images of the data set to compare with. Default: as many as there are samples.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Take only so many samples of a file, the first ones. Default: all.")
    ] = None,
    image_size: ImageSizeOption = None,
    channels: ChannelsOption = None,
    append: Annotated[Path | None, typer.Option(help="JSON-lines file to append the result to.")] = None,
    device: DeviceOption = "auto",
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure samples against the data set: Fréchet distance, precision and recall.

    The number has no meaning beside one of other features, another count of images or another data set. Two disjoint
    halves of the data set are compared too, where there are images enough: what a perfect model would get.

    One process does it. Under torchrun that is the first one, and the others end at once.
    """
    console = open_console(quiet=quiet)
    with interruptible(lambda: _kept(checkpoint)), refusing():
        if place_in_job()[0] > 0:
            return
        if (classifier is None) == (inception is None):
            raise ValueError(
                "choose the features: either --classifier, a file that python -m dig classifier makes, or --inception"
            )
        for name, value in (("count", count), ("reference", reference)):
            if value is not None and value < NEEDED:
                raise ValueError(
                    f"{name} must be at least {NEEDED}, for the third neighbour of each image; got {value}"
                )
        if append is not None:
            check_file_name("--append", append, ".jsonl")
            _check_rows(append)
        import torch

        from dig.evaluation.features import (
            ClassifierFeatures,
            DatasetBatches,
            Extractor,
            InceptionFeatures,
            array_batches,
            extract,
        )
        from dig.evaluation.metrics import Gaussian, frechet_distance, precision_recall
        from dig.evaluation.samples import read_samples
        from dig.training.data.files import append_line, shown

        where = torch.device(one_device(device))
        dataset = open_data(data, image_size=image_size, channels=channels)
        extractor: Extractor
        if inception is not None:
            extractor = InceptionFeatures(inception, where)
        else:
            assert classifier is not None
            extractor = ClassifierFeatures(classifier, where)
        if checkpoint is None:
            paths = [Path(word) for word in samples]
            given = {"images": images, "classes": classes, "sampler": sampler, "steps": steps, "vae": vae,
                     "weights": weights, "cfg": cfg if cfg != 1 else None, "seed": seed or None}  # fmt: skip
            if unused := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"--{unused[0]} is of samples that are made: give --checkpoint too")
        else:
            asked = Asked(
                checkpoint=checkpoint,
                samples=_how_many(samples),
                classes=classes,
                sampler=sampler,
                steps=steps,
                cfg=cfg,
                cfg_channels=cfg_channels,
                seed=seed,
                weights=weights,
                vae=vae,
                device=device,
            )
            if isinstance(extractor, ClassifierFeatures):
                extractor.check(dataset.sample_shape, ())
            # A folder may hold more than are asked for.
            count = asked.samples if count is None else count
            paths = [_make(asked, images, dataset, data, channels, classifier, console)]
        # All files first: a wrong one shouldn't end the run between two others.
        sets = [read_samples(path) for path in paths]
        for (pixels, _), path in zip(sets, paths, strict=True):
            if tuple(pixels.shape[1:3]) != dataset.sample_shape[1:] or dataset.sample_shape[0] not in (1, 3):
                raise ValueError(_other_size(pixels.shape[1:3], dataset, data, channels, classifier))
            if len(pixels) < NEEDED:
                raise ValueError(f"precision and recall need more than {NEEDED - 1} images; {path} holds {len(pixels)}")
            if count is not None and len(pixels) < count:
                raise ValueError(f"{path} holds {len(pixels):,} samples, fewer than --count {count:,}")
        if isinstance(extractor, ClassifierFeatures):
            extractor.check(dataset.sample_shape, (pixels for pixels, _ in sets))
            if extractor.spec.class_names != dataset.class_names:
                logger.warning("%s was trained on other classes than those of %s", classifier, dataset.name)
        sizes = {len(pixels) if count is None else count for pixels, _ in sets}
        if len(sizes) > 1 and reference is None:
            raise ValueError(
                "these files hold different numbers of samples; give --reference or --count, so that they are compared "
                "with the same images"
            )
        if reference is not None and reference > len(dataset):
            raise ValueError(f"{dataset.name} holds {len(dataset):,} images, fewer than --reference {reference:,}")
        compared = min(len(dataset), reference if reference is not None else sizes.pop())
        if dry_run:
            tell(
                samples="; ".join(
                    f"{len(images[:count]):,} of {path}" for (images, _), path in zip(sets, samples, strict=True)
                ),
                data=f"{dataset.describe()}; {compared:,} images are compared",
                features=f"{extractor.metric}, {extractor.description}",
                device=str(where),
            )
            typer.echo(NOTHING)
            return
        # One draw, then cut in two: halves that share no image.
        batches = DatasetBatches(dataset, min(len(dataset), 2 * compared))
        with following(console, f"reading {dataset.name}", total=batches.count, unit="image") as progress:
            real = extract(extractor, progress.counting(batches, len), where)
        lost = _tell_unreadable(batches.unreadable)
        if len(real) < max(NEEDED, reference or 0):
            raise ValueError(f"of {dataset.name} only {len(real):,} images can be read{lost}")
        compared = min(compared, len(real))
        shuffled = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0)).to(where)]
        real, other = shuffled[:compared], shuffled[compared : 2 * compared]
        truth = Gaussian.of(real)
        floor = frechet_distance(truth, Gaussian.of(other)) if len(other) == compared else None
        failed = None
        for (pixels, about), path in zip(sets, paths, strict=True):
            with following(console, f"reading {path}", total=len(pixels[:count]), unit="image") as progress:
                generated = extract(extractor, progress.counting(array_batches(pixels[:count]), len), where)
            distance = frechet_distance(truth, Gaussian.of(generated))
            precision, recall = precision_recall(real, generated)
            # At once: what comes after may fail.
            line = (
                (f"{path}: " if len(paths) > 1 else "")
                + f"{extractor.metric}: {_digits(distance)}"
                + (f" (two halves of the data: {_digits(floor)})" if floor is not None else "")
                + f", precision {precision:.3f}, recall {recall:.3f}; {len(generated):,} samples, {compared:,} images "
                f"of the data{lost}, features of {extractor.description}"
            )
            typer.echo(shown(line))
            result: dict[str, Any] = {
                "metric": extractor.metric,
                "features": extractor.description,
                "distance": distance,
                "distance_of_data": floor,
                "precision": precision,
                "recall": recall,
                "samples": len(generated),
                "reference": compared,
                "unreadable_images": len(batches.unreadable),
                "data": dataset.class_names if len(dataset.class_names) <= 20 else len(dataset.class_names),
                "of": about,
            }
            if append is not None:
                try:
                    append_line(append, json.dumps(result))
                except OSError as error:
                    failed = f"cannot append to {append}: {error.strerror}; the results are those printed here"
        if failed:
            raise ValueError(failed)


def _kept(checkpoint: Path | None) -> str:
    return "samples that were made are kept, and the same command goes on" if checkpoint else "nothing was written"


def _how_many(samples: list[str]) -> int:
    """What --samples says beside --checkpoint."""
    if len(samples) != 1 or not (samples[0].isascii() and samples[0].isdecimal() and len(samples[0]) < 10):
        raise ValueError(f"with --checkpoint, --samples is how many to make; got {', '.join(samples)[:80]}")
    if int(samples[0]) < NEEDED:
        raise ValueError(f"samples must be at least {NEEDED}, for the third neighbour of each; got {samples[0]}")
    return int(samples[0])


def _make(
    asked: Asked,
    images: Path | None,
    dataset: DataSet,
    data: Path,
    channels: int | None,
    classifier: Path | None,
    console: Console,
) -> Path:
    """Make samples in a folder, which is returned: of a run in a folder of its own, a checkpoint each."""
    from dig.sampling.folder import open_folder

    drawing = prepare(asked, console)
    step = drawing.found.step
    if images is None:
        if step is None or not asked.checkpoint.is_dir():
            raise ValueError(f"{asked.checkpoint} is no run: say with --images which folder its samples go into")
        images = asked.checkpoint / "evaluation" / f"step-{step:08d}"
    size = drawing.found.image_size
    if drawing.decoder is None and size != dataset.sample_shape[1:]:
        raise ValueError(_other_size(size, dataset, data, channels, classifier))
    open_folder(images)
    draw_folder(drawing, drawing.runner(console), images, console)
    return images


def _check_rows(path: Path) -> None:
    """Raise ValueError unless lines of JSON can be appended to a file: samples given by mistake would be spoilt."""
    from dig.training.data.files import prepare_output

    prepare_output(path)
    if path.exists():
        with path.open("ab+") as file:
            file.seek(0)
            if file.read(1) not in (b"", b"{"):
                raise ValueError(f"{path} holds no lines of JSON; --append takes a file of results, or a new one")


def _tell_unreadable(unreadable: Mapping[str, str]) -> str:
    """Warn of images that could not be read, by name, and say how many for the line of results."""
    if not unreadable:
        return ""
    from dig.training.data.files import shown

    some = ", ".join(f"{shown(name)} ({reason})" for name, reason in list(unreadable.items())[:5])
    more = f" and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
    logger.warning(
        "unreadable images of the data, which are not among those compared: %d: %s%s", len(unreadable), some, more
    )
    return f" ({len(unreadable):,} more unreadable)"


def _other_size(
    size: tuple[int, ...], dataset: DataSet, data: Path, channels: int | None, classifier: Path | None
) -> str:
    """What to say where samples of this size can't be compared with the data as they were opened; advice that helps."""
    from dig.evaluation.classifier import read_spec

    shape = dataset.sample_shape
    if shape[0] not in (1, 3):
        return "the data are latents; --data takes the images that they were made of"
    said = f"the samples are {size[0]}x{size[1]}, the data {shape[1]}x{shape[2]}"
    if size[0] != size[1]:
        return f"{said}, and always square; measure square samples"
    try:
        open_data(data, image_size=size[0], channels=channels)
    except ValueError as error:
        return f"{said}, which can't be read as {size[0]}x{size[1]} ({error}); measure samples of another size"
    spec = read_spec(classifier) if classifier is not None else None
    if spec is None or spec.shape[1:] == tuple(size):
        return f"{said}; give --image-size {size[0]}"
    takes = "x".join(map(str, spec.shape[1:]))
    return (
        f"{said}, and the classifier takes {takes} alone; train another with --image-size {size[0]} and evaluate with "
        f"the same, or measure samples of {takes}"
    )


def _digits(distance: float) -> str:
    """A distance for readers: what is next to nothing must not look like nothing."""
    return f"{distance:.3f}" if distance >= 0.1 or distance == 0 else f"{distance:.3g}"
