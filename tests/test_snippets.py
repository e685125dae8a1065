"""README, CONTRIBUTING and docs: Python runs as it stands, commands parse, links lead on; `test_commands` runs them."""

from __future__ import annotations

import functools
import importlib
import re
import runpy
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main

from tests.page_commands import PAGES, anchor, shown

ROOT = Path(__file__).parent.parent
OWN_TESTS = {("extending.md", "python"), ("training.md", "python")}
"""Snippets of a page, in a language, that have a test of their own: test_extending.py, dig/test_graphs_snippets.py."""
GPU = "<!-- needs a GPU -->"
"""On the line before a Python snippet that only a GPU can run."""
USAGE_ERROR = typer.BadParameter.__base__ or Exception
_BLOCK = re.compile(r"^(?P<before>[^\n]*)\n```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: set[str]) -> list[Any]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            if match["language"] in language and (page.name, match["language"]) not in OWN_TESTS:
                line = text[: match.start("body")].count("\n") + 1
                needs_gpu = match["before"].strip() == GPU
                marks = [pytest.mark.gpu] if needs_gpu else []
                found.append(pytest.param(match["body"], id=f"{page.name}:{line}", marks=marks))
    return found


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("source", blocks({"python"}))
def test_python(source: str) -> None:
    exec(compile(source, "<snippet>", "exec"), {})


def parse(command: Any, words: list[str], parent: Any = None) -> None:
    """Parse as a command line does, without running anything; raises usage errors of click, typer's own or not."""
    if not hasattr(command, "commands"):
        for option in command.params:
            if option.name in ("resume", "config"):
                option.callback = take_without_reading
        with command.make_context(command.name, list(words), parent=parent):
            return
    if words == ["--help"]:
        return
    with command.make_context(command.name, list(words), parent=parent) as context:
        _, chosen, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    assert chosen is not None
    parse(chosen, rest, context)


def take_without_reading(context: Any, _option: Any, value: Any) -> Any:
    """What an option does that reads others from a file: the file of an example is not there."""
    if value is not None:
        context.default_map = {"data": "data", "out": "run"}
    return value


@functools.cache
def module_command(name: str) -> Any:
    """The typer app behind ``python -m name``."""
    module = importlib.import_module("dig.cli" if name == "dig" else name)
    if not hasattr(module, "app"):
        module = importlib.import_module("bench.cli.main" if name == "bench" else f"{name}.__main__")
    return typer.main.get_command(module.app)


@pytest.mark.parametrize("text", [pytest.param(one.text, id=f"{one.page}:{one.line}") for one in shown()])
def test_shell(text: str) -> None:
    """As it is printed, whatever machine it is for; an ellipsis stands for options of the reader's."""
    words = [word for word in shlex.split(text) if word != "..."]
    match words:
        case ["python", "-m", module, *rest]:
            parse(module_command(module), rest)
        case ["torchrun", *rest]:
            from torch.distributed.run import get_args_parser

            # Its own options are read as it reads them: it takes abbreviations of them wherever they stand.
            launched = get_args_parser().parse_args(rest)
            assert launched.module
            parse(module_command(launched.training_script), launched.training_script_args)
        case ["nox", *rest]:
            check_nox(rest)
        case ["pip", "install", *rest]:
            check_extras(rest)
        case ["python", script, *rest] if script.endswith(".py"):
            parse(typer.main.get_command(runpy.run_path(str(ROOT / script))["app"]), rest)
        case ["bash", script, *_]:
            assert (ROOT / script).is_file(), script
        case _:
            pytest.fail(f"nobody knows what {text} starts: teach this test")


def check_names(command: Any, words: list[str]) -> None:
    """Every command and every option that words name must be there; values may be left out."""
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in {name for option in command.params for name in option.opts} | {"--help"}, (
                word
            )
        elif hasattr(command, "commands"):
            assert word in command.commands, word
            command = command.commands[word]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_sentences(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for module, rest in re.findall(r"`python -m ([\w.]+)\s?([^`]*)`", text):
        if module.partition(".")[0] in ("dig", "bench", "reports"):
            check_names(module_command(module), shlex.split(rest))
    for words in re.findall(r"`pip install ([^`]*)`", text):
        check_extras(shlex.split(words))


def check_nox(words: list[str]) -> None:
    """Sessions must be there."""
    source = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    sessions = set(re.findall(r"^@nox\.session.*?\ndef (\w+)\(", source, re.MULTILINE))
    own = words[: words.index("--")] if "--" in words else words
    if "-s" in own:
        asked = [word for word in own[own.index("-s") + 1 :] if not word.startswith("-")]
        assert asked
        assert set(asked) <= sessions, asked
    else:
        assert own == ["-l"]


def check_extras(words: list[str]) -> None:
    """Extras must be there."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    for word in words:
        named = re.fullmatch(rf"(?:\.|{project['name']})\[([\w,]+)\]", word)
        if named:
            assert set(named[1].split(",")) <= project["optional-dependencies"].keys(), word


def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {anchor(heading) for heading in headings}


def lost_links(page: Path) -> list[str]:
    """The links of a page to files or headings that are not there; links to the web are taken on trust."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lost = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    return lost


@pytest.mark.parametrize("page", [*PAGES, ROOT / "results" / "README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    assert lost_links(page) == []


def test_a_lost_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One place, here\n[a](page.md#one-place-here) [b](gone.md) [c](#nowhere) `[d](code)` [e](https://x.y)"
    )
    assert lost_links(page) == ["gone.md", "#nowhere"]


def test_what_is_wrong_is_seen() -> None:
    """The parser is that of the commands: options that aren't there don't pass."""
    for words in (["train", "--dat", "x"], ["trian"], ["sample", "--steps", "many", "--checkpoint", "run"], ["sample"]):
        with pytest.raises(USAGE_ERROR):
            parse(module_command("dig"), words)
    for words in (["trian"], ["train", "--dat"]):
        with pytest.raises(AssertionError):
            check_names(module_command("dig"), words)
    with pytest.raises(AssertionError):
        check_nox(["-s", "testz"])
    with pytest.raises(AssertionError):
        check_extras(["dig-diffusion[gpus]"])
