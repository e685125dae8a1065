"""Every class can be asked for by its name, whatever that is, and none is taken for another."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dig.sampling.classes import parse_classes
from dig.sampling.classes import parse_classes as parse

NULL = 99


def labels(text: str, *names: str) -> tuple[int, ...]:
    return parse(text, names, len(names), NULL)


def test_the_command_has_them_from_here() -> None:
    assert parse_classes is parse


def test_case_tells_names_apart_and_else_does_not_matter() -> None:
    assert labels("Apple,apple", "Apple", "apple") == (0, 1)
    assert labels("BAG, shoe ", "Bag", "Shoe") == (0, 1)
    with pytest.raises(ValueError, match=r"'APPLE' may be any of several classes: 'Apple' \(@0\), 'apple' \(@1\)"):
        labels("APPLE", "Apple", "apple")
    assert labels("STRASSE", "straße") == (0,)


def test_numbers_are_names_where_names_are_numbers() -> None:
    """0 and 1 once both gave the class called 1."""
    names = ("1", "10", "2", "3")
    assert labels("1,10,2,3", *names) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match=r"there is no class '0': .*called by numbers; an index is @0"):
        labels("0", *names)
    assert labels("@0,@3", *names) == (0, 3)
    assert labels("7,3", *map(str, range(10))) == (7, 3)
    with pytest.raises(ValueError, match="there is no class 12: this model has 0 to 9"):
        labels("12", *map(str, range(10)))
    assert labels("007,7", "007", "7") == (0, 1)
    with pytest.raises(ValueError, match=r"there is no class '7': did you mean 007\?"):
        labels("7", "007", "008")
    assert labels("2,02", "cat", "dog", "owl") == (2, 2)
    with pytest.raises(ValueError, match="there is no class '1': "):
        labels("1", "٣", "cat")


def test_commas_quotes_and_spaces() -> None:
    names = ("tench, Tinca tinca", "a", '5" disk', " b", '"', "b", "")
    assert labels('"tench, Tinca tinca",a', *names) == (0, 1)
    assert labels('a,5" disk', *names) == (1, 2)
    assert labels('"5"" disk" , " b",b,"b"', *names) == (2, 3, 5, 5)
    assert labels('"""",""', *names) == (4, 6)
    with pytest.raises(ValueError, match=r"'tench': .*A name with a comma stands in double quotes"):
        labels("tench, Tinca tinca", *names)
    for text in ('"a', '"a"b', 'a,"', '"a" "b"'):
        with pytest.raises(ValueError, match="a double quote that is not closed"):
            labels(text, *names)
    for text in ("", "a,", ",a", "a,,b", " "):
        with pytest.raises(ValueError, match="is empty; is there a comma too many"):
            labels(text, "a", "b")


def test_no_class() -> None:
    assert labels("null,a,@null", "a") == (NULL, 0, NULL)
    with pytest.raises(ValueError, match='a class is called null; write "null"'):
        labels("null", "null", "a")
    assert labels('"null",@null', "null", "a") == (0, NULL)
    assert labels("Null", "Null", "a") == (0,)


def test_explicit_words() -> None:
    assert labels('@1,"@1"', "@1", "@x") == (1, 0)
    for word, message in (
        ("@x", "or the name in double quotes"),
        ("@2", "there is no class @2: this model has 0 to 1"),
        ("@-1", "write @ and an index, 0 to 1"),
        ("@", "write @ and an index"),
        ("@" + "9" * 5000, "there is no class @999"),
        ("@٣", "write @ and an index"),
    ):
        with pytest.raises(ValueError, match=message):
            labels(word, "@1", "@x")


def test_normal_forms() -> None:
    """macOS writes é as two code points; a keyboard gives one."""
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert labels(composed, decomposed) == labels(decomposed, composed) == (0,)
    assert labels(f"{composed},{decomposed}", decomposed, composed) == (1, 0)
    assert labels(composed.upper(), decomposed) == (0,)
    with pytest.raises(ValueError, match="may be any of several"):
        labels(composed.upper(), decomposed, composed)


def test_indices_without_names() -> None:
    assert parse("0,4,@3", (), 5, NULL) == (0, 4, 3)
    for word, message in (("5", "0 to 4"), ("-1", "0 to 4"), ("9" * 5000, "0 to 4"), ("x", "give indices, 0 to 4")):
        with pytest.raises(ValueError, match=message):
            parse(word, (), 5, NULL)


NAMES = st.lists(st.text(min_size=1), min_size=1, max_size=6, unique=True)


@given(names=NAMES)
def test_every_name_in_quotes_is_its_class(names: list[str]) -> None:
    text = ",".join('"{}"'.format(name.replace('"', '""')) for name in names)
    assert labels(text, *names) == tuple(range(len(names)))


@given(names=NAMES, word=st.text())
def test_a_bare_word_is_never_a_class_that_it_does_not_name(names: list[str], word: str) -> None:
    """Nor does any text end in another error than a refusal."""
    try:
        found = labels(word, *names)
    except ValueError:
        return
    for label in found:
        assert label == NULL or 0 <= label < len(names)
    if word in names and len(found) == 1 and found[0] != NULL and not word.startswith(("@", '"')):
        assert names[found[0]] == word
