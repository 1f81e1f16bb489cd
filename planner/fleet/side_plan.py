"""The planner of a device and a server that train a side network, and the judge of its plan.

Both parts are planned for themselves, each as fast as its budget allows: whatever order messages take, a step is the shorter
the faster either part is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tightfit.planner.fleet.io import plan_file, sealed_fleet
from tightfit.planner.fleet.member_profiles import alone_profile, check_equal
from tightfit.planner.fleet.pipeline_schema import Passed
from tightfit.planner.fleet.plan import MemberSpec, checked_count, checked_members
from tightfit.planner.fleet.side import RINGS, device_profile, received_tensors, server_profile, side_shape
from tightfit.planner.fleet.side_schema import SideMember, SidePlan
from tightfit.planner.fleet.side_times import OneWay
from tightfit.planner.fleet.simulate import ROUNDING, InvalidFleet, check_link, same
from tightfit.planner.plan import planner_of
from tightfit.planner.plan_result import gap_to, sealed
from tightfit.planner.problem.device_forward import DEFAULT_BITS, sent_tensors
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import Progress, checked_gap, checked_limit
from tightfit.planner.simulation.simulate import simulate
from tightfit.profiles.models.side_shape import CONFIG_KEY
from tightfit.profiles.schema import MOBILLM, Floor, Profile, adamw
from tightfit.runtime.common.errors import InfeasibleError, InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.units import format_size
from tightfit.runtime.engine.fleet.message import Passing, offsets, paged
from tightfit.runtime.engine.training.job import RECEIVE, SEND

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
    parts = [
        _member(device, "forward", plans[device.name], passing, bits),
        _member(server, "side network", plans[server.name], passing, bits),
    ]
    fleet = SidePlan(
        fingerprint="",
        model=device.profile.model.name,
        micro_batches=count,
        batch=device.profile.batch,
        bits=bits,
        blocks=list(side.blocks),
        rank=side.rank,
        members=parts,
        message=[Passed(shape=list(one.shape), dtype=one.dtype) for one in passing],
        message_bytes=offsets(passing, bits)[1],
        makespan_seconds=0.0,
        bound_seconds=0.0,
        gap=0.0,
        device_alone_seconds=None if alone.train is None else count * alone.step_seconds,
        solve_seconds=0.0,
    )
    makespan, spans = _times(fleet).play(count, (device.name, server.name))
    bound = min(makespan, _times(fleet, bounds=True).least_seconds(count))
    figures: dict[str, Any] = {
        "makespan_seconds": makespan,
        "bound_seconds": bound,
        "gap": gap_to(makespan, bound),
        "timeline": spans,
        "solve_seconds": time.monotonic() - started,
    }
    fleet = sealed_fleet(fleet.model_copy(update=figures))
    simulate_side(fleet, plans)
    return fleet, plans


def simulate_side(fleet: SidePlan, plans: Mapping[str, Plan]) -> float:
    """Seconds of a step of `fleet` with the plans of its members, by name, as their replays and the clock find them.

    Raises InvalidFleet with the name of the invariant that breaks: link, plan, optimizer, model, messages (what one sends is
    what the other receives, in the stated form), exchange (the plans' floors have room for them), budget, peak, seconds,
    makespan, bound.
    """
    names = [member.name for member in fleet.members]
    passing = tuple(Passing(shape=tuple(one.shape), dtype=one.dtype) for one in fleet.message)
    if fleet.message_bytes != offsets(passing, fleet.bits)[1]:
        raise InvalidFleet("messages", "message_bytes", f"{fleet.message_bytes} bytes are stated")
    for member in fleet.members:

        def fail(invariant: str, text: str, name: str = member.name) -> InvalidFleet:
            return InvalidFleet(invariant, name, text)

        check_link(member.name, member.link)
        plan = plans.get(member.name)
        if plan is None or plan.fingerprint != member.plan_fingerprint:
            raise fail("plan", "its plan is missing or another one")
        forward = member.does == "forward"
        wanted = device_optimizer(fleet.micro_batches) if forward else adamw(fleet.micro_batches)
        if plan.optimizer != wanted:
            raise fail("optimizer", f"its plan is for {plan.optimizer}, its part needs {wanted}")
        if (plan.model.name, plan.batch) != (fleet.model, fleet.batch):
            raise fail("model", f"its plan is of {plan.model.name} in batches of {plan.batch}")
        told = sent_tensors(plan, SEND if forward else RECEIVE)
        if told != (passing if forward else passing[1:], fleet.bits):  # labels are received as a batch
            raise fail(
                "messages", f"its plan passes {len(told[0])} tensors of {told[1]} bits in another form than stated"
            )
        floor = plan.device.floor
        if member.exchange_bytes != exchange_bytes(floor, passing, fleet.bits) or (
            plan.floor_bytes != floor.held_bytes or floor.resident_bytes < member.exchange_bytes
        ):
            raise fail("exchange", f"{member.exchange_bytes} bytes are set aside for messages")
        found = simulate(plan)
        if plan.peak_bytes > member.budget_bytes:
            raise fail("budget", f"its plan peaks at {plan.peak_bytes} bytes, {member.budget_bytes} are allowed")
        if not member.peak_bytes == plan.peak_bytes == found.peak_bytes:
            raise fail("peak", f"{member.peak_bytes} bytes are stated, the replay finds {found.peak_bytes}")
        if not same(member.micro_batch_seconds, found.step_seconds, found.step_seconds):
            raise fail("seconds", f"{member.micro_batch_seconds} s are stated, the replay finds {found.step_seconds} s")
        if not 0 <= member.bound_seconds <= found.step_seconds * (1 + ROUNDING):
            raise fail("bound", f"{member.bound_seconds} s are said to be a lower bound of {found.step_seconds} s")
    makespan, _ = _times(fleet).play(fleet.micro_batches, (names[0], names[1]))
    if not same(fleet.makespan_seconds, makespan, makespan):
        raise InvalidFleet(
            "makespan", "makespan_seconds", f"{fleet.makespan_seconds} s are stated, the replay finds {makespan}"
        )
    if not 0 <= fleet.bound_seconds <= makespan * (1 + ROUNDING):
        raise InvalidFleet(
            "bound", "bound_seconds", f"{fleet.bound_seconds} s are said to be a lower bound of {makespan} s"
        )
    return makespan


def device_optimizer(micro_batches: int) -> dict[str, Any]:
    """The `optimizer` field of the device's plan."""
    made: dict[str, Any] = {"name": MOBILLM, "state_tensors": 0}
    return made if micro_batches == 1 else {**made, "accumulate": micro_batches}


def exchange_bytes(floor: Floor, passing: Sequence[Passing], bits: int) -> int:
    """Bytes that either member holds for messages: the connections, and two of them."""
    return floor.transport_bytes + RINGS * paged(offsets(passing, bits)[1])


def _member(
    spec: MemberSpec, does: Literal["forward", "side network"], plan: Plan, passing: Sequence[Passing], bits: int
) -> SideMember:
    return SideMember(
        name=spec.name,
        does=does,
        device=spec.profile.device.name,
        measured=spec.profile.device.measured,
        budget_bytes=spec.budget_bytes,
        link=spec.link,
        plan=plan_file(spec.name),
        plan_fingerprint=plan.fingerprint,
        micro_batch_seconds=plan.step_seconds,
        bound_seconds=plan.bound_seconds,
        peak_bytes=plan.peak_bytes,
        exchange_bytes=exchange_bytes(plan.device.floor, passing, bits),
    )


def _times(fleet: SidePlan, *, bounds: bool = False) -> OneWay:
    """The clock of a step, of what the plans take or, with `bounds`, of what no plans undercut."""
    device, server = fleet.members
    return OneWay(
        device_seconds=device.bound_seconds if bounds else device.micro_batch_seconds,
        server_seconds=server.bound_seconds if bounds else server.micro_batch_seconds,
        message_bytes=fleet.message_bytes,
        device_link=device.link,
        server_link=server.link,
    )


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
