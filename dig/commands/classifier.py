"""The command ``classifier``: whose features ``evaluate`` can measure samples with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dig.commands.common import (
    ChannelsOption,
    DataOption,
    DeviceOption,
    ImageSizeOption,
    QuietOption,
    WorkersOption,
    check_file_name,
    interruptible,
    one_device,
    open_data,
    refusing,
)
from dig.launched import place_in_job
from dig.progress import following, open_console

if TYPE_CHECKING:
    from dig.training.data import DataSet


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
    quiet: QuietOption = False,
) -> None:
    """Train the small classifier whose features evaluate can measure samples with.

    One process does it. Under torchrun that is the first one, and the others end at once.
    """
    console = open_console(quiet=quiet)
    with interruptible(lambda: f"nothing is in {out} of this training; the same command begins again"), refusing():
        if place_in_job()[0] > 0:
            return
        import dataclasses

        from dig.evaluation.classifier import (
            Classifier,
            ClassifierSpec,
            accuracy,
            classifier_bytes,
            read_spec,
            train_classifier,
        )
        from dig.memory import check_disk
        from dig.training.data import IdxImages, open_dataset
        from dig.training.data.files import prepare_output, shown, write_or_keep
        from dig.training.data.idx import find_idx
        from dig.training.data.loader import check_workers

        where = one_device(device)
        check_workers(workers)
        # All that may be wrong is looked at before the training, which it would cost.
        check_file_name("--out", out, ".safetensors")
        prepare_output(out)
        if out.exists() and read_spec(out) is None:
            raise ValueError(f"{out} exists and is no classifier; choose another file, or remove it")
        dataset = open_data(data, image_size=image_size, channels=channels)
        if dataset.sample_shape[0] not in (1, 3):
            raise ValueError("the data are latents; a classifier is trained on images")
        test = None
        if test_data is not None:
            test = open_dataset(test_data, image_size=dataset.sample_shape[1], channels=dataset.sample_shape[0])
        elif isinstance(dataset, IdxImages) and find_idx(data, "t10k-images-idx3-ubyte"):
            channels_of, side, _ = dataset.sample_shape
            test = IdxImages(data, split="test", image_size=side, channels=channels_of, class_names=dataset.class_names)
        if test is not None and (test.sample_shape, test.class_names) != (dataset.sample_shape, dataset.class_names):
            raise ValueError(
                f"{test.name} cannot test a classifier of {dataset.name}: it has {_describe(test)}, that "
                f"{_describe(dataset)}"
            )
        spec = ClassifierSpec(shape=dataset.sample_shape, class_names=dataset.class_names)
        size = len(classifier_bytes(Classifier(spec), spec))
        check_disk(out.parent, size, "the classifier's weights", "make room, or choose another place")
        with following(console, f"training {out}", total=None, images=batch) as progress:
            for trained in train_classifier(
                dataset, epochs=epochs, batch=batch, seed=seed, device=where, workers=workers
            ):
                progress.update(trained.step, total=trained.steps)
        model = trained.model
        # Before it is tested: a test that fails costs the figure, not the classifier.
        write_or_keep(out, classifier_bytes(model, model.spec))
        tested, words = None, ", not tested: no --test-data"
        if test is not None:
            tested = accuracy(model, test)
            write_or_keep(out, classifier_bytes(model, dataclasses.replace(model.spec, accuracy=tested.rate)))
            words = f": {tested.rate:.2%} of {test.name} right"
            if tested.unreadable:
                words += f" ({len(tested.unreadable):,} unreadable)"
        if trained.unreadable:
            words += f"; {len(trained.unreadable):,} of {dataset.name} unreadable and replaced by others"
    typer.echo(shown(f"classifier in {out}{words}"))


def _describe(dataset: DataSet) -> str:
    """Shape and classes of a data set, in short."""
    names = ", ".join(dataset.class_names[:5]) + (" and more" if dataset.num_classes > 5 else "")
    return f"samples of {'x'.join(map(str, dataset.sample_shape))} and {dataset.num_classes} classes ({names})"
