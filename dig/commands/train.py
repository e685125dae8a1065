"""The command ``train``."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from dig.commands.beginning import Beginning
from dig.commands.common import (
    ChannelsOption,
    DeviceOption,
    DryRunOption,
    ImageSizeOption,
    QuietOption,
    WorkersOption,
    check_folder_name,
    choose_precision,
    open_data,
    open_decoder,
    refusing,
)
from dig.commands.dry_run import rehearse_training
from dig.commands.job import HANG_SECONDS, HangOption, ParallelOption, SendingOption, working_together
from dig.commands.places import find_place
from dig.commands.run_options import OPTIONS_NAME, given, load_config, load_run, option_types, write_options
from dig.launched import follows, place_in_job
from dig.memory import peak_memory
from dig.progress import following, open_console
from dig.spec import ModelSpec

if TYPE_CHECKING:
    from rich.console import Console

    from dig.training.config import TrainConfig
    from dig.training.team import Team


class _Received:
    """What signals asked of a run.

    Attributes:
        stop: Whether to save and end.
        save: Whether to save and go on.
    """

    def __init__(self) -> None:
        self.stop = False
        self.save = False

    def take_save(self) -> bool:
        """Whether to save; asked for once."""
        asked, self.save = self.save, False
        return asked


@contextmanager
def _interrupts() -> Iterator[_Received]:
    """Collect SIGINT, SIGTERM, SIGHUP and SIGUSR1 instead of being ended by them; a second SIGINT ends it after all."""
    received = _Received()

    def receive(number: int, _frame: Any) -> None:
        if received.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGUSR1:
            received.save = True
        else:
            received.stop = True

    # One that is ignored, as SIGHUP under nohup, stays so.
    heeded = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    numbers = [number for number in heeded if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _config(context: typer.Context, value: Path | None) -> Path | None:
    load_config(context, value, train_command)
    return value


def _resume(context: typer.Context, value: Path | None) -> Path | None:
    load_run(context, value, train_command)
    return value


@contextmanager
def _told_what_is_sent(context: typer.Context, sending: str, console: Console) -> Iterator[None]:
    """See that copies are not asked for in vain: a process alone sends nothing.

    Before it joins a job: of ``--parallel ddp`` it may be one alone, whose errors end the process.

    Raises:
        ValueError: They were asked for on the command line. A run of several processes goes on with one.
    """
    if sending == "copies" and place_in_job()[1] == 1:
        if given(context, "sending"):
            raise ValueError(
                "--sending copies is between several processes, and this one is alone: start them with torchrun, or "
                "give --sending auto"
            )
        console.print("nothing is sent, by copies or else: this process is alone")
    yield


def train_command(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Class folders (cat/1.jpg), idx files (Fashion-MNIST's), or latent shards from encode. Needed "
            "without --resume."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; with checkpoints in it, the run goes on from the newest whole one. Needed "
            "without --resume."
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Family-size/patch, with options after colons: DiG-S/2, DiG-S/2:fla, DiG-B/2:variant=release, "
            "Flash-DiT-S/2:sdpa-cudnn; your own by import path: my_package.my_module:MyFamily-S/2. "
            "Default backend: triton for DiG and mamba-ssm for DiS on a GPU, "
            "else the one that runs anywhere."
        ),
    ] = "DiG-S/2",
    steps: Annotated[int, typer.Option(help="Optimizer steps in all.")] = 400_000,
    batch: Annotated[int | None, typer.Option(help="Images a step. Default: 256; on a CPU 8.")] = None,
    accumulate: Annotated[int, typer.Option(help="Equal parts that a step's batch goes through the model in.")] = 1,
    loss: Annotated[str, typer.Option(help="hybrid (noise and learned variance) or flow-matching.")] = "hybrid",
    lr: Annotated[float, typer.Option(help="Learning rate at its highest.")] = 1e-4,
    schedule: Annotated[str, typer.Option(help="Learning rate: constant, or cosine down to 0.")] = "constant",
    warmup: Annotated[int, typer.Option(help="Steps over which the learning rate rises.")] = 0,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for no clipping.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.0,
    ema: Annotated[float, typer.Option(help="Decay of the weights' moving average, a step, at its highest.")] = 0.9999,
    ema_warmup: Annotated[
        bool | None,
        typer.Option(
            "--ema-warmup/--no-ema-warmup",
            help="Let that decay rise from the first step on: (1 + n) / (10 + n). Default: yes; as it was begun, when "
            "a run goes on.",
        ),
    ] = None,
    label_dropout: Annotated[float, typer.Option(help="Share of labels dropped, for guidance.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of weights, data order, noise and all else that is drawn.")] = 0,
    image_size: ImageSizeOption = None,
    channels: ChannelsOption = None,
    mirror: Annotated[
        bool | None,
        typer.Option("--mirror/--no-mirror", help="Mirror half of the images. Default: class folders and latents."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 (autocast) or fp32. Default: bf16 on a GPU.")] = None,
    device: DeviceOption = "auto",
    execution: Annotated[
        str,
        typer.Option(
            help="eager; compile (the model through torch.compile); graph (the step as a CUDA graph); auto: as the run "
            "began, else graph on a GPU and eager on a CPU."
        ),
    ] = "auto",
    checkpoint_blocks: Annotated[
        bool,
        typer.Option("--checkpoint-blocks", help="Compute each block's activations again instead of keeping them."),
    ] = False,
    deterministic: Annotated[
        bool, typer.Option(help="Deterministic algorithms, so that a resumed run repeats bit for bit on a GPU too.")
    ] = True,
    log_every: Annotated[int, typer.Option(help="Steps to a line of the log.")] = 50,
    save_every: Annotated[int, typer.Option(help="Steps to a checkpoint.")] = 1000,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep.")] = 3,
    grid_every: Annotated[int, typer.Option(help="Steps to a grid of samples; 0 for none.")] = 1000,
    grid_steps: Annotated[int, typer.Option(help="Sampling steps of a grid.")] = 50,
    grid_cfg: Annotated[float, typer.Option(help="Guidance of a grid.")] = 1.5,
    vae: Annotated[str | None, typer.Option(help="VAE that decodes the grids of a model of latents.")] = None,
    workers: WorkersOption = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            callback=_resume,
            is_eager=True,
            help="Go on with the run in this folder: no other option is needed. Steps, logs, grids, checkpoints and "
            "workers may be given anew; device, backend and execution too, with other last bits.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=_config,
            is_eager=True,
            help="TOML file of options (lr = 3e-4); those on the command line win. Every run writes its own: "
            "config.toml.",
        ),
    ] = None,
    log: Annotated[
        str,
        typer.Option(
            help="Where the log goes, separated by commas: tensorboard, jsonl, wandb (offline unless "
            "WANDB_MODE says otherwise)."
        ),
    ] = "tensorboard,jsonl",
    init: Annotated[
        Path | None,
        typer.Option(
            help="Weights to begin with: a run (its averaged weights), or whatever else sample --checkpoint takes. "
            "Other classes and another image size are fitted. --model is then the file's by default."
        ),
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(help="Parameters that are not trained, as a pattern of names: 'blocks.0.*'; repeatable."),
    ] = None,
    lora: Annotated[
        int, typer.Option(help="Rank of low-rank adapters to train instead of the weights of --init; 0 for none.")
    ] = 0,
    lora_target: Annotated[
        list[str] | None,
        typer.Option(
            help="Linear layers that get an adapter, as a pattern of names: '*.attn.*'; repeatable. Default: all of "
            "every block."
        ),
    ] = None,
    parallel: ParallelOption = "auto",
    sending: SendingOption = "collectives",
    hang_timeout: HangOption = HANG_SECONDS,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a model on a folder of images, idx files or latent shards.

    Stopped by Ctrl-C, SIGTERM, SIGHUP, SIGKILL or a power cut, it goes on with --resume and its folder, or with the
    same command, bit for bit as if it had not been stopped. --steps may then be raised (with a constant learning rate),
    and whatever has to do with logs, grids and checkpoints may be changed. SIGUSR1 makes it save a checkpoint and go
    on.

    Under torchrun, several processes train as one would at the same --batch, which is of all of them together.
    """
    console = open_console(quiet=quiet or follows())
    with (
        refusing(),
        _told_what_is_sent(context, sending, console),
        working_together(device, parallel=parallel, sending=sending, hang_seconds=hang_timeout, trains=True) as job,
    ):
        if job is not None and dry_run:
            raise ValueError("--dry-run is of one process: leave out torchrun and --parallel")
        if data is None or out is None:
            missing = [option for option, value in (("--data", data), ("--out", out)) if value is None]
            raise ValueError(
                f"give {' and '.join(missing)}: a run needs --data IMAGES and --out RUN; --resume RUN goes on with one "
                "that has begun, and needs neither"
            )
        check_folder_name("--out", out)
        if resume is not None and config is not None:
            raise ValueError("--resume takes the run's own options; --config begins another run")
        if resume is not None and out.resolve() != resume.resolve():
            raise ValueError(
                f"--resume goes on in {resume}; leave out --out, or begin another run with its options: "
                f"--config {resume / OPTIONS_NAME} --out {out}"
            )
        dataset = open_data(data, image_size=image_size, channels=channels, mirror=mirror)
        if data.is_dir() and out.resolve().is_relative_to(data.resolve()):
            raise ValueError(f"{out} lies in the data's own folder, {data}, and would be data; choose another --out")
        going_on = None
        if resume is not None:
            from dig.training.resuming import recorded_config

            going_on = recorded_config(resume)
        if lora_target and not lora:
            raise ValueError("--lora-target chooses layers for --lora, which gives their adapters' rank")
        beginning = Beginning(init, out)
        model = beginning.model(context, model, device)
        place = find_place(context, model=model, device=device, execution=execution, going_on=going_on)
        where = place.device
        precision = choose_precision(dtype, where)
        # Only now: torch takes seconds to import, and a wrong name shouldn't.
        from dig.training.config import DataSpec, TrainConfig, choose_execution, default_batch
        from dig.training.lora import TARGETS
        from dig.training.needs import draws_in_training
        from dig.training.resuming import steps_behind
        from dig.training.trainer import Status, Trainer

        begun = beginning.begun
        batch = default_batch(where, begun) if batch is None else batch
        spec = ModelSpec(
            name=place.name,
            options=place.options,
            input_size=dataset.sample_shape[1:],
            in_channels=dataset.sample_shape[0],
            num_classes=dataset.num_classes,
            source=place.source,
        )
        asked = place.asked["execution"]
        redraws = checkpoint_blocks and where == "cuda" and asked == "auto" and draws_in_training(spec)
        chosen, reason = choose_execution(asked, device=where, begun=begun, redraws=redraws)
        team: Team | None = None
        if job is not None:
            from dig.training.parallel.team import Together

            team = Together(job.ranks, job.kind, job.watch, job.sending)
        data_spec = DataSpec.of(dataset)
        first = beginning.weights(spec, data_spec, device=where, loss=loss, seed=seed)
        run = TrainConfig(
            model=spec,
            data=data_spec,
            device=cast(Any, where),
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            seed=seed,
            loss=cast(Any, loss),
            label_dropout=label_dropout,
            learning_rate=lr,
            schedule=cast(Any, schedule),
            warmup=warmup,
            clip=clip,
            weight_decay=weight_decay,
            ema=ema,
            ema_warmup=ema_warmup if ema_warmup is not None else begun is None or begun.ema_warmup,
            dtype=cast(Any, precision),
            execution=cast(Any, chosen),
            execution_reason=reason,
            checkpoint_blocks=checkpoint_blocks,
            deterministic=deterministic,
            init=beginning.sha256(first, resuming=resume is not None),
            freeze=tuple(freeze or ()),
            lora=lora,
            lora_targets=tuple(lora_target or TARGETS) if lora else (),
            lora_whole=beginning.lora_whole(first, spec) if lora else (),
            log_every=log_every,
            save_every=save_every,
            keep=keep,
            grid_every=grid_every,
            grid_steps=grid_steps,
            grid_cfg=grid_cfg,
            log=tuple(word.strip() for word in log.split(",") if word.strip()),
        )
        decoder = open_decoder(
            vae,
            data_spec.latent_scale,
            where,
            channels=data_spec.shape[0],
            made_by=data_spec.vae_sha256,
        )
        state = None if first is None else first.state
        for note in first.notes if first is not None else ():
            console.print(note)
        if dry_run:
            rehearse_training(run, dataset, done=steps_behind(out), workers=workers, first=state)
            return
        console.print(f"{run.model.describe()}\n{dataset.describe()}")
        console.print(f"execution {chosen}: {reason}")
        if grid_every and data_spec.latent_scale is not None and decoder is None:
            console.print("no grids of samples: the data are latents, and no --vae was given to decode them")
        elif grid_every and grid_cfg != 1 and not label_dropout:
            console.print("grids of samples without guidance: with --label-dropout 0 there is nothing to guide against")
        decode = decoder.decode if decoder is not None else None
        with _interrupts() as received:
            elsewhere = resume is not None
            trainer = Trainer(
                run, dataset, out, decode=decode, workers=workers, first=state, elsewhere=elsewhere, team=team
            )
            del first, state
            if not follows():
                _write_options(context, out, run, {**place.asked, "init": beginning.path})
            finished = trainer.step >= steps
            if trainer.step and not finished:
                console.print(f"going on from step {trainer.step} of {steps} in {out}")
            with following(
                console,
                f"training into {out}",
                total=steps,
                done=trainer.step,
                images=batch,
                memory=lambda: peak_memory(where),
            ) as progress:

                def report(status: Status) -> None:
                    progress.update(status.step, figures="" if math.isnan(status.loss) else f"loss {status.loss:.4f}")

                done = trainer.run(stop=lambda: received.stop, save=received.take_save, report=report)
    if follows():
        raise typer.Exit(130 if done < steps else 0)
    if done < steps:
        how = f"go on with the same command, or --resume {out}"
        typer.echo(f"stopped: {done} of {steps} steps are in {out}; {how}", err=True)
        raise typer.Exit(130)
    if finished:
        more = "a larger --steps" if schedule == "constant" else "another folder: this schedule is done"
        typer.echo(f"{out} is finished already, at step {done}; to train on, give {more}")
        return
    typer.echo(f"{done} steps in {out}, {trainer.seconds:.0f} s of training; the last checkpoint holds them")


def _write_options(context: typer.Context, out: Path, run: TrainConfig, found: Mapping[str, Any]) -> None:
    """Write the options of a run into its folder, with what those became that were left open."""
    from dig.training.data.files import write_atomically

    # In one order, whatever was given.
    values = {name: context.params.get(name) for name in option_types(train_command)}
    values |= {**found, "batch": run.batch, "dtype": run.dtype, "mirror": run.data.mirror, "ema_warmup": run.ema_warmup}
    if run.data.latent_scale is None:
        values |= {"image_size": run.data.shape[1], "channels": run.data.shape[0]}
    comments = {
        "model": ", ".join(f"{name}={value}" for name, value in run.model.options.items()),
        "device": run.device,
        "execution": f"{run.execution}: {run.execution_reason}",
    }
    write_atomically(out / OPTIONS_NAME, write_options(values, comments))
