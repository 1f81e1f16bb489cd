"""What a step is expected to take, and whence that is known, in words."""

from __future__ import annotations

from tightfit.planner.schema import Plan
from tightfit.runtime.common.units import format_seconds, format_size


def expected_words(plan: Plan) -> str:
    """What a step is expected to take, whence that is known, and the model's seconds beside it."""
    if plan.expected_from == "rehearsal":
        return f"{format_seconds(plan.expected_seconds)} as rehearsed{_beside(plan)} ({_by_the_model(plan)})"
    if plan.model.is_bare_graph:
        return format_seconds(plan.step_seconds)
    return f"{_by_the_model(plan)}, measured{_beside(plan)}" if plan.busy_machine else _by_the_model(plan)


def rehearsal_words(plan: Plan) -> str:
    """What carrying the plan out has shown."""
    assert plan.rehearsal is not None
    held = f"{format_size(plan.rehearsal.held_bytes)} were held of {format_size(plan.peak_bytes)} predicted"
    if plan.expected_from == "model":
        return f"rehearsed: {held}, when its cap ended it"
    return (
        f"rehearsed: a step took {format_seconds(plan.expected_seconds)}{_beside(plan)} ({_by_the_model(plan)}); {held}"
    )


def _by_the_model(plan: Plan) -> str:
    return f"{format_seconds(plan.step_seconds)} by the model"


def _beside(plan: Plan) -> str:
    return f" beside other programs on {plan.busy_cores:.1f} cores" if plan.busy_machine else ""
