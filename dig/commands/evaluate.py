"""The commands ``evaluate`` and ``classifier``: how good samples are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dig.commands.common import (
    ChannelsOption,
    DataOption,
    DeviceOption,
    ImageSizeOption,
    WorkersOption,
    one_device,
    open_console,
    open_data,
    progress_bar,
    refusing,
)


def evaluate_command(
    samples: Annotated[
        list[Path],
        typer.Option(help="npz file of samples, as python -m dig sample writes it; may be given repeatedly."),
    ],
    data: DataOption,
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
) -> None:
    """Measure samples against the data set: Fréchet distance, precision and recall.

    The number has no meaning beside one of other features, another count of images or another data set. Two disjoint
    halves of the data set are compared too, where there are images enough: what a perfect model would get.
    """
    open_console()
    with refusing():
        if (classifier is None) == (inception is None):
            raise ValueError("choose the features: either --classifier or --inception")
        import torch

        from dig.evaluation.features import (
            ClassifierFeatures,
            Extractor,
            InceptionFeatures,
            array_batches,
            dataset_batches,
            extract,
            read_samples,
        )
        from dig.evaluation.metrics import Gaussian, frechet_distance, precision_recall

        where = torch.device(one_device(device))
        extractor: Extractor
        if inception is not None:
            extractor = InceptionFeatures(inception, where)
        else:
            assert classifier is not None
            extractor = ClassifierFeatures(classifier, where)
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1; got {count}")
        dataset = open_data(data, image_size=image_size, channels=channels)
        # All files first: a wrong one shouldn't end the run between two others.
        sets = [read_samples(path) for path in samples]
        for (images, _), path in zip(sets, samples, strict=True):
            _check_images(images.shape[1:3], dataset.sample_shape)
            if count is not None and len(images) < count:
                raise ValueError(f"{path} holds {len(images):,} samples, fewer than --count {count:,}")
        sizes = {len(images) if count is None else count for images, _ in sets}
        if len(sizes) > 1 and reference is None:
            raise ValueError(
                "these files hold different numbers of samples; give --reference or --count, so that they are compared "
                "with the same images"
            )
        compared = min(len(dataset), reference if reference is not None else sizes.pop())
        # One draw, then cut in two: halves that share no image.
        doubled = min(len(dataset), 2 * compared)
        real = extract(extractor, dataset_batches(dataset, doubled), where)
        shuffled = real[torch.randperm(doubled, generator=torch.Generator().manual_seed(0)).to(where)]
        real, other = shuffled[:compared], shuffled[compared : 2 * compared]
        truth = Gaussian.of(real)
        floor = frechet_distance(truth, Gaussian.of(other)) if len(other) == compared else None
        lines = []
        for images, about in sets:
            generated = extract(extractor, array_batches(images[:count]), where)
            distance = frechet_distance(truth, Gaussian.of(generated))
            precision, recall = precision_recall(real, generated)
            result: dict[str, Any] = {
                "metric": extractor.metric,
                "features": extractor.description,
                "distance": distance,
                "distance_of_data": floor,
                "precision": precision,
                "recall": recall,
                "samples": len(generated),
                "reference": compared,
                "data": dataset.class_names if len(dataset.class_names) <= 20 else len(dataset.class_names),
                "of": about,
            }
            if append is not None:
                append.parent.mkdir(parents=True, exist_ok=True)
                with append.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
            lines.append(
                f"{extractor.metric}: {distance:.3f}"
                + (f" (two halves of the data: {floor:.3f})" if floor is not None else "")
                + f", precision {precision:.3f}, recall {recall:.3f}; {len(generated):,} samples, {compared:,} images "
                f"of the data, features of {extractor.description}"
            )
    for path, line in zip(samples, lines, strict=True):
        typer.echo(f"{path}: {line}" if len(samples) > 1 else line)


def _check_images(size: tuple[int, ...], shape: tuple[int, int, int]) -> None:
    if shape[0] not in (1, 3):
        raise ValueError("the data are latents; --data takes the images that they were made of")
    if tuple(size) != shape[1:]:
        raise ValueError(
            f"the samples are {size[0]}x{size[1]}, the data {shape[1]}x{shape[2]}; give --image-size {size[0]}"
        )


def classifier_command(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="File of the classifier, .safetensors.")],
    test_data: Annotated[
        Path | None,
        typer.Option(help="Images to test it with. Default: the test split, of idx files; else none."),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 4.0,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the images.")] = 0,
    image_size: ImageSizeOption = None,
    channels: ChannelsOption = None,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
) -> None:
    """Train the small classifier whose features evaluate can measure samples with."""
    console = open_console()
    with refusing():
        if epochs <= 0 or batch < 2:
            raise ValueError(f"epochs must be above 0 and batch at least 2; got {epochs:g} and {batch}")
        import dataclasses

        from dig.evaluation.classifier import accuracy, save_classifier, train_classifier
        from dig.training.data import IdxImages, open_dataset
        from dig.training.data.idx import find_idx

        where = one_device(device)
        dataset = open_data(data, image_size=image_size, channels=channels)
        if dataset.sample_shape[0] not in (1, 3):
            raise ValueError("the data are latents; a classifier is trained on images")
        with progress_bar(console) as bar:
            task = bar.add_task(f"training {out}", total=None)
            for step, steps, trained in train_classifier(
                dataset, epochs=epochs, batch=batch, seed=seed, device=where, workers=workers
            ):
                bar.update(task, total=steps, completed=step)
                model = trained
        test = None
        if test_data is not None:
            test = open_dataset(test_data, image_size=image_size, channels=channels)
        elif isinstance(dataset, IdxImages) and find_idx(data, "t10k-images-idx3-ubyte"):
            channels_of, side, _ = dataset.sample_shape
            test = IdxImages(data, split="test", image_size=side, channels=channels_of)
        rate = accuracy(model, test) if test is not None else None
        save_classifier(model, dataclasses.replace(model.spec, accuracy=rate), out)
    tested = f": {rate:.2%} of {test.name} right" if test is not None and rate is not None else ", not tested"
    typer.echo(f"classifier in {out}{tested}")
