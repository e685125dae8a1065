"""The shell commands that README, CONTRIBUTING and docs show, each with its block and what is said of it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dig.environment import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELLS = {"", "bash", "sh", "shell", "console"}
"""Languages of blocks that hold commands; in a console's they follow a dollar."""
_LINE = re.compile(r"""(?P<code>(?:'[^']*'|"[^"]*"|[^'"#]|(?<=\S)\#)*)(?P<comment>\#.*)?""")
_MARK = re.compile(r"\bneeds (a GPU|an NVIDIA GPU|(\w+ )?GPUs)\b")
_INLINE = re.compile(r"`((?:python -m|nox|bash|torchrun|pip install)\b[^`]*)`")


@dataclass(frozen=True)
class Command:
    """One command as a page shows it; continued lines are joined."""

    page: str
    line: int
    block: str
    """``page#heading`` as links have it, and ``/2`` for a heading's second block of commands."""
    text: str
    comment: str
    needs_gpu: bool
    """Its comment says so, or the one above it and its neighbours."""

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.page}, line {self.line}"


def anchor(heading: str) -> str:
    """What GitHub calls a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def read_page(text: str, page: str) -> list[Command]:
    """The commands in a page's blocks, in order; ``a && b`` are two."""
    found: list[Command] = []
    heading, language, count = "", None, 0
    group, continued = False, ""
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.fullmatch(r"```(\w*)", line)
        if language is None:
            if fence:
                language, group = fence[1], False
                count += language in SHELLS
            elif line.startswith("#"):
                heading, count = anchor(line.lstrip("#").strip()), 0
            continue
        if fence:
            language = None
            continue
        if language not in SHELLS:
            continue
        words = _LINE.match(line)
        assert words is not None
        code, comment = words["code"].strip(), words["comment"] or ""
        marked = bool(_MARK.search(comment))
        if language == "console":
            code = code.removeprefix("$ ")
        if code.endswith("\\"):
            continued += code.removesuffix("\\")
            continue
        if not code:
            # A comment of its own speaks for the lines below it, an empty line ends what it says.
            group = marked
            continue
        block = f"{page}#{heading}" + (f"/{count}" if count > 1 else "")
        for part in (continued + code).split("&&"):
            found.append(Command(page, number, block, part.strip(), comment, marked or group))
        continued = ""
    return found


def shown() -> list[Command]:
    """Every command of every page's blocks."""
    return [command for page in PAGES for command in read_page(page.read_text(encoding="utf-8"), page.name)]


def in_sentences() -> list[tuple[str, str]]:
    """Pages and the commands that their sentences and tables name, within backticks, maybe over two lines."""
    found = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        found += [(page.name, " ".join(words.split())) for words in _INLINE.findall(text)]
    return found


def split(text: str, folder: Path) -> list[str]:
    """The words of a command as a shell reads them, quotes and braces included."""
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {text}"], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]


def kind(text: str) -> str:
    """What a command starts: its program or module, and the subcommands' names; nothing of its options."""
    words = text.split()
    if words[0] == "torchrun":
        words = ["torchrun", *words[words.index("-m") + 1 :]]
        words = [word for word in words if word != "--"][:3]
    elif words[:2] == ["python", "-m"]:
        words = words[2:]
        most = {"dig": 2, "bench": 3 if words[1:2] == ["ops"] else 2}.get(words[0], 1)
        words = words[:most]
    elif words[0] == "nox":
        words = words[: words.index("--")] if "--" in words else words
    taken = []
    for word in words:
        if word.startswith("-") and words[0] != "nox":
            break
        taken.append(word)
    return " ".join(taken)
