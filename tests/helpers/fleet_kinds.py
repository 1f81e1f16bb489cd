"""Plans fleets of one kind each, as tests call it: their members and a count, and options as keywords."""

from __future__ import annotations

from tightfit.planner.fleet.description import DescribedFleet
from tightfit.planner.fleet.fleet_planner import plan_fleet
from tightfit.planner.fleet.options import FEDERATED


def plan_kind(members, count, *, server=None, weights=None, **options):
    """The plan, those of its parts, and why it is of this kind."""
    of_rounds = options.get("kind") == FEDERATED
    described = DescribedFleet(members=members, of_rounds=of_rounds, count=count, server=server, weights=weights or {})
    return plan_fleet(described, **options)


def _of(kind):
    def plan(members, count, **options):
        return plan_kind(members, count, kind=kind, **options)[:2]

    return plan


plan_data, plan_pipeline, plan_side, plan_federated = map(_of, ("data", "pipeline", "mobillm", FEDERATED))


def plan_split(server, members, count, **options):
    """Of split federated rounds."""
    return plan_federated(members, count, server=server, **options)
