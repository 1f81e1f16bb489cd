"""The job that chooses what of a model stays in memory between the tokens of answers, for a device elsewhere."""

from __future__ import annotations

from tightfit.planner.generation.choice import ChoiceProblem
from tightfit.planner.generation.program import choose_each
from tightfit.planner.service.jobs.orders import EventWriter, JobOrder
from tightfit.planner.service.jobs.store import Row


def do(order: JobOrder, events: EventWriter) -> Row:
    """What stays in memory between the tokens of answers; None where nothing fits."""
    problems = [ChoiceProblem.model_validate(problem) for problem in order.request["problems"]]
    choices = choose_each(problems)
    return {"result": {"choices": [choice and choice.model_dump() for choice in choices]}, "files": []}
