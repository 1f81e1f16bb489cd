"""The budget that `make demo` chooses."""

from __future__ import annotations

import pytest
from synthetic import device

from examples.demo import BUDGET, FLOOR, FLOOR_IN_MEMORY, choose_budget
from tightfit.profiles.schema import DeviceFigures, Floor

MIB = 1 << 20


def measured(resident: int, start: int, *, tables_on_disk: bool = False) -> DeviceFigures:
    floor = Floor(import_peak_bytes=start, resident_bytes=resident, instruction_bytes=50, tables_on_disk=tables_on_disk)
    return device().model_copy(update={"floor": floor, "torch_version": "2.14.1+cu130"})


@pytest.mark.parametrize(("usual", "on_disk"), [(FLOOR, True), (FLOOR_IN_MEMORY, False)])
def test_a_lean_start_leaves_the_budget_alone(usual: int, on_disk: bool) -> None:
    for resident in (36 * MIB, usual):
        assert choose_budget(measured(resident, 140 * MIB, tables_on_disk=on_disk)) == (BUDGET, "")
    budget, why = choose_budget(measured(usual + 1, 140 * MIB, tables_on_disk=on_disk))
    assert (budget, bool(why)) == (BUDGET + MIB, True)


def test_a_pytorch_that_holds_more_leaves_the_model_as_much() -> None:
    budget, why = choose_budget(measured(302 * MIB + 5, 530 * MIB))
    assert budget == BUDGET + 302 * MIB - FLOOR_IN_MEMORY + MIB
    assert why == (
        "Python and torch 2.14.1+cu130 hold 302.0 MiB here, and 530.0 MiB while they start, where 120.0 MiB are usual:"
        " the budget is 533.0 MiB instead of 350.0 MiB, to leave the model as much"
    )


def test_the_start_alone_may_need_more() -> None:
    budget, why = choose_budget(measured(100 * MIB, 530 * MIB))
    assert budget == 530 * MIB
    assert why
