"""Makes the plan of a fleet without a solver, for tests of texts and commands."""

from __future__ import annotations

from sample_plans import sample_plan

from tightfit.planner.fleet.schema import Baseline, FleetPlan, Link, Member, Part, Replica
from tightfit.runtime.common.units import MIB

LINK = Link(up_bytes_per_second=12.5e6, down_bytes_per_second=12.5e6, latency_seconds=0.002)


def sample_member(name, **changes):
    """A device of the sample."""
    values = {"name": name, "device": f"{name}'s chip", "measured": True, "budget_bytes": 320 * MIB, "link": LINK}
    return Member(**values | changes)


def sample_replica(name, first, count, seconds, *, peak_bytes=310 * MIB, **changes):
    """A member that computes `count` micro-batches from number `first` on."""
    part = Part(
        member=name,
        plan=name,
        plan_fingerprint=name[0] * 64,
        micro_batch_seconds=seconds,
        bound_seconds=seconds,
        peak_bytes=peak_bytes,
        exchange_bytes=2 * MIB,
    )
    values = {"update_seconds": 0.25, "gradients": "memory", "states": "disk"}
    return Replica(parts=[part], first=first, micro_batches=count, **values | changes)


def sample_fleet(**changes):
    """Eight micro-batches: five on a laptop in 5 s, three on a phone in 4.5 s, none on a watch. The laptop's sum goes
    up to the phone in four pieces of 0.25 s, the mean comes back in four more, and both update in 0.25 s: 7.25 s.
    """
    values = {
        "fingerprint": "f" * 64,
        "model": "Tiny <model>",
        "kind": "data parallel",
        "micro_batches": 8,
        "accumulate": 8,
        "batch": 2,
        "trained_bytes": MIB,
        "members": [
            sample_member("laptop"),
            sample_member("phone", budget_bytes=250 * MIB),
            sample_member("watch", budget_bytes=64 * MIB, reason="nothing fits within 64.0 MiB"),
        ],
        "replicas": [
            sample_replica("laptop", 0, 5, 1.0),
            sample_replica("phone", 5, 3, 1.5, peak_bytes=249 * MIB, gradients="disk"),
        ],
        "makespan_seconds": 7.25,
        "bound_seconds": 7.0,
        "gap": 0.25 / 7.25,
        "compute_seconds": 5.0,
        "exchange_seconds": 2.0,
        "update_seconds": 0.25,
        "solve_seconds": 3.5,
        "bit_identical": True,
        "baselines": [
            Baseline(
                name="equal shares",
                makespan_seconds=None,
                shares={"laptop": 3, "phone": 3, "watch": 2},
                reason="watch cannot hold its share in 64.0 MiB",
            ),
            Baseline(name="fastest alone", makespan_seconds=8.265, shares={"laptop": 8, "phone": 0, "watch": 0}),
        ],
    }
    return FleetPlan(**values | changes)


def member_plans(fleet=None):
    """A plan for each member of the sample's chain, by name."""
    fleet = fleet or sample_fleet()
    return {name: sample_plan(budget=fleet.member(name).budget_bytes) for name in fleet.names}
