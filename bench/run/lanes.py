"""A sweep over several GPUs of one host: a case a GPU at a time, one writer, and what ran beside what in the rows.

Each GPU has a lane: a thread with a `bench.run.runner.Referee` of its own, whose workers see that GPU alone. Rows come
back to the one thread that writes. No torch here.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from bench.cases.case import Case
from bench.run.gpus import Card
from bench.run.lifeline import scratch_folder
from bench.run.process import kill_workers
from bench.run.runner import PHASES, STARTING, Findings, Launch, Referee, Sweep, measure_again
from bench.store.ledgers import Placement
from bench.store.lines import LinesWriter
from bench.store.rows import Mark, Row

Alone = Literal["eager", "none"]
"""What has the host to itself: cases that the host launches step by step (eager, compile), or none."""
Spread = Literal["comparisons", "cases"]
"""What is kept on one GPU: cases that compare with each other, or only a case's own launches."""
ALONE, SPREAD = get_args(Alone), get_args(Spread)
_DOING = {words: phase for phase, words in PHASES.items()} | {STARTING: "starting"}


def host_bound(case: Case) -> bool:
    """Whether the host launches a case's steps one by one, and how fast it can be has a part in their time."""
    return not case.captures


def marks_beside(case: Case, beside: Mapping[str, int]) -> tuple[Mark, ...]:
    """The marks of a launch beside which others ran.

    Args:
        case: What was measured.
        beside: As of `bench.store.ledgers.Placement`.
    """
    marks: list[Mark] = []
    if beside.get("measuring"):
        marks.append("host-shared" if host_bound(case) else "beside-another")
    if beside.get("compiling"):
        marks.append("built-beside")
    return tuple(marks)


class Neighbours:
    """Who is at work on which card; what each launch had beside it, phase by phase. Threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phases: dict[Card, str] = {}
        self._beside: dict[Card, dict[str, int]] = {}

    def enter(self, card: Card, phase: str) -> None:
        """A card's launch is in a phase from now on, and in no other."""
        with self._lock:
            if card not in self._phases:
                self._beside[card] = {}
            self._phases[card] = phase
            others = len(self._phases) - 1
            for one, its in self._phases.items():
                self._beside[one][its] = max(others, self._beside[one].get(its, 0))

    def leave(self, card: Card) -> dict[str, int]:
        """A card's launch is over; by phase, on how many other cards launches were at work, where there were any."""
        with self._lock:
            self._phases.pop(card, None)
            return {phase: count for phase, count in self._beside.pop(card, {}).items() if count}


def comparison(case: Case, spread: Spread) -> tuple[object, ...]:
    """What cases have in common that stay on one card: two cards of one name differ by a few percent."""
    if spread == "cases":
        return (case,)
    return case.size, case.patch, case.resolution, case.batch, case.mode, case.dtype, case.weights, case.device


class Board:
    """Which launch a card takes next: the first that nobody has, of a comparison that is on this card or on none.

    Threads share it.

    Args:
        launches: In order.
        spread: What stays together.
        homes: Comparisons that are on a card from the start.
    """

    def __init__(
        self, launches: Iterable[Launch], *, spread: Spread, homes: dict[tuple[object, ...], Card] | None = None
    ) -> None:
        self._waiting, self._spread = list(launches), spread
        self.homes = {} if homes is None else homes
        self._lock = threading.Lock()

    def take(self, card: Card) -> Launch | None:
        """The card's next launch; None where none is left for it."""
        with self._lock:
            for index, launch in enumerate(self._waiting):
                if self.homes.setdefault(comparison(launch.case, self._spread), card) is card:
                    return self._waiting.pop(index)
        return None

    def drop(self) -> None:
        """No card takes anything any more."""
        with self._lock:
            self._waiting.clear()


def homes_of(rows: Iterable[Row], cards: Sequence[Card], spread: Spread) -> dict[tuple[object, ...], Card]:
    """On which card each comparison is that a run goes on with; the last row of each says."""
    by_uuid = {card.uuid: card for card in cards}
    homes = {}
    for row in rows:
        if (card := by_uuid.get(str(row.environment.get("gpu_uuid")))) is not None:
            homes[comparison(row.case, spread)] = card
    return homes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sweep over several cards.

    Attributes:
        sweep: What is measured.
        cards: On which.
        alone: What has the host to itself.
        spread: What stays on one card.
        before: Rows of the file that the run goes on with.
        findings: What is known before.
    """

    sweep: Sweep
    cards: tuple[Card, ...]
    alone: Alone = "eager"
    spread: Spread = "comparisons"
    before: tuple[Row, ...] = ()
    findings: Findings = field(default_factory=Findings)


@dataclass(frozen=True)
class _Said:
    """What a lane reports: what it does with a case, a row, its end (no row), or what went wrong."""

    card: Card
    launch: Launch | None = None
    doing: str = ""
    row: Row | None = None
    error: BaseException | None = None


class _Lanes:
    """The cards' referees, and the launches that they measure side by side."""

    def __init__(self, plan: Plan, on_start: Callable[[Case, str], None]) -> None:
        self.plan, self.on_start = plan, on_start
        self.neighbours = Neighbours()
        limits, findings = plan.sweep.limits, plan.findings
        self.referees = {card: Referee(limits=limits, card=card, findings=findings) for card in plan.cards}
        self._said: queue.SimpleQueue[_Said] = queue.SimpleQueue()
        self._doing: dict[Card, tuple[Case, str]] = {}

    def measure(self, card: Card, launch: Launch) -> Row:
        """Measure a launch on a card; its row says what ran beside it."""
        referee = self.referees[card]

        def begun(doing: str) -> None:
            self.neighbours.enter(card, _DOING.get(doing, "preparing"))
            self._said.put(_Said(card, launch, doing))

        referee.on_phase = begun
        self.neighbours.enter(card, "starting")
        try:
            row = referee.measure(self.plan.sweep.job(launch, card))
        finally:
            beside = self.neighbours.leave(card)
        marks = marks_beside(launch.case, beside) if row.status == "ok" else ()
        return replace(row, placement=Placement(gpu=card.index, beside=beside), marks=(*row.marks, *marks))

    def _work(self, card: Card, board: Board) -> None:
        try:
            while (launch := board.take(card)) is not None:
                self._said.put(_Said(card, launch, row=self.measure(card, launch)))
            self._said.put(_Said(card))
        except BaseException as error:  # Whatever it is, the thread that writes must not wait for ever.
            self._said.put(_Said(card, error=error))

    def side_by_side(self, board: Board) -> Iterator[tuple[Launch, Card, Row]]:
        """Measure all of a board, a launch a card at a time; rows as they come."""
        threads = [threading.Thread(target=self._work, args=(card, board), daemon=True) for card in self.plan.cards]
        for thread in threads:
            thread.start()
        left = len(threads)
        try:
            while left:
                said = self._said.get()
                if said.error is not None:
                    raise said.error
                if said.row is not None and said.launch is not None:
                    yield said.launch, said.card, said.row
                elif said.launch is not None:
                    self._doing[said.card] = (said.launch.case, said.doing)
                    self._tell(said.card)
                else:
                    left -= 1
                    self._doing.pop(said.card, None)
        finally:
            board.drop()
            while any(thread.is_alive() for thread in threads):
                if left:
                    kill_workers()  # What a lane waits for, or has just begun.
                for thread in threads:
                    thread.join(0.05)

    def _tell(self, card: Card) -> None:
        """Say what all cards do, that of this one first."""
        case, doing = self._doing[card]
        others = [f"GPU {c.index}: {its.describe()}: {does}" for c, (its, does) in self._doing.items() if c != card]
        self.on_start(case, " | ".join([f"{doing} on GPU {card.index}", *others]))


def run_on_cards(plan: Plan, writer: LinesWriter[Row], *, on_start: Callable[[Case, str], None]) -> Iterator[Row]:
    """Measure a sweep's remaining launches, a launch a card at a time; each row is on the disk before it is yielded.

    Cases of one comparison stay on one card, all their launches too. First run what may run side by side, then, one at
    a time, what has the host to itself. Throttled launches are measured again at the end, one at a time
    (`bench.run.runner.measure_again`).

    Args:
        plan: What, and where.
        writer: Gets every row, in this thread.
        on_start: Told a case, and what all cards do, as something begins; in this thread.
    """
    scratch_folder()  # Made once, by this thread.
    lanes = _Lanes(plan, on_start)
    together: list[Launch] = []
    alone: list[Launch] = []
    for launch in plan.sweep.remaining:
        (alone if plan.alone == "eager" and host_bound(launch.case) else together).append(launch)
    homes = homes_of(plan.before, plan.cards, plan.spread)
    throttled: list[tuple[Row, tuple[Card, Launch]]] = []

    def keep(launch: Launch, card: Card, row: Row) -> Row:
        writer.write(row)
        if "throttled" in row.marks:
            throttled.append((row, (card, launch)))
        return row

    def by_itself(where: tuple[Card, Launch]) -> Row:
        card, launch = where
        board = Board([launch], spread=plan.spread, homes={comparison(launch.case, plan.spread): card})
        ((_, _, row),) = lanes.side_by_side(board)
        return row

    for launch, card, row in lanes.side_by_side(Board(together, spread=plan.spread, homes=homes)):
        yield keep(launch, card, row)
    for number, launch in enumerate(alone):
        card = homes.setdefault(comparison(launch.case, plan.spread), plan.cards[number % len(plan.cards)])
        yield keep(launch, card, by_itself((card, launch)))
    yield from measure_again(throttled, by_itself, writer, within=plan.sweep.again_s)
