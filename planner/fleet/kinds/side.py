"""mobillm: a device, and a server that trains a side network."""

from collections.abc import Sequence
from typing import Any

from tightfit.planner.fleet.description import DescribedFleet
from tightfit.planner.fleet.kinds.frame import StepPlanner
from tightfit.planner.fleet.members import (
    check_side,
    trained_tensors,
)
from tightfit.planner.fleet.options import FleetOptions
from tightfit.planner.fleet.part_profiles import (
    alone_profile,
    received_tensors,
    server_profile,
    side_shape,
)
from tightfit.planner.fleet.parts import RINGS, message_bytes, messages_bytes, passed_of
from tightfit.planner.fleet.replay import one_way
from tightfit.planner.fleet.schema import Baseline, FleetPlan, Replica
from tightfit.planner.plan import planner_of
from tightfit.planner.plan_result import sealed
from tightfit.planner.problem.device_forward import DEFAULT_BITS, device_forward
from tightfit.planner.schema import Plan
from tightfit.profiles.schema import MOBILLM
from tightfit.runtime.common.errors import InfeasibleError, InputError
from tightfit.runtime.common.units import format_size

SIDE_SHARES = (0.4, 0.3, 0.3)
"""of the time limit: for the plan of mobillm's device, of its server, and of the device without a server"""


class SidePlanner(StepPlanner):
    """A device and a server that train a side network. Both are planned for themselves, each as fast as its budget
    allows: whatever order messages take, a step is the shorter the faster either part is.
    """

    kind = "mobillm"

    def __init__(self, described: DescribedFleet, asked: FleetOptions) -> None:
        super().__init__(described, asked)
        if len(self.specs) != 2:
            raise InputError(
                f"{MOBILLM} is for two members, a device and a server after it, and {len(self.specs)} are described;"
                " describe two"
            )
        bits = self.bits = DEFAULT_BITS if asked.bits is None else asked.bits
        device, server = self.specs
        self.side = side_shape(server.profile)
        check_side(device, server)
        count = self.micro_batches
        self.profiles = (
            device_forward(device.profile, self.side.blocks, bits, micro_batches=count),
            server_profile(server.profile, micro_batches=count, bits=bits),
            alone_profile(device.profile, count),
        )
        """of the device, the server, and the device without a server"""
        self.passing = received_tensors(server.profile)
        self.plans: list[Plan] = []

    @property
    def fits(self) -> bool:
        return bool(self.plans)

    def search(self) -> None:
        made: list[Plan] = []
        for profile, spec, share in zip(self.profiles, (*self.specs, self.specs[0]), SIDE_SHARES):
            part = len(made) < len(self.specs)
            options: dict[str, Any] = {"progress": self.asked.progress} if part else {}
            plan = planner_of(profile).plan(
                spec.budget_bytes, time_limit=share * self.asked.time_limit, gap=self.gap, **options
            )
            if part and plan.train is None:
                raise InfeasibleError(
                    f"member {spec.name!r}: its part does not fit {format_size(spec.budget_bytes)};"
                    f" {format_size(plan.minimum_budget_bytes or 0, round_up=True)} would do",
                    plan.minimum_budget_bytes,
                )
            made.append(sealed(plan.model_copy(update={"policy": MOBILLM})) if part else plan)
        self.plans = made

    def replicas(self) -> tuple[list[Replica], dict[str, Plan]]:
        size = message_bytes(self.passing, self.bits)
        plans = dict(zip(self.names, self.plans))
        passes: tuple[dict[str, int], ...] = ({"to_above": size}, {"from_below": size, "buffers": RINGS})
        parts = [
            self.part(
                at,
                plan,
                exchange_bytes=messages_bytes(plan.device.floor, **passes[at]),
                up=[] if at else passed_of(self.passing),
            )
            for at, plan in enumerate(plans.values())
        ]
        return [Replica(parts=parts, micro_batches=self.micro_batches)], plans

    def fields(self, replicas: Sequence[Replica]) -> dict[str, Any]:
        trained = sum(tensor.bytes for tensor in trained_tensors(self.specs[1].profile))
        return {
            "bits": self.bits,
            "blocks": list(self.side.blocks),
            "rank": self.side.rank,
            "trained_bytes": trained,
        }

    def bound(self, fleet: FleetPlan) -> float:
        return one_way(fleet, bounds=True).least_seconds(self.micro_batches)

    def compared(self, *, interrupted: bool) -> list[Baseline]:
        """A step of backpropagation of the device alone, within its budget."""
        alone, name = self.plans[-1], self.names[0]
        makespan = None if alone.train is None else self.micro_batches * alone.step_seconds
        return [Baseline(name="device alone", makespan_seconds=makespan, shares={name: self.micro_batches})]
