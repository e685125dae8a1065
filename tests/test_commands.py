"""Every command that README, CONTRIBUTING and docs show is run: here, by a test or session that is named, or on a GPU.

``tests/page_stories.py`` declares which of these.
"""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest
import torch

from dig.environment import ROOT
from tests.page_commands import PAGES, Command, in_sentences, kind, read_page, shown, split
from tests.page_stories import (
    BEFORE,
    ELSEWHERE,
    IN_SENTENCES,
    IN_SENTENCES_GPU,
    OUTPUTS,
    SMALL,
    STORIES,
    check,
    copy_project,
    run_here,
    run_in_shell,
)


def runs(command: Command) -> bool:
    """Whether a story has to run it."""
    return not command.needs_gpu and command.text not in ELSEWHERE


def outputs(command: Command, folder: Path) -> dict[str, int]:
    """What a command or its comment names as written, files and folders, each with the time of its newest change."""
    words = split(command.text, folder)
    named = [value for option, value in itertools.pairwise(words) if option in OUTPUTS]
    named += re.findall(r"\bout/[\w./-]+", command.comment)

    def changed(path: Path) -> int:
        return max((one.stat().st_mtime_ns for one in (path, *path.rglob("*")) if one.exists()), default=0)

    return {name: changed(folder / name) for name in named}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if s.processes else n for n, s in STORIES.items()]
)
def test_a_story_runs_in_order(name: str, tmp_path: Path) -> None:
    story = STORIES[name]
    if story.processes:
        copy_project(tmp_path)
    for give in story.given:
        give(tmp_path)
    commands = {block: [one for one in shown() if one.block == block] for block in story.blocks}
    for block, found in commands.items():
        assert found, f"no page has commands at {block}: its heading may have changed"
        for command in filter(runs, found):
            if command.text in BEFORE:
                BEFORE[command.text](tmp_path)
            before = outputs(command, tmp_path)
            run = run_in_shell if story.processes else run_here
            check(command.text, *run(command.text, tmp_path, story.instead))
            missing = [name for name, at in outputs(command, tmp_path).items() if at == before[name]]
            assert not missing, f"{command.place}: {command.text} wrote no {missing}"


def unaccounted(commands: list[Command]) -> list[str]:
    """Messages on the commands that nobody runs and that are not marked."""
    told = {block for story in STORIES.values() for block in story.blocks}
    return [
        f"{command.place}: nobody runs `{command.text}`. Add its block, {command.block!r}, to a story of STORIES in "
        "tests/page_stories.py, or name the test or session that runs it in ELSEWHERE; if only a GPU can, write "
        "`# needs a GPU` behind it, or above it on a line of its own."
        for command in commands
        if runs(command) and command.block not in told
    ]


def test_every_command_is_run_or_marked() -> None:
    if messages := unaccounted(shown()):
        pytest.fail("\n".join(messages))
    texts = {command.text for command in shown()}
    assert texts >= ELSEWHERE.keys(), f"no page has {ELSEWHERE.keys() - texts} any more: take it out of ELSEWHERE"


def test_a_command_that_nobody_runs_is_seen() -> None:
    page = "## New\n```\npython -m dig train --data x  # trains\n\n# needs a GPU:\na\nb # so\n\n"
    page += "c \\\n  d  # needs two GPUs\n```\n```python\nprint()\n```\n```console\n$ e 'f # g' && h#i\n```\n"
    commands = read_page(page, "new.md")
    assert [(one.text, one.needs_gpu, one.block, one.line) for one in commands] == [
        ("python -m dig train --data x", False, "new.md#new", 3),
        ("a", True, "new.md#new", 6),
        ("b", True, "new.md#new", 7),
        ("c d", True, "new.md#new", 10),
        ("e 'f # g'", False, "new.md#new/2", 16),
        ("h#i", False, "new.md#new/2", 16),
    ]
    messages = unaccounted(commands)
    assert [message.partition(":")[0] for message in messages] == [f"new.md, line {line}" for line in (3, 16, 16)]
    assert "Add its block, 'new.md#new', to a story" in messages[0]


def test_blocks_are_where_they_are_looked_for() -> None:
    """A fence that is indented, of tildes, or with more than a language behind it, would hide its commands."""
    hidden = [
        (page.name, line)
        for page in PAGES
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.match(r"\s+```|\s*~~~|````|```\w*[^\w`]", line)
    ]
    assert hidden == []


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def session_source(name: str) -> str:
    """A session's source, with that of the functions of noxfile.py which it calls."""
    path = ROOT / "noxfile.py"
    known = functions(path)
    assert name in known, f"noxfile.py has no session {name}"
    called = {node.id for node in ast.walk(known[name]) if isinstance(node, ast.Name)} & known.keys()
    source = path.read_text()
    return "\n".join(ast.get_source_segment(source, known[each]) or "" for each in sorted({name, *called}))


@pytest.mark.parametrize(("command", "where"), [*ELSEWHERE.items(), *IN_SENTENCES.items()])
def test_who_is_named_is_there(command: str, where: str) -> None:
    path, _, name = where.partition("::")
    file = ROOT / path
    assert file.is_file(), where
    match file.suffix, file.name:
        case ".yml", _:
            source = file.read_text()
            wanted = command.partition(" -- ")[0].split()[2:] if command.startswith("nox") else [command]
            assert all(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", source) for word in wanted), (wanted, where)
        case _, "noxfile.py":
            source = session_source(name)
            extras = re.findall(r"'\.\[([\w,-]+)\]'", command)
            assert "session.install(" in source
            assert all(re.search(rf'extras="[^"]*\b{one}\b|extras\["{one}"\]', source) for one in extras), where
        case _:
            node = functions(file).get(name)
            assert node is not None, where
            # Where the test starts a script, it must be the one that the page shows.
            scripts = re.findall(r"examples/[\w.-]+", command)
            module = file.read_text()
            assert all(Path(script).name in module for script in scripts), where


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize(
    "command",
    [
        *(
            pytest.param(one.text, id=f"{one.page}:{one.line}")
            for one in shown()
            if one.needs_gpu and one.text not in ELSEWHERE
        ),
        *IN_SENTENCES_GPU,
    ],
)
def test_what_is_marked_needs_a_gpu(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one it ends at once and says so; what runs all the same has to be run, not marked."""
    monkeypatch.setitem(SMALL, kind(command), "")
    if command.startswith("nox"):
        session = session_source(command.split()[2])
        command = f"python -m bench {command.split()[2]} {command.partition(' -- ')[2]}"
        if '"python", "-m", "bench"' not in session:
            assert "gpu=True" in session
            return
    status, said = run_here(command, tmp_path)
    refused = status == 2 and "GPU" in said
    assert refused, f"{command} does not say that it needs a GPU: take the mark away, or look why:\n{said[-3000:]}"


def test_commands_in_sentences_are_run_too() -> None:
    """By what they start: a block's command, or one of the tables; the program's name alone is none."""
    known = {kind(command.text) for command in shown()}
    known |= {f"nox -s {name}" for each in known if each.startswith("nox -s ") for name in each.split()[2:]}
    known |= {*IN_SENTENCES, *map(kind, IN_SENTENCES_GPU), "bench", "nox --no-venv -s NAME"}
    lost = [(page, text) for page, text in in_sentences() if not text.startswith("pip") and kind(text) not in known]
    assert lost == [], "add what runs them to IN_SENTENCES of tests/page_stories.py, or to IN_SENTENCES_GPU"
    named = {kind(text) for _, text in in_sentences()}
    assert named >= {*IN_SENTENCES, *map(kind, IN_SENTENCES_GPU)}
