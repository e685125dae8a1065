"""The options of ``train`` as a TOML file: written into every run, read back for another one, or to go on.

A key is an option's name without its dashes in front: ``lr = 3e-4``, ``image-size = 64``.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer

from dig.commands.common import refusing
from dig.family import BACKEND, closest, nearest
from dig.fields import expected, fits
from dig.helping import LIBRARY
from dig.messages import describe
from dig.registry import parse_name
from dig.spec import ModelSpec

OPTIONS_NAME = "config.toml"
UNWRITTEN = ("context", "out", "config", "resume", "dry_run", "quiet")
"""Of ``train``: what is of one command, and not of the run."""
_PATHS = ("data", "vae", "init")
"""Options that may name files: written as they are found from any folder."""


def option_types(command: Callable[..., Any]) -> dict[str, Any]:
    """Type of every option of a command that may stand in a file, by the name of its parameter."""
    hints = get_type_hints(command)
    return {name: hint for name, hint in hints.items() if name not in ("return", *UNWRITTEN) or name == "out"}


def read_options(path: Path, command: Callable[..., Any]) -> dict[str, Any]:
    """The options that a file gives, by the names of a command's parameters.

    Raises:
        ValueError: It is no TOML, or has a key that is no option, or a value that the option can't take.
        OSError: It can't be read.
    """
    try:
        content = tomllib.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no file of options in TOML: {describe(error)[:200]}") from None
    types = option_types(command)
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name in UNWRITTEN and name not in types and name != "context":
            raise ValueError(f"{path}: {key!r:.80} is of the command line alone; leave it out of the file")
        if name not in types:
            if isinstance(value, dict):
                raise ValueError(
                    f"{path}: [{key:.80}] begins a table; options stand in none, as: lr = 3e-4. Leave that line out"
                )
            known = [option.replace("_", "-") for option in types]
            # What the library calls some of them is meant too.
            meant = LIBRARY.get(nearest(name, LIBRARY) or "", key).replace("_", "-")
            raise ValueError(f"{path}: there is no option {key!r:.80}: {closest(meant, known)}")
        if not _takes(value, types[name]):
            raise ValueError(f"{path}: {key} must be {expected(types[name])}; got {_as_toml(value):.80}")
        found[name] = value
    return found


def _as_toml(value: Any) -> str:
    """A value for a message, as the file has it."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _takes(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_takes(value, part) for part in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_takes(one, get_args(hint)[0]) for one in value)
    return fits(value, str if hint is Path else hint)


def write_options(values: Mapping[str, Any], comments: Mapping[str, str]) -> bytes:
    """Options as a file that `read_options` takes; those that are None, and so the default, are left out.

    Args:
        values: By the names of the command's parameters.
        comments: To stand behind a value.
    """
    lines = [
        "# The options of this run. python -m dig train --resume THIS_FOLDER goes on with it;",
        "# python -m dig train --config THIS_FILE --out ANOTHER_FOLDER begins another one with them.",
    ]
    for name, value in values.items():
        if value is None or name in UNWRITTEN:
            continue
        text = _toml(Path(value).resolve() if name in _PATHS and Path(value).exists() else value)
        key = name.replace("_", "-")
        if text is None:
            lines.append(f"# {key} is no text in UTF-8 and has to be given again")
            continue
        comment = f"  # {comments[name]}" if name in comments else ""
        lines.append(f"{key} = {text}{comment}")
    return ("\n".join(lines) + "\n").encode()


def _toml(value: Any) -> str | None:
    """A value as TOML writes it, which is JSON but for DEL; None of text that is no Unicode, as file names may be."""
    if isinstance(value, list | tuple):
        parts = [_toml(one) for one in value]
        return None if None in parts else f"[{', '.join(part for part in parts if part is not None)}]"
    text = json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return None if re.search(r"[\ud800-\udfff]", text) else text


def load_config(context: typer.Context, path: Path | None, command: Callable[..., Any]) -> None:
    """Make a file's options the defaults of a command."""
    if path is None:
        return
    with refusing():
        context.default_map = {**(context.default_map or {}), **read_options(path, command)}


def load_run(context: typer.Context, folder: Path | None, command: Callable[..., Any]) -> None:
    """Make the options of a run the defaults of a command: those that it was begun with, as its own file has them.

    A run of an earlier version, or of the library's, has no such file: then its record of the run says all of them but
    where the data lie.
    """
    if folder is None:
        return
    with refusing():
        from dig.training.resuming import recorded_config

        begun = recorded_config(folder)
        if begun is None:
            raise ValueError(
                f"{folder} holds no run to go on with: it has no config.json; begin one with --out {folder}"
            )
        path = folder / OPTIONS_NAME
        found = options_of(begun) | (read_options(path, command) if path.is_file() else {})

    def where_the_data_lie() -> None:
        with refusing():
            raise ValueError(f"{folder} doesn't say where its data lie: give --data with --resume")

    # Called only where the command line has none.
    context.default_map = {"data": where_the_data_lie, **found, "out": folder}


def options_of(config: Any) -> dict[str, Any]:
    """The options that a `TrainConfig` says; where it runs is left to the device that goes on with it."""
    renamed = {"learning_rate": "lr", "lora_targets": "lora_target"}
    left_out = ("model", "data", "device", "execution", "execution_reason", "init", "lora_whole")
    options = {
        renamed.get(name, name): list(value) if isinstance(value, tuple) else value
        for name, value in vars(config).items()
        if name not in left_out
    }
    options["log"] = ",".join(config.log)
    data = config.data
    if data.latent_scale is None:
        options |= {"image_size": data.shape[1], "channels": data.shape[0]}
    return options | {"model": model_text(config.model, config.device), "mirror": data.mirror}


def model_text(spec: ModelSpec, device: str) -> str:
    """A model as a command line names it, without a backend that is its device's own."""
    family = parse_name(spec.name)[0]
    name = spec.name
    if spec.source:
        name = f"{spec.source}{spec.name.removeprefix(family.name)}"
    default = family.default_backend(device) if family.backends else None
    words = [
        f"{option}={value}"
        for option, value in spec.options.items()
        if not (option == BACKEND and value == default) and value != family.options[option][0]
    ]
    return ":".join([name, *words])


def given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, and is no default and of no file."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
