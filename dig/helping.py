"""What ``--help`` says beside its options' own words: in which groups they stand, and examples at the end. No torch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import typer
from typer.core import TyperCommand

from dig.messages import naming

LIBRARY = {"learning_rate": "lr", "batch_size": "batch", "lora_targets": "lora_target", "input_size": "image_size"}
"""What the library calls some options."""


@dataclass(frozen=True, kw_only=True)
class Help:
    """Of one command.

    Attributes:
        groups: Heading → the names of its options, as the function calls them, with spaces between them.
        examples: Command lines, the simplest first.
    """

    groups: Mapping[str, str] = field(default_factory=dict)
    examples: tuple[str, ...]

    def heading_of(self, option: str) -> str | None:
        """The group that an option stands in."""
        return next((heading for heading, names in self.groups.items() if option in names.split()), None)


def examples_text(examples: tuple[str, ...], title: str = "Examples") -> str:
    """The end of a help page; typer keeps paragraphs apart, and lines of one together."""
    return "\n\n".join([f"{title}:", *(f"$ {line}" for line in examples)])


def add_help(app: typer.Typer, helps: Mapping[str, Help], first: tuple[str, ...]) -> None:
    """Give commands their groups and examples, and the page of all commands what to type first.

    Args:
        app: Its commands are changed.
        helps: Command → its help.
        first: Command lines for whoever knows nothing yet.
    """
    app.info.epilog = examples_text(first, "Begin with")
    for info in app.registered_commands:
        # Its lines are as wide as source code; a page's are as wide as the terminal.
        said = inspect.getdoc(info.callback) or ""
        info.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in said.split("\n\n"))
        name = info.name or getattr(info.callback, "__name__", "").replace("_", "-")
        if name in helps:
            info.cls = _grouped(helps[name])
            info.epilog = examples_text(helps[name].examples)


def names_of(context: Any) -> dict[str, str]:
    """What arguments are called where their values came from: ``--log-every``, or ``log-every in run.toml``.

    Args:
        context: Of a command, whose parameters have been read.
    """
    file = context.params.get("config") or context.params.get("resume")
    names = {}
    for param in context.command.params:
        if param.param_type_name != "option":
            continue
        source = context.get_parameter_source(param.name)
        in_file = file is not None and source is not None and source.name == "DEFAULT_MAP"
        names[param.name] = f"{param.name.replace('_', '-')} in {file}" if in_file else max(param.opts, key=len)
    # The library's names for the same.
    return names | {theirs: names[ours] for theirs, ours in LIBRARY.items() if ours in names}


def _grouped(said: Help) -> type[TyperCommand]:
    """A command whose options stand in groups; those that nobody put into one stay under typer's heading."""

    # Groups stand in the order of their table, and the options of one in its order too.
    order = [name for names in said.groups.values() for name in names.split()]

    class Grouped(TyperCommand):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            # Arguments have a box of their own, above all options.
            options = [option for option in self.params if option.param_type_name == "option"]
            for option in options:
                option.rich_help_panel = said.heading_of(option.name or "")  # type: ignore[attr-defined]
            self.params.sort(key=lambda param: order.index(param.name) if param.name in order else len(order))
            headings = [option.rich_help_panel for option in self.params if option in options]  # type: ignore[attr-defined]
            self._last = headings[-1] if headings else None

        def invoke(self, ctx: Any) -> Any:
            """Run it; messages about its arguments name its options."""
            with naming(names_of(ctx)):
                return super().invoke(ctx)

        def get_help_option(self, ctx: Any) -> Any:
            """Last, in the last group: a box of its own would stand above all others."""
            option: Any = super().get_help_option(ctx)
            if option is not None:
                option.rich_help_panel = self._last
            return option

    return Grouped
