"""Classes by what people call them: indices and names in one text, without a name that cannot be asked for."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Sequence

NULL_WORD = "null"
_EXPLICIT = "@"
_INDEX = re.compile(r"[0-9]+")
# A word in double quotes, in which "" stands for one of them, or anything up to the next comma.
_WORD = re.compile(r'\s*(?:"(?P<quoted>(?:[^"]|"")*)"\s*|(?P<bare>(?!\s*")[^,]*))(?P<end>,|$)')


def parse_classes(text: str | None, class_names: Sequence[str], num_classes: int, null_label: int) -> tuple[int, ...]:
    """Labels from indices and names, separated by commas; every class if there is no text.

    A word is a class's name as it is written, else the one name that differs from it in case, in Unicode's normal form
    or in spaces around it, else an index. Where names are numbers themselves, a number is a name and never an index. In
    double quotes it is a name, commas and all; ``@3`` is an index, and ``@null`` no class, whatever the names are.

    Args:
        text: ``3,7``, ``Bag,"tench, Tinca tinca"``, or ``null`` for the label that stands for no class.
        class_names: Name of each label; empty where they are not known.
        num_classes: How many labels there are.
        null_label: The model's.

    Raises:
        ValueError: No such class, or more than one; the message says how to ask for it.
    """
    if text is None:
        return tuple(range(num_classes))
    classes = _Classes(class_names, num_classes, null_label)
    return tuple(classes.quoted(word) if is_quoted else classes.bare(word) for word, is_quoted in _split(text))


def _split(text: str) -> list[tuple[str, bool]]:
    """The words of a list, and whether each stood in quotes."""
    words, start = [], 0
    while True:
        found = _WORD.match(text, start)
        if found is None:
            raise ValueError(
                f"the classes {text!r} have a double quote that is not closed, or text beside one; write a name that "
                'begins with a double quote or holds a comma as "name", and a double quote in it twice'
            )
        quoted = found["quoted"]
        words.append((found["bare"].strip(), False) if quoted is None else (quoted.replace('""', '"'), True))
        if not found["end"]:
            return words
        start = found.end()


def _normal(name: str) -> str:
    """A name in Unicode's composed form: the same letters may be other code points, as macOS writes them."""
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    """A name without case and without spaces around it."""
    return _normal(_normal(name).strip().casefold())


class _Classes:
    def __init__(self, names: Sequence[str], count: int, null_label: int) -> None:
        self.names = names
        self.count = count
        self.null_label = null_label
        # Of any script's digits: a folder may be called by those too. Not where each is its own index, as MNIST's.
        own = all(name == str(label) for label, name in enumerate(names))
        self.are_numbers = not own and any(name.strip().isdecimal() for name in names)

    def quoted(self, word: str) -> int:
        """The label of a name."""
        label = self._by_name(word)
        if label is None:
            raise ValueError(self._unknown(word))
        return label

    def bare(self, word: str) -> int:
        """The label of a name, an index, or no class."""
        if word.startswith(_EXPLICIT):
            return self._explicit(word)
        if word == NULL_WORD:
            # Both have a way of their own to be asked for; this one would be a guess.
            if NULL_WORD in self.names:
                raise ValueError('a class is called null; write "null" in double quotes for it, @null for no class')
            return self.null_label
        label = self._by_name(word)
        if label is not None:
            return label
        if re.fullmatch(r"-?[0-9]+", word) and not self.are_numbers:
            return self._index(word, word)
        raise ValueError(self._unknown(word))

    def _explicit(self, word: str) -> int:
        rest = word.removeprefix(_EXPLICIT)
        if rest == NULL_WORD:
            return self.null_label
        if _INDEX.fullmatch(rest):
            return self._index(rest, word)
        name = ', or the name in double quotes: "@..."' if word in self.names else ""
        raise ValueError(f"{word!r} is no class: write @ and an index, 0 to {self.count - 1}, or @null for none{name}")

    def _index(self, digits: str, word: str) -> int:
        # By length first: Python refuses to read thousands of digits.
        if digits.startswith("-") or len(digits.lstrip("0")) > 18 or int(digits) >= self.count:
            raise ValueError(f"there is no class {word[:40]}: this model has 0 to {self.count - 1}")
        return int(digits)

    def _by_name(self, word: str) -> int | None:
        """The label of the one name that is this word, as nearly as any is."""
        ways: tuple[Callable[[str], str], ...] = (str, _normal, _folded)
        for way in ways:
            labels = [label for label, name in enumerate(self.names) if way(name) == way(word)]
            if len(labels) > 1:
                which = ", ".join(f"{self.names[label]!r} (@{label})" for label in labels[:5])
                raise ValueError(f"{word!r} may be any of several classes: {which}; write one of them as it is")
            if labels:
                return labels[0]
        return None

    def _unknown(self, word: str) -> str:
        if not word:
            return "a name among the classes is empty; is there a comma too many?"
        if not self.names:
            return f"this checkpoint doesn't name its classes; give indices, 0 to {self.count - 1}"
        by_folded = {_folded(name): name for name in self.names}
        near = difflib.get_close_matches(_folded(word), list(by_folded), n=1, cutoff=0.4)
        hint = f"did you mean {by_folded[near[0]]}? " if near else ""
        if _INDEX.fullmatch(word) and self.are_numbers:
            hint += f"Classes here are called by numbers; an index is @{word[:40]}. "
        elif any("," in name for name in self.names):
            hint += "A name with a comma stands in double quotes. "
        known = ", ".join(self.names[:20]) + (" and more" if len(self.names) > 20 else "")
        return f"there is no class {word!r}: {hint}Known: {known}"
