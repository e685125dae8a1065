"""Every command's help: options in groups, examples that parse, nothing wider than 80 columns or cut off."""

from __future__ import annotations

import functools
import re
import shlex
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from bench.cli import helps as bench_helps
from bench.cli import helps_ops as ops_helps
from bench.cli.main import app as bench_app
from bench.cli.ops import ops as ops_app
from dig.cli import app as dig_app
from dig.commands import helps as dig_helps
from tests.test_snippets import module_command, parse

runner = CliRunner()
APPS = {"dig": (dig_app, dig_helps), "bench": (bench_app, bench_helps), "bench ops": (ops_app, ops_helps)}
COMMANDS = [
    (program, name)
    for program, (app, _) in APPS.items()
    for name, command in typer.main.get_command(app).commands.items()
    if not hasattr(command, "commands")
]


@functools.cache
def command_of(program: str, name: str) -> Any:
    return typer.main.get_command(APPS[program][0]).commands[name]


@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_every_option_stands_in_one_group(program: str, name: str) -> None:
    said = APPS[program][1].HELPS[name]
    named = [word for words in said.groups.values() for word in words.split()]
    assert len(named) == len(set(named))
    options = [option.name for option in command_of(program, name).params]
    assert [option for option in options if option not in named] == []
    for option in command_of(program, name).params:
        heading = said.heading_of(option.name) if option.param_type_name == "option" else None
        assert option.rich_help_panel == heading, option.name
    # In the order of their table, and none beside it: --help stands in the last group.
    assert options == named


@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_the_page_fits_80_columns(program: str, name: str) -> None:
    result = runner.invoke(APPS[program][0], [name, "--help"], terminal_width=80, env={"COLUMNS": "80"})
    assert result.exit_code == 0
    page = result.output
    assert max(map(len, page.splitlines())) <= 80
    boxes = re.findall(r"─ (\w[\w ,-]*) ─", page)
    assert len(boxes) == len(set(boxes))
    assert "Options" not in boxes or not any(
        option.param_type_name == "option" for option in command_of(program, name).params
    )
    assert "…" not in page
    # Paragraphs are as wide as the page: no line of source is kept.
    intro = page.split("╭")[0].split("[OPTIONS]")[-1]
    paragraphs = [part.splitlines() for part in re.split(r"\n\s*\n", intro) if part.strip()]
    assert all(len(line.split()[0]) + len(lines[i].rstrip()) >= 79 for lines in paragraphs
               for i, line in enumerate(lines[1:]) if line.strip())  # fmt: skip
    said = APPS[program][1].HELPS[name]
    for heading in said.groups:
        if any(option.rich_help_panel == heading for option in command_of(program, name).params):
            assert f"─ {heading} ─" in page
    assert "Examples:" in page
    for example in said.examples:
        assert f" $ {example} " in [f"{line.rstrip()} " for line in page.splitlines()]
    # A short default is said by typer, a long one by the help's words.
    for option in command_of(program, name).params:
        if option.name not in ("help",) and not option.required and option.default not in (None, False, True, ""):
            assert re.search(rf"{re.escape(str(option.default))}", page), option.name


@pytest.mark.parametrize("program", APPS)
def test_alone_it_says_what_to_do_first(program: str) -> None:
    app, helps = APPS[program]
    result = runner.invoke(app, [], env={"COLUMNS": "80"})
    said = " ".join(result.output.split())
    assert "Begin with:" in said
    for line in helps.FIRST:
        assert f"$ {line}" in said


EXAMPLES = [
    example
    for _, helps in APPS.values()
    for example in [
        *helps.FIRST,
        *(example for said in helps.HELPS.values() for example in said.examples),
    ]
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_parse(example: str) -> None:
    assert len(example) <= 76  # one line of a page
    _, _, module, *words = shlex.split(example)
    if words != ["COMMAND", "--help"]:
        parse(module_command(module), words)


def test_each_command_has_two_examples() -> None:
    assert all(len(said.examples) == 2 for _, helps in APPS.values() for said in helps.HELPS.values())
    assert set(COMMANDS) == {(program, name) for program, (_, helps) in APPS.items() for name in helps.HELPS}
