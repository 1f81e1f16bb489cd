"""Plans of one profile that differ in all that a plan decides, and what their runs have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fleets import adapter_hash

from tightfit.planner.plan import plan
from tightfit.planner.schema import Plan
from tightfit.profiles.schema import Profile
from tightfit.runtime.session.launch import run


def three_plans(made: Profile) -> list[Plan]:
    """One that keeps all, one at the smallest budget, and one by a rule."""
    roomy = plan(made, 1 << 30)
    smallest = plan(made, 1 << 20).minimum_budget_bytes
    assert smallest
    return [roomy, plan(made, smallest), plan(made, 1 << 30, policy="mesp")]


def losses_of_equal_runs(plans: Sequence[Plan], data: str, folder: Path, training: Mapping[str, Any]) -> list[float]:
    """The losses of a run of every plan, which are the same. Asserts that the adapters are equal to the bit, and that
    each run stays within its plan's budget and prediction.
    """
    adapters, losses = set(), []
    for number, each in enumerate(plans):
        report = run(each, data, out=folder / f"{number}", **training)
        adapters.add(adapter_hash(folder / f"{number}"))
        losses.append(report["loss"])
        assert report["peak_bytes"]["measured"] <= each.budget_bytes
        assert report["peak_bytes"]["measured"] <= report["peak_bytes"]["predicted"]
    assert len(adapters) == 1
    assert losses[1:] == losses[:1] * (len(plans) - 1)
    return losses[0]
