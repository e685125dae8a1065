"""Sampling and encoding shared out among ranks, which need nothing of each other but that all come to an end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dig.sampling.sharing import Sharing
from dig.training.parallel.agreement import check_alike, check_one_folder, program
from dig.training.parallel.ranks import Ranks
from dig.training.parallel.watching import Watch

T = TypeVar("T")
GOES_ON = "the same command goes on with what is finished"


class SharedWork(Sharing):
    """A job's ranks at work that they share out.

    Args:
        ranks: The job.
        watch: Told what this rank does.
    """

    def __init__(self, ranks: Ranks, watch: Watch) -> None:
        self.rank = ranks.rank
        self.size = ranks.world_size
        self._ranks = ranks
        self._watch = watch

    def from_leader(self, ask: Callable[[], T]) -> T:
        """What asking gives on rank 0, on all ranks."""
        if self.leads:
            value = ask()
        self._watch.doing("waiting for the first rank", waits=not self.leads)
        self._ranks.meet()
        found: T = self._ranks.from_leader(value if self.leads else None)
        return found

    def agree(self, facts: Mapping[str, Any]) -> None:
        """See that all ranks would make the same; the program, too.

        Raises:
            RanksDifferError: They would not, on all of them.
        """
        self._watch.doing("comparing what is asked of the ranks", waits=True)
        self._ranks.meet()
        mine = {name: json.dumps(value, sort_keys=True, default=str) for name, value in facts.items()}
        check_alike(self._ranks, program() | mine)

    def sees(self, folder: Path) -> None:
        """See that all ranks write into one folder.

        Raises:
            RanksDifferError: They do not, on all of them.
        """
        self._watch.doing("comparing folders", waits=True)
        self._ranks.meet()
        check_one_folder(self._ranks, folder)

    def begins(self, what: str) -> None:
        """Tell the watch."""
        self._watch.remedy = GOES_ON
        self._watch.doing(what)

    def meet(self) -> None:
        """Wait for the others, who may have more to do."""
        self._watch.doing("waiting for the others", waits=True)
        self._ranks.meet()
