"""Files are whole or not there, whatever ends the writing, and nobody can lay a link in its way."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dig.training.data import files


def test_temporary_names_cannot_be_foretold_and_are_cleared(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def write(content: bytes, seen: list[Path]) -> None:
        with files.replacing(path) as temporary:
            temporary.write_bytes(content)
            seen.append(temporary)
            assert len(content) < 4
            assert sorted(tmp_path.glob(".x.*")) == sorted(seen)

    (tmp_path / ".x.abandoned.tmp").write_bytes(b"cut")  # of a process that was killed
    names: list[Path] = []
    with files.replacing(path) as living:
        living.write_bytes(b"newer")
        write(b"new", [living])
        with pytest.raises(AssertionError):
            write(b"failed", [living])
        names.append(living)
    write(b"new", [])
    with files.replacing(path) as temporary:
        temporary.write_bytes(b"last")
        assert temporary not in names
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
    assert path.read_bytes() == b"last"


def test_links_under_old_temporary_names_are_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep")
    for name in (".x.tmp", ".x.1.tmp"):
        (tmp_path / name).symlink_to(precious)
    files.write_atomically(tmp_path / "x", b"new")
    assert precious.read_text() == "keep"
    assert (tmp_path / "x").read_bytes() == b"new"


def test_an_error_names_the_file_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file or directory") as caught:
        files.write_atomically(tmp_path / "none" / "x", b"")
    assert caught.value.filename == str(tmp_path / "none" / "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        files.write_atomically(tmp_path / "folder", b"")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_lines_are_appended_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    files.append_line(path, '{"a": 1}')
    with path.open("a") as file:
        file.write('{"cut')
    files.append_line(path, '{"b": 2}')
    assert path.read_text() == '{"a": 1}\n{"cut\n{"b": 2}\n'

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.append_line(path, '{"c": 3}')
    assert path.read_text() == '{"a": 1}\n{"cut\n{"b": 2}\n'
