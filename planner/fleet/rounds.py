"""The planner of rounds: each device's part within its budget, its local steps, and where a server is shared, whose
turn it is.

**Without a server** each device holds the whole model and waits for nobody. Plans do not depend on how many steps a
device takes, so each is planned once, for the fastest step that its budget holds beside Flower's processes, and of many
equal ones as many as there is time for; `programs.shared_out` then shares the steps out by speed. With the plans'
proven bounds in the place of their seconds, the same sharing-out gives the bound.

**With a server** each device holds the lower layers. For every device and every cut of the model, device and server are
a pipeline of two stages, each planned within its budget (`search.DivisionSearch`); so many updates of it, after the
start of the server's run, are the service. Steps are shared out by weight. Cuts are tried by their bounds. One is left
out where another is known that is no worse in all: its head, its service and its tail. Then `programs.best_order`
chooses a cut for every device and the order at once. With the bounds of all cuts that might be better in the place of
the services found, the same program bounds the round. Of many devices, those for which there was no time have plans
that were made for others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

from tightfit.planner.fleet.bounds import Candidate, Division, DivisionBounds, Held
from tightfit.planner.fleet.fleet_planner import UNJUDGED, FleetPlanner, figures_of
from tightfit.planner.fleet.fleet_search import DivisionSearch, Pipeline
from tightfit.planner.fleet.io import plan_file, server_plan_file
from tightfit.planner.fleet.members import (
    MemberSpec,
    check_alike,
    check_one_model,
    check_plain,
    checked_members,
    checked_steps,
    described,
    differences,
    rank_of,
    shared,
    trained_tensors,
)
from tightfit.planner.fleet.options import SplitRoundsOptions, WholeRoundsOptions
from tightfit.planner.fleet.part_plans import AlonePlans, StagePlans, no_time, while_there_is_time
from tightfit.planner.fleet.parts import passed_of
from tightfit.planner.fleet.programs import (
    Pace,
    Served,
    ServiceOrder,
    Way,
    best_order,
    makespan_of,
    served,
    shared_by_weight,
    shared_out,
)
from tightfit.planner.fleet.schema import (
    SERVER,
    FederatedBaseline,
    FederatedMember,
    FederatedPlan,
    Link,
    SplitBaseline,
    SplitMember,
    SplitPlan,
    SplitServer,
)
from tightfit.planner.plan_result import gap_to
from tightfit.planner.schema import Plan
from tightfit.profiles.option_fields import keywords_of
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.errors import InfeasibleError, InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.units import format_size

CUT_SHARE, ORDER_SHARE = 0.6, 0.1
"""of the time limit: for plans of all cuts, and for the order; the rest is for what the plan is compared with"""
NO_CUT = "none of the model's cuts leaves it and the server parts that they can hold"

R = TypeVar("R", FederatedPlan, SplitPlan)


@keywords_of(WholeRoundsOptions)
def plan_federated(
    members: Sequence[MemberSpec], steps: int, asked: WholeRoundsOptions
) -> tuple[FederatedPlan, dict[str, Plan]]:
    """The shortest round found of `steps` local steps in all, with its proof, and the plans of its members by name.

    Each member's budget is for all that runs there: `flower_bytes` of it are set aside for Flower's processes. Members
    that cannot hold a step, or would only be waited for, take no part; the plan says why. Ranks may differ between
    members, where alpha / rank does not. Raises InputError for members that cannot train together or a number that
    cannot be used, and InfeasibleError where no device can hold a step.
    """
    specs = checked_members(members)
    check_alike({spec.name: spec.profile for spec in specs})
    return _WholeRounds(specs, steps, asked).plan()


@keywords_of(SplitRoundsOptions)
def plan_split(
    server: MemberSpec, members: Sequence[MemberSpec], steps: int, asked: SplitRoundsOptions
) -> tuple[SplitPlan, dict[str, Plan], dict[str, Plan]]:
    """The shortest round found of `steps` micro-batches in all, with its proof; the plans of the devices that take
    part, and the server's for each of them, both by the device's name.

    Steps are shared out equally, or by `weights` of members, in whole updates. Each device's budget is for all that
    runs there: `flower_bytes` of it are set aside for Flower's processes. Devices for which there is no cut take no
    part. Raises InputError for members that cannot train together or a number that cannot be used, and InfeasibleError
    where no device can take part.
    """
    specs = checked_members(members)
    (server,) = checked_members([server])
    if any(spec.name == SERVER for spec in specs):
        raise InputError(f"a member is called {SERVER!r}, as the server is here; give it another name")
    profiles = {spec.name: spec.profile for spec in specs} | {SERVER: server.profile}
    check_one_model(profiles)
    lora, unit = server.profile.model.lora, server.profile.accumulate
    if not lora:
        raise InputError(
            f"the profiles of {server.profile.model.name} train no adapter, and adapters are what federated rounds add"
            f" up; profile with {spelled('lora_rank')}"
        )
    for name, profile in profiles.items():
        check_plain(name, profile)
    if any(profile.accumulate != unit for profile in profiles.values()):
        raise InputError(
            f"the profiles differ in the steps of an update; profile all with the same {spelled('accumulate')}"
        )
    for name, weight in (asked.weights or {}).items():
        if name not in {spec.name for spec in specs} or not 0 < weight < math.inf:
            raise InputError(f"weight {weight} of member {name!r}: give a number above 0, for a device of the fleet")
    return _SplitRounds(specs, steps, asked, server).plan()


class _Rounds(FleetPlanner, Generic[R]):
    """What is said of a round, split or not."""

    schema: type[R]
    member: type[FederatedMember]

    def __init__(self, specs: Sequence[MemberSpec], steps: int, asked: WholeRoundsOptions) -> None:
        self.unit = specs[0].profile.accumulate
        self.steps = checked_steps(steps, self.unit)
        super().__init__(specs, asked, asked.gap)
        self.flower_bytes, self.start_seconds = asked.flower_bytes, asked.start_seconds
        self.rooms = [max(1, spec.budget_bytes - asked.flower_bytes) for spec in specs]
        """bytes of each device's run"""

    def way(self, link: Link, adapters: tuple[int, int], service: float) -> Way:
        """How a device has its round, with the bytes of the adapters that come and go: one comes and its run gets
        ready, the service takes its seconds, the answer goes.
        """
        down_bytes, up_bytes = adapters
        return Way(
            head=down_bytes / link.down_bytes_per_second + link.latency_seconds + self.start_seconds,
            service=service,
            tail=up_bytes / link.up_bytes_per_second + link.latency_seconds,
        )

    def stated(self, at: int, plan: Plan | None = None, **more: Any) -> Any:
        """A member with its plan; None: it takes no part."""
        spec = self.specs[at]
        figures: dict[str, Any] = {}
        if plan is not None:
            figures = {
                "plan": plan_file(spec.name),
                "plan_fingerprint": plan.fingerprint,
                "peak_bytes": plan.peak_bytes + self.flower_bytes,
            }
        return self.member(
            **described(spec),
            flower_bytes=self.flower_bytes,
            rank=rank_of(spec.profile),
            start_seconds=self.start_seconds,
            **figures | more,
        )

    def rounds(self, members: Sequence[Any], *, makespan: float, bound: float, **more: Any) -> R:
        """The plan of a round, not sealed yet."""
        profile = self.specs[0].profile
        return self.schema(
            **UNJUDGED | figures_of(makespan, bound),
            model=profile.model.name,
            steps=self.steps,
            accumulate=self.unit,
            batch=profile.batch,
            members=[*members],
            **more,
        )


def in_turn(plans: Sequence[object], budgets: Sequence[Any]) -> list[int]:
    """A member for each budget of each of `plans`, which are those of equal members, in an order in which the first few
    are of use to all: of equal members those with the smallest and the largest budget, then those in the middle between
    two. Budgets may have more with them in which members differ, as tuples.
    """
    first: dict[tuple[int, Any], int] = {}
    for at, (own, budget) in enumerate(zip(plans, budgets)):
        first.setdefault((id(own), budget), at)
    equal: dict[int, list[int]] = {}
    for own, budget in sorted(first):
        equal.setdefault(own, []).append(first[own, budget])
    ranked: list[tuple[int, int]] = []
    for members in equal.values():
        order, gaps = [0, len(members) - 1][: len(members)], [(0, len(members) - 1)]
        for low, high in gaps:
            if high - low > 1:
                order.append((low + high) // 2)
                gaps += [(low, order[-1]), (order[-1], high)]
        ranked += [(rank, members[place]) for rank, place in enumerate(order)]
    return [at for _, at in sorted(ranked)]


class _WholePlans:
    """Plans of whole models, of some devices within their rooms."""

    def __init__(self, profiles: Sequence[Profile], rooms: Sequence[int], gap: float) -> None:
        self.plans = shared(profiles, lambda one: AlonePlans(one, 1, gap))
        self.rooms = rooms

    def explore(self, until: float) -> Iterator[tuple[int, int]]:
        """Plan as many as there is time for, in an order in which the first few are of use to all; after each, how many
        of how many have been planned.
        """
        order = in_turn(self.plans, self.rooms)
        for number, (at, share) in enumerate(while_there_is_time(order, until), 1):
            self.plans[at].plan(self.rooms[at], share)
            yield number, len(order)

    def known(self, at: int) -> Plan | None:
        return self.plans[at].known(self.rooms[at])

    def too_small(self, at: int) -> bool:
        """Whether it was found that nothing fits."""
        return self.rooms[at] <= self.plans[at].too_small


# --- without a server -------------------------------------------------------------------------------------------------


class _WholeRounds(_Rounds[FederatedPlan]):
    schema, member = FederatedPlan, FederatedMember

    def plan(self) -> tuple[FederatedPlan, dict[str, Plan]]:
        profiles = [spec.profile for spec in self.specs]
        self.whole = _WholePlans(profiles, self.rooms, self.gap)
        self.own_bytes = [sum(tensor.bytes for tensor in trained_tensors(profile)) for profile in profiles]
        for number, many in self.whole.explore(self.until(1.0)):
            self.report(f"planning devices ({number} of {many})")
        plans = [self.whole.known(at) for at in range(len(self.specs))]
        able = [at for at, plan in enumerate(plans) if plan is not None]
        if not able:
            raise self._nothing_fits()
        self.down_bytes = max(self.own_bytes[at] for at in able)  # the fleet's adapter has the largest rank
        self.paces = [self._pace(at, math.inf if plan is None else plan.step_seconds) for at, plan in enumerate(plans)]
        hoped = [self._pace(at, self._bound(at, plan)) for at, plan in enumerate(plans)]
        taken = self._shared_out(self.paces)
        makespan, bound = makespan_of(self.paces, taken), makespan_of(hoped, self._shared_out(hoped))
        fleet = self.rounds(
            [self._member(at, plans[at], count) for at, count in enumerate(taken)],
            makespan=makespan,
            bound=bound,
            rank=max(rank_of(profiles[at]) for at in able),
            adapter_bytes=self.down_bytes,
            baselines=self._baselines(),
        )
        chosen = {spec.name: plan for spec, plan, count in zip(self.specs, plans, taken) if plan and count}
        return self.judged(fleet, chosen), chosen

    def _pace(self, at: int, step_seconds: float) -> Pace:
        """How fast a device answers by a plan with such steps."""
        way = self.way(self.specs[at].link, (self.down_bytes, self.own_bytes[at]), 0.0)
        return Pace(fixed_seconds=way.head + way.tail, step_seconds=step_seconds)

    def _shared_out(self, paces: Sequence[Pace]) -> list[int]:
        return shared_out(paces, self.steps, self.unit)

    def _bound(self, at: int, plan: Plan | None) -> float:
        """Seconds of a step that no plan of the device undercuts."""
        bound = self.whole.plans[at].bound(self.rooms[at])
        return bound if plan is None else min(bound, plan.step_seconds)

    def _member(self, at: int, plan: Plan | None, count: int) -> Any:
        if plan is None or not count:
            return self.stated(at, adapter_bytes=self.own_bytes[at], reason=self._reason(at, plan))
        return self.stated(
            at,
            plan,
            adapter_bytes=self.own_bytes[at],
            steps=count,
            step_seconds=plan.step_seconds,
            bound_seconds=self._bound(at, plan),
            round_seconds=self.paces[at].answered(count),
        )

    def _reason(self, at: int, plan: Plan | None) -> str:
        if plan is not None:
            return "a round would only wait for it"
        return f"it cannot hold a step: it {self._lacking(at)}" if self.whole.too_small(at) else no_time()

    def _needed(self, at: int) -> int:
        return self.whole.plans[at].least_room(self.until(1.0) - time.monotonic()) + self.flower_bytes

    def _lacking(self, at: int) -> str:
        return (
            f"needs {format_size(self._needed(at))}, of which {format_size(self.flower_bytes)} for Flower, and may take"
            f" {format_size(self.specs[at].budget_bytes)}"
        )

    def _nothing_fits(self) -> InfeasibleError:
        planned = [at for at in range(len(self.specs)) if self.whole.too_small(at)]
        told = "; ".join(f"{self.names[at]} {self._lacking(at)}" for at in planned)
        if others := len(self.specs) - len(planned):
            told += f"; of {others} others none was planned: {no_time()}"
        return InfeasibleError(
            f"no device can hold a step: {told}; give one of them more memory, or profile with a smaller batch or a"
            " shorter sequence",
            min(self._needed(at) for at in planned),
        )

    # --- what it is compared with -----------------------------------------------------------------------------------

    def _baselines(self) -> list[FederatedBaseline]:
        names, paces = self.names, self.paces
        units, count = self.steps // self.unit, len(names)
        shares = [self.unit * share for share in shared_by_weight([1.0] * count, units)]
        unfit = [name for name, share, pace in zip(names, shares, paces) if share and pace.step_seconds == math.inf]
        equal = FederatedBaseline(
            name="equal steps",
            makespan_seconds=None if unfit else makespan_of(paces, shares),
            steps=dict(zip(names, shares)),
            reason=f"{', '.join(unfit)} cannot hold a step" if unfit else None,
        )
        fastest = min(range(count), key=lambda at: paces[at].answered(self.steps))
        steps = {name: self.steps * (at == fastest) for at, name in enumerate(names)}
        alone = paces[fastest].answered(self.steps)
        return [equal, FederatedBaseline(name="fastest alone", makespan_seconds=alone, steps=steps)]


# --- with a server ----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Device:
    """A device with the server, as a pipeline of two stages."""

    spec: MemberSpec
    search: DivisionSearch
    made: dict[int, Pipeline | None] = field(default_factory=dict)
    """by cut: what was planned; None: something of it does not fit"""

    def division(self, cut: int) -> Division:
        layers = self.search.candidates[1].plans.layers
        return (Held(0, 0, cut), Held(1, cut, layers))

    @property
    def cuts(self) -> list[int]:
        """The places at which the model can be cut, so that what is trained lies on one side of it."""
        plans = self.search.candidates[0].plans
        return [at for at in sorted(plans.cuts) if self.lower_bytes[at] is not None]

    @cached_property
    def lower_bytes(self) -> dict[int, int | None]:
        """Bytes of the adapter's lower part, by cut; None where a trained tensor is used on both sides."""
        profile = self.spec.profile
        sizes = {tensor.name: tensor.bytes for tensor in trained_tensors(profile)}
        own = [sizes.keys() & set(layer.bindings.values()) for layer in profile.layers]
        result: dict[int, int | None] = {}
        for at in self.search.candidates[0].plans.cuts:
            below, above = set().union(*own[:at]), set().union(*own[at:])
            result[at] = None if below & above else sum(sizes[name] for name in below)
        return result

    def bound(self, cut: int) -> float:
        """Seconds of an update that no plans of the two stages undercut."""
        return DivisionBounds(self.search.candidates, self.search.micro_batches).bound(self.division(cut))

    def attempt(self, cut: int) -> None:
        """Plan both stages, and choose how far the device is ahead."""
        if cut in self.made:
            return
        search, division = self.search, self.division(cut)
        if all(search.known(division, at, 0) for at in range(len(division))):
            found = search.choose(division)
            self.made[cut] = found if found.makespan < math.inf else None
        elif search.plans:
            self.made[cut] = None


@dataclass(frozen=True, kw_only=True)
class _Choices:
    """The ways in which each device that takes part can be served."""

    devices: list[int]
    cuts: list[list[int]]
    ways: list[list[Way]]


class _SplitRounds(_Rounds[SplitPlan]):
    schema, member = SplitPlan, SplitMember

    def __init__(self, specs: Sequence[MemberSpec], steps: int, asked: SplitRoundsOptions, server: MemberSpec) -> None:
        super().__init__(specs, steps, asked)
        self.server, self.server_start_seconds = server, asked.server_start_seconds
        self.weights = [(asked.weights or {}).get(spec.name, 1.0) for spec in specs]
        profiles = [server.profile, *(spec.profile for spec in specs)]
        above, *below = shared(profiles, lambda one: StagePlans(one, self.unit, 0, self.gap))
        upper = Candidate(name=SERVER, plans=above, budget_bytes=server.budget_bytes, link=server.link)
        equal: dict[tuple[int, int, Link], _Device] = {}
        self.devices: list[_Device] = []
        for spec, plans, room in zip(specs, below, self.rooms):
            one = Candidate(name=spec.name, plans=plans, budget_bytes=room, link=spec.link)
            search = DivisionSearch(
                candidates=[one, upper], micro_batches=self.unit, gap=self.gap, deadline=self.until(1.0)
            )
            known = equal.setdefault(one.kind, _Device(spec=spec, search=search))
            self.devices.append(replace(known, spec=spec))

    def plan(self) -> tuple[SplitPlan, dict[str, Plan], dict[str, Plan]]:
        self._explore()
        able = [at for at, device in enumerate(self.devices) if any(device.made.values())]
        if not able:
            raise self._nothing_fits()
        units = shared_by_weight([self.weights[at] for at in able], self.steps // self.unit)
        self.shares = dict.fromkeys(range(len(self.devices)), 0) | dict(zip(able, units))
        found, hoped = self._choices(able, bounds=False), self._choices(able, bounds=True)
        self.report("choosing the order")
        serving = best_order(found.ways, ORDER_SHARE * self.asked.time_limit / 2)
        ideal = best_order(hoped.ways, ORDER_SHARE * self.asked.time_limit / 2)
        plans, server_plans = self._member_plans(found, serving)
        members = [self._member(found, one, plans, server_plans) for one in serving.served]
        members += [self._idle(at) for at in range(len(self.specs)) if at not in found.devices]
        profile = self.server.profile
        unlike = differences({self.names[at]: self.specs[at].profile for at in found.devices} | {SERVER: profile})
        fleet = self.rounds(
            members,
            makespan=serving.makespan,
            bound=ideal.bound,
            rank=rank_of(profile),
            adapter_bytes=sum(tensor.bytes for tensor in trained_tensors(profile)),
            server=SplitServer(
                device=profile.device.name,
                measured=profile.device.measured,
                budget_bytes=self.server.budget_bytes,
                link=self.server.link,
                start_seconds=self.server_start_seconds,
            ),
            order_gap=gap_to(serving.makespan, serving.bound),
            bit_identical=not unlike,
            differences=unlike,
            baselines=[
                self._as_described(found, serving),
                self._one_cut(found),
                self._whole(found),
                *self._without(found, serving),
            ],
        )
        return self.judged(fleet, plans, server_plans), plans, server_plans

    # --- cuts -------------------------------------------------------------------------------------------------------

    def _explore(self) -> None:
        """Plan the cuts of the devices that may be of use, those first whose bounds are the lowest; for devices for
        which there is no time, look for one cut for which others' plans can be used.
        """
        links = [tuple(spec.link.model_dump().values()) for spec in self.specs]
        order = in_turn([device.search.candidates[0].plans for device in self.devices], [*zip(self.rooms, links)])
        waiting = {id(device.search): device for device in self.devices}
        for number, (at, share) in enumerate(while_there_is_time(order, self.until(CUT_SHARE)), 1):
            device = waiting.pop(id(self.devices[at].search))
            device.search.deadline = time.monotonic() + share
            while left := [cut for cut in self._useful(device) if cut not in device.made]:
                self.report(f"planning cuts of {device.spec.name} ({number} of {len(order)})")
                device.attempt(min(left, key=lambda cut: (device.bound(cut), cut)))
                if any(device.made.values()) and time.monotonic() > device.search.deadline:
                    break
        for device in waiting.values():
            device.search.plans = False
            for cut in sorted(self._useful(device), key=lambda cut: (device.bound(cut), cut)):
                device.attempt(cut)
                if device.made.get(cut):
                    break

    def _useful(self, device: _Device) -> list[int]:
        """The cuts that have been planned, or may be better than each of these in its head, its service or its tail.
        Head and tail are as long as the lower part of the adapter is large.
        """
        known = {cut: found.makespan for cut, found in device.made.items() if found}
        result = []
        for cut in device.cuts:
            if cut in known:
                result.append(cut)
            elif cut not in device.made:
                least, size = device.bound(cut), self._lower(device, cut)
                beaten = any(one <= least and self._lower(device, other) <= size for other, one in known.items())
                if least < math.inf and not beaten:
                    result.append(cut)
        return result

    def _lower(self, device: _Device, cut: int) -> int:
        size = device.lower_bytes[cut]
        assert size is not None
        return size

    def _way(self, at: int, cut: int, update_seconds: float, units: int | None = None) -> Way:
        """How a device is served that takes its share, or so many updates."""
        size, count = self._lower(self.devices[at], cut), self.shares[at] if units is None else units
        return self.way(self.specs[at].link, (size, size), self.server_start_seconds + count * update_seconds)

    def _choices(self, able: Sequence[int], *, bounds: bool) -> _Choices:
        """The ways that have been planned; with `bounds` those that may be better than the best too, in the seconds
        that they take at least.
        """
        devices, cuts, ways = [], [], []
        for at in able:
            if not self.shares[at]:
                continue
            device = self.devices[at]
            own = [cut for cut in self._useful(device) if bounds or device.made.get(cut)]
            seconds = [device.bound(cut) if bounds else self._made(at, cut).makespan for cut in own]
            devices.append(at)
            cuts.append(own)
            ways.append([self._way(at, cut, one) for cut, one in zip(own, seconds)])
        return _Choices(devices=devices, cuts=cuts, ways=ways)

    def _made(self, at: int, cut: int) -> Pipeline:
        found = self.devices[at].made[cut]
        assert found is not None
        return found

    # --- members ----------------------------------------------------------------------------------------------------

    def _member_plans(self, found: _Choices, serving: ServiceOrder) -> tuple[dict[str, Plan], dict[str, Plan]]:
        plans, server_plans = {}, {}
        for one in serving.served:
            at = found.devices[one.device]
            cut = found.cuts[one.device][one.way]
            pipeline, spec = self._made(at, cut), self.specs[at]
            below, above = self.devices[at].search.candidates
            lower, upper = (held.layers for held in pipeline.division)
            budget = below.plans.common_budget(lower, below.budget_bytes, 0)
            plans[spec.name] = below.plans.member_plan(lower, budget, 0)
            server_plans[spec.name] = above.plans.member_plan(upper, above.budget_bytes, pipeline.aheads[0])
        return plans, server_plans

    def _member(self, found: _Choices, one: Served, plans: Mapping[str, Plan], server_plans: Mapping[str, Plan]) -> Any:
        at = found.devices[one.device]
        number, way = found.cuts[one.device][one.way], found.ways[one.device][one.way]
        spec, device, pipeline = self.specs[at], self.devices[at], self._made(at, number)
        below, above = device.search.candidates
        cut, (lower, upper) = below.plans.cuts[number], (held.layers for held in pipeline.division)
        names = [layer.name for layer in spec.profile.layers]
        plan, server_plan = plans[spec.name], server_plans[spec.name]
        return self.stated(
            at,
            plan,
            weight=self.weights[at],
            server_plan=server_plan_file(spec.name),
            server_plan_fingerprint=server_plan.fingerprint,
            layers=number,
            layer_names=names[number - 1 : number + 1],
            ahead=pipeline.aheads[0],
            up=passed_of(cut.up_passing),
            down=passed_of(cut.down_passing),
            adapter_bytes=self._lower(device, number),
            steps=self.shares[at] * self.unit,
            step_seconds=pipeline.makespan / self.unit,
            bound_seconds=min(pipeline.makespan, device.bound(number)) / self.unit,
            server_peak_bytes=server_plan.peak_bytes,
            exchange_bytes=below.plans.extra_bytes(lower, 0),
            server_exchange_bytes=above.plans.extra_bytes(upper, pipeline.aheads[0]),
            head_seconds=way.head,
            service_seconds=way.service,
            tail_seconds=way.tail,
            begin_seconds=one.begin,
            round_seconds=one.answered,
        )

    def _idle(self, at: int) -> Any:
        fits = any(self.devices[at].made.values())
        reason = "its share of a round is less than an update" if fits else self._lacking(at)
        return self.stated(at, weight=self.weights[at], reason=reason)

    def _lacking(self, at: int) -> str:
        device = self.devices[at]
        if not device.search.plans and any(device.bound(cut) < math.inf for cut in device.cuts):
            return no_time()
        return (
            f"{NO_CUT}, within {format_size(self.specs[at].budget_bytes)}, of which {format_size(self.flower_bytes)}"
            f" are for Flower, and {format_size(self.server.budget_bytes)}"
        )

    def _nothing_fits(self) -> InfeasibleError:
        """The error for a fleet of which no device can take part, with the smallest budget of one that could."""
        needed = []
        for device in self.devices:
            below = device.search.candidates[0]
            for cut in device.cuts[:1]:
                room = below.plans.least_room((0, cut), 1.0)
                needed.append(room + below.plans.extra_bytes((0, cut), 0) + self.flower_bytes)
        least = min(needed, default=0)
        names = ", ".join(spec.name for spec in self.specs)
        return InfeasibleError(
            f"no device can take part ({names}): {NO_CUT}. A device needs {format_size(least)} for the lowest layers"
            f" alone, and the server may take {format_size(self.server.budget_bytes)} for all others; give more memory,"
            " or profile with a smaller batch or a shorter sequence",
            least,
        )

    # --- what it is compared with -----------------------------------------------------------------------------------

    def _as_described(self, found: _Choices, serving: ServiceOrder) -> SplitBaseline:
        """The chosen cuts, in the order in which devices are described."""
        chosen = {one.device: one.way for one in serving.served}
        order = [(device, chosen[device]) for device in sorted(chosen)]
        return self._baseline("order as described", found, served(found.ways, order))

    def _one_cut(self, found: _Choices) -> SplitBaseline:
        """The best cut that is the same for all, in its best order."""
        best: SplitBaseline | None = None
        late = False
        for cut in self.devices[found.devices[0]].cuts:
            for at in found.devices:
                late = late or time.monotonic() > self.until(1.0)
                if not late:
                    search = self.devices[at].search
                    search.deadline, search.plans = self.until(1.0), True
                    self.devices[at].attempt(cut)
            if any(not self.devices[at].made.get(cut) for at in found.devices):
                continue
            ways = [[self._way(at, cut, self._made(at, cut).makespan)] for at in found.devices]
            one = _Choices(devices=found.devices, cuts=[[cut] for _ in found.devices], ways=ways)
            made = self._baseline("one cut for all", one, best_order(ways, 0.0 if late else 1.0).served)
            if best is None or (made.makespan_seconds or 0.0) < (best.makespan_seconds or 0.0):
                best = made
        if best is not None:
            return best
        reason = no_time() if late else "there is none that all can hold"
        return SplitBaseline(name="one cut for all", makespan_seconds=None, layers={}, reason=reason)

    def _baseline(
        self,
        name: Literal["order as described", "one cut for all", "without a device"],
        choices: _Choices,
        order: Sequence[Served],
    ) -> SplitBaseline:
        layers = {self.specs[choices.devices[one.device]].name: choices.cuts[one.device][one.way] for one in order}
        return SplitBaseline(name=name, makespan_seconds=max(one.answered for one in order), layers=layers)

    def _without(self, found: _Choices, serving: ServiceOrder) -> list[SplitBaseline]:
        """Rounds without one of the devices, where they are shorter by more than its part: others take its steps, with
        the cuts that were chosen.
        """
        chosen = {one.device: found.cuts[one.device][one.way] for one in serving.served}
        result = []
        several = range(len(chosen) if len(chosen) > 1 else 0)
        for number, share in while_there_is_time(several, self.until(1.0)):
            others = {at: chosen[place] for place, at in enumerate(found.devices) if place != number}
            units = shared_by_weight([self.weights[at] for at in others], self.steps // self.unit)
            ways = [
                [self._way(at, cut, self._made(at, cut).makespan, count)]
                for (at, cut), count in zip(others.items(), units)
                if count
            ]
            makespan = best_order(ways, min(1.0, share)).makespan
            if makespan < serving.makespan * (1 - 1 / len(chosen)):
                layers = {self.specs[at].name: cut for at, cut in others.items()}
                result.append(SplitBaseline(name="without a device", makespan_seconds=makespan, layers=layers))
        return result

    def _whole(self, found: _Choices) -> SplitBaseline:
        """Every device holds all layers, takes as many steps, and waits for nobody."""
        layers = {self.names[at]: len(self.server.profile.layers) for at in found.devices}
        size = sum(tensor.bytes for tensor in trained_tensors(self.server.profile))
        profiles, rooms = zip(*((self.specs[at].profile, self.rooms[at]) for at in found.devices))
        whole = _WholePlans(profiles, rooms, self.gap)
        for _ in whole.explore(self.until(1.0)):
            if any(map(whole.too_small, range(len(rooms)))):
                break
        longest = 0.0
        for number, at in enumerate(found.devices):
            plan = whole.known(number)
            if plan is None:
                reason = f"{self.names[at]} cannot hold all layers" if whole.too_small(number) else no_time()
                return SplitBaseline(name="whole models", makespan_seconds=None, layers=layers, reason=reason)
            steps = self.shares[at] * self.unit * plan.step_seconds
            longest = max(longest, self.way(self.specs[at].link, (size, size), steps).alone)
        return SplitBaseline(name="whole models", makespan_seconds=longest, layers=layers)
