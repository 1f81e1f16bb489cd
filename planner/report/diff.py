"""Compares two plans of one model tensor by tensor: which decisions differ, how many bytes that concerns, what it
costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tightfit.planner.report.costs import Cost, CostLedger
from tightfit.planner.schema import Plan
from tightfit.runtime.common.errors import InputError

LEAST_SECONDS = 1e-9
"""differences in seconds below this are taken for rounding"""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What the two plans do differently, or at another cost, and what that costs per step: `after` minus `before`."""

    kind: str
    bytes: int
    before: str | None
    after: str | None
    """the decisions of the two plans; None where there was nothing to decide"""
    compute_seconds: float
    """seconds of the cores for recomputing or unpacking"""
    transfer_seconds: float
    """seconds of the channels"""
    moved_bytes: int
    """bytes read and written"""


@dataclass(frozen=True, kw_only=True)
class PlanChange(Change):
    """One tensor's."""

    name: str


@dataclass(frozen=True, kw_only=True)
class ChangeGroup(Change):
    """All changes with the same kind of tensor and the same two decisions."""

    tensors: int


def diff(before: Plan, after: Plan) -> list[PlanChange]:
    """What changes from one plan to another, largest tensors first; sums of seconds and bytes are the plans'
    differences.

    Times are each plan's own, so that plans for two devices compare as well. Raises InputError for plans of two models.
    """
    if [layer.name for layer in before.layers] != [layer.name for layer in after.layers]:
        raise InputError(
            f"plans of {before.model.name} and {after.model.name} have other layers; compare plans of one profile"
        )
    old, new = CostLedger(before).costs(), CostLedger(after).costs()
    unspent = {name: Cost(kind=cost.kind, bytes=cost.bytes, decision=None) for name, cost in (old | new).items()}
    changes = []
    for name, no_cost in unspent.items():
        old_cost, new_cost = old.get(name, no_cost), new.get(name, no_cost)
        compute = new_cost.compute_seconds - old_cost.compute_seconds
        transfer = new_cost.transfer_seconds - old_cost.transfer_seconds
        if old_cost.decision == new_cost.decision and max(abs(compute), abs(transfer)) < LEAST_SECONDS:
            continue
        changes.append(
            PlanChange(
                name=name,
                kind=no_cost.kind,
                bytes=no_cost.bytes,
                before=old_cost.decision,
                after=new_cost.decision,
                compute_seconds=compute,
                transfer_seconds=transfer,
                moved_bytes=new_cost.moved_bytes - old_cost.moved_bytes,
            )
        )
    return sorted(changes, key=lambda change: (-change.bytes, change.name))


def grouped(changes: Iterable[PlanChange]) -> list[ChangeGroup]:
    """Changes grouped by kind and decisions, the groups that concern most bytes first."""
    by_sort: dict[tuple[str, str | None, str | None], list[PlanChange]] = {}
    for change in changes:
        by_sort.setdefault((change.kind, change.before, change.after), []).append(change)
    groups = [
        ChangeGroup(
            kind=kind,
            before=before,
            after=after,
            tensors=len(alike),
            bytes=sum(change.bytes for change in alike),
            compute_seconds=sum(change.compute_seconds for change in alike),
            transfer_seconds=sum(change.transfer_seconds for change in alike),
            moved_bytes=sum(change.moved_bytes for change in alike),
        )
        for (kind, before, after), alike in by_sort.items()
    ]
    return sorted(groups, key=lambda group: -group.bytes)
