"""The planner of a device and a server that train a side network.

Both parts are planned for themselves, each as fast as its budget allows: whatever order messages take, a step is the shorter
the faster either part is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

from tightfit.planner.fleet.io import plan_file
from tightfit.planner.fleet.member_profiles import alone_profile, check_equal
from tightfit.planner.fleet.parts import RINGS, message_bytes, messages_bytes, passed_of
from tightfit.planner.fleet.plan import (
    UNJUDGED,
    MemberSpec,
    checked_count,
    checked_members,
    described,
    figures_of,
    judged,
)
from tightfit.planner.fleet.replay import one_way, replayed
from tightfit.planner.fleet.schema import SideMember, SidePlan
from tightfit.planner.fleet.side import device_profile, received_tensors, server_profile, side_shape
from tightfit.planner.plan import planner_of
from tightfit.planner.plan_result import sealed
from tightfit.planner.problem.device_forward import DEFAULT_BITS
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import Progress, checked_gap, checked_limit
from tightfit.profiles.models.side_shape import CONFIG_KEY
from tightfit.profiles.schema import MOBILLM, Profile
from tightfit.runtime.common.errors import InfeasibleError, InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.units import format_size

DOES: tuple[Literal["forward", "side network"], ...] = ("forward", "side network")
"""what the device does, and the server"""
SHARES = {"device": 0.4, "server": 0.3, "alone": 0.3}
"""of the time limit: for the plans of both members, and for that of the device without a server"""


def plan_side(
    members: Sequence[MemberSpec],
    micro_batches: int,
    *,
    bits: int = DEFAULT_BITS,
    time_limit: float = 120.0,
    gap: float = 1e-3,
    progress: Progress | None = None,
) -> tuple[SidePlan, dict[str, Plan]]:
    """The plan of a step of `micro_batches` micro-batches, with its proof, and the plans of both members by name.

    `members`: the device with its profile of the model, and the server with its profile of the side network, in this
    order. `bits`: 8 or 4 to round activations, 0 to send them as they are. `progress` is the planner's own. Raises
    InputError for members that cannot train together or a number that cannot be used, InfeasibleError where a part does
    not fit.
    """
    started = time.monotonic()
    specs = checked_members(members)
    count, limit, gap = checked_count(micro_batches), checked_limit(time_limit), checked_gap(gap)
    if len(specs) != 2:
        raise InputError(
            f"{MOBILLM} is for two members, a device and a server after it, and {len(specs)} are described; describe two"
        )
    device, server = specs
    side = side_shape(server.profile)
    _check_one_model(device, server)
    made = {
        device.name: device_profile(device.profile, side, micro_batches=count, bits=bits),
        server.name: server_profile(server.profile, micro_batches=count, bits=bits),
    }
    plans: dict[str, Plan] = {}
    for spec, share in ((device, SHARES["device"]), (server, SHARES["server"])):
        plan = planner_of(made[spec.name]).plan(spec.budget_bytes, time_limit=share * limit, gap=gap, progress=progress)
        if plan.train is None:
            raise InfeasibleError(
                f"member {spec.name!r}: its part does not fit {format_size(spec.budget_bytes)};"
                f" {format_size(plan.minimum_budget_bytes or 0, round_up=True)} would do",
                plan.minimum_budget_bytes,
            )
        plans[spec.name] = sealed(plan.model_copy(update={"policy": MOBILLM}))
    alone = planner_of(alone_profile(device.profile, count)).plan(
        device.budget_bytes, time_limit=SHARES["alone"] * limit, gap=gap
    )
    passing = received_tensors(server.profile)
    size = message_bytes(passing, bits)
    passes: dict[str, dict[str, int]] = {
        "forward": {"to_above": size},
        "side network": {"from_below": size, "buffers": RINGS},
    }
    parts = [
        SideMember(
            **described(spec),
            does=does,
            plan=plan_file(spec.name),
            plan_fingerprint=plan.fingerprint,
            micro_batch_seconds=plan.step_seconds,
            bound_seconds=plan.bound_seconds,
            peak_bytes=plan.peak_bytes,
            exchange_bytes=messages_bytes(plan.device.floor, **passes[does]),
        )
        for spec, does, plan in zip(specs, DOES, plans.values())
    ]
    fleet = SidePlan(
        **UNJUDGED,
        model=device.profile.model.name,
        micro_batches=count,
        batch=device.profile.batch,
        bits=bits,
        blocks=list(side.blocks),
        rank=side.rank,
        members=parts,
        message=passed_of(passing),
        message_bytes=size,
        device_alone_seconds=None if alone.train is None else count * alone.step_seconds,
    )
    found = replayed(fleet, plans)
    figures = figures_of(found.makespan_seconds, one_way(fleet, bounds=True).least_seconds(count))
    return judged(fleet, plans, started, timeline=found.timeline, **figures), plans


def _check_one_model(device: MemberSpec, server: MemberSpec) -> None:
    def facts(profile: Profile) -> dict[str, Any]:
        config = {key: value for key, value in profile.model.config.items() if key != CONFIG_KEY}
        return {
            "model": profile.model.name,
            "weights": profile.model.store_fingerprint,
            "batch": profile.batch,
            "seq": profile.seq,
            "dtype": profile.compute_dtype,
            "config": config,
        }

    if CONFIG_KEY in device.profile.model.config:
        raise InputError(
            f"member {device.name!r}: its profile is of a side network, which the server trains; give the device's profile of the"
            " model, and describe the device first"
        )
    check_equal(
        {spec.name: facts(spec.profile) for spec in (device, server)},
        lambda one, other: "" if isinstance(other, dict) else f" ({one} and {other})",
        f" but for {spelled('side_rank')}",
    )
