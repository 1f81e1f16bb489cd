"""Bytes that a step holds with one column per layer, before its tensors have places."""

from __future__ import annotations

from tightfit.planner.problem.layer_types import LayeredStep
from tightfit.planner.schedule.layer_schedule import Column


def live_bytes(problem: LayeredStep, columns: tuple[Column, ...]) -> int:
    """Most bytes of live tensors over all windows of the step and of evaluation, exactly: (11) and (12) without what
    waits.
    """
    outside = sum(column.outside for column in columns)
    held, most = outside, 0.0
    for layer, column in enumerate(columns):
        held -= column.outside
        most = max(
            most,
            held + column.forward_peak + problem.across_forward[layer],
            held + column.backward_peak + problem.across_backward[layer],
            outside - column.outside + column.evaluate_peak + problem.across_evaluate[layer],
        )
        held += column.between
    return int(most) + problem.constant_bytes


def instruction_count(problem: LayeredStep, columns: tuple[Column, ...]) -> int:
    """Instructions of both schedules; each frees the outcome (loss, token losses) at its end."""
    outcome = 1 + (problem.profile.token_losses is not None)
    return int(sum(column.instructions for column in columns)) + 2 * outcome


def charged_bytes(problem: LayeredStep, columns: tuple[Column, ...]) -> int:
    """Live bytes plus what the instructions themselves occupy in the runtime."""
    per_instruction = problem.profile.device.floor.instruction_bytes
    return live_bytes(problem, columns) + per_instruction * instruction_count(problem, columns)
