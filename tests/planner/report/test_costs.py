"""What tensors cost, and what is there at an instruction, on the schedule that `test_replay` counts by hand."""

from __future__ import annotations

import pytest
from hand_costs import by_hand
from hand_schedule import MS, OPERATORS, TRAIN, page
from synthetic import PAGE

from tightfit.planner.report.costs import Cost, CostLedger


def cost(kind, size, decision=None, *, recompute=0.0, unpack=0.0, read=(0, 0.0), write=(0, 0.0)):
    return Cost(
        kind=kind,
        bytes=size,
        decision=decision,
        recompute_seconds=pytest.approx(recompute * MS),
        unpack_seconds=pytest.approx(unpack * MS),
        read_bytes=read[0],
        read_seconds=pytest.approx(read[1] * MS),
        write_bytes=write[0],
        write_seconds=pytest.approx(write[1] * MS),
    )


def test_costs_by_hand():
    moved = {"read": (PAGE, 5), "write": (PAGE, 10)}
    assert CostLedger(by_hand(w="streamed", t="kept")).costs() == {
        "w": cost("weight", page(2), "streamed", unpack=1, read=(PAGE, 5)),
        "t": cost("trainable", PAGE, "kept"),
        "l/a": cost("activation", page(2), recompute=4, read=(page(2), 9), write=(page(2), 18)),
        "adam_m:t": cost("optimizer", PAGE, **moved),
        "adam_v:t": cost("optimizer", PAGE, **moved),
        "x": cost("batch", PAGE, write=(PAGE, 10)),
    }


def test_an_operator_that_runs_again_is_charged_to_what_had_to_be_made_again():
    both = [OPERATORS[0].model_copy(update={"outputs": ["b", "a"]}), *OPERATORS[1:]]
    assert CostLedger(by_hand(both, **{"l/a": "recomputed"})).costs()["l/a"].recompute_seconds == pytest.approx(4 * MS)
    assert CostLedger(by_hand(both)).costs()["l/b"].recompute_seconds == pytest.approx(4 * MS)


def test_what_is_there_at_an_instruction():
    """What it makes already, what it frees still."""
    plan = by_hand()
    there = {"x": PAGE, "t": PAGE}
    at = [CostLedger(plan).resident_at(plan.train, index) for index in range(len(TRAIN))]
    assert at[0] == there | {"packed:w": PAGE}
    assert at[2] == at[3] == there | {"packed:w": PAGE, "l/a": page(2), "w": page(2)}
    assert at[4] == there | {"l/a": page(2), "w": page(2)}
    assert at[6] == there | {"l/a": page(2), "w": page(2), "loss": 4}
    assert at[7] == at[6]
    assert at[-2] == there | {"loss": 4}
    assert at[-1] == there
