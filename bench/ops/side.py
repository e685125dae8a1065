"""One side of a comparison of operations, in the side's own checkout: see `bench.run.side`. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from bench.cases.jobs import Limits
from bench.ops.rows import OpCase, OpJob, OpRow
from bench.run.checkouts import Checkout
from bench.run.process import WorkerError
from bench.run.runner import PHASES, STARTING, Referee, run_job
from bench.run.side import Answer, Question, SideOf, answer_questions
from bench.store.decoding import decode_dataclass
from bench.store.rows import utc_now
from dig.environment import describe_environment


class OpSide(SideOf[OpCase, OpRow]):
    """A side that measures operations: its own ``dig``, by the change's harness.

    Args:
        checkout: Where it runs.
        time_limit: Seconds a launch may take.
    """

    def __init__(self, checkout: Checkout, *, time_limit: float) -> None:
        super().__init__(
            checkout,
            time_limit=time_limit,
            module="bench.ops.side",
            ask=dataclasses.asdict,
            parse=OpRow.from_json,
        )


def _start() -> Answer:
    environment = describe_environment()
    referee = Referee(limits=Limits(), ceilings=False)

    def answer(question: Question, tell: Callable[[str], None]) -> str:
        case = decode_dataclass(OpCase, question.case, "case")
        job = OpJob(case=case, budget=question.budget, environment=environment, launch=question.launch)
        started_at = utc_now()
        try:
            tell(STARTING)
            limits = Limits(prepare=question.time_limit, measure=question.time_limit)
            found = run_job(
                job, limits=limits, entry="bench.ops.measure:measure_op", on_phase=lambda phase: tell(PHASES[phase])
            )
            row = OpRow.from_json(found)
        except WorkerError as error:
            row = OpRow(
                case=case,
                status=error.status,
                message=str(error),
                started_at=started_at,
                launch=question.launch,
                environment=environment,
            )
        returned = referee.wait_for_memory()
        return (row if returned else dataclasses.replace(row, marks=(*row.marks, "memory-kept"))).to_json()

    return answer


if __name__ == "__main__":
    answer_questions(_start)
