"""What several modules of these tests work with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dig.tiny import TINY, using


@pytest.fixture(scope="module")
def tiny_dig() -> Iterator[None]:
    """Any DiG is a tiny one, while this module's tests run."""
    with using(TINY):
        yield
