"""Makes the plan of `hand_schedule`, with chosen decisions, for tests of what its tensors cost."""

from __future__ import annotations

from hand_schedule import EVALUATE, OPERATORS, TRAIN, page, written

from tightfit.planner.simulation.replay import LINE


def by_hand(operators=OPERATORS, **decisions):
    plan = written(operators, TRAIN, EVALUATE, arena=page(10) + LINE, optimizer={"name": "adamw", "state_tensors": 2})
    return plan.model_copy(update={"decisions": decisions})
