"""Plans split federated rounds: each device's lower layers, the server's plan for the rest, and the order of services.

For every device and every cut of the model, device and server are a pipeline of two stages, each planned within its
budget (`stage_plans`, `pipeline_search`); so many updates of it, after the start of the server's run, are the service. Cuts
are tried by their bounds. One is left out where another is known that is no worse in all: its head, its service and its
tail. Then `service_order` chooses a cut for every device and the order at once. With the bounds of all cuts that might be
better in the place of the services found, the same program bounds the round. Of many devices, those for which there was no time
have plans that were made for others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from tightfit.planner.fleet.alone import AlonePlans, in_turn
from tightfit.planner.fleet.federated import NODE_BYTES, START_SECONDS, check_plain, rank_of
from tightfit.planner.fleet.io import plan_file, server_plan_file
from tightfit.planner.fleet.member_plans import no_time, while_there_is_time
from tightfit.planner.fleet.member_profiles import check_one_model, differences
from tightfit.planner.fleet.parts import passed_of
from tightfit.planner.fleet.pieces import trained_tensors
from tightfit.planner.fleet.pipeline_bounds import Candidate, Division, DivisionBounds, Held
from tightfit.planner.fleet.pipeline_search import Pipeline, PipelineSearch
from tightfit.planner.fleet.plan import (
    UNJUDGED,
    MemberSpec,
    checked_members,
    checked_steps,
    described,
    figures_of,
    judged,
    report,
    shared,
)
from tightfit.planner.fleet.schema import SERVER, Link, SplitBaseline, SplitMember, SplitPlan, SplitServer
from tightfit.planner.fleet.service_order import Served, Serving, Way, best_order, served
from tightfit.planner.fleet.stage_plans import StagePlans
from tightfit.planner.plan_result import gap_to
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import Progress, checked_gap, checked_limit
from tightfit.runtime.common.errors import InfeasibleError, InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.units import format_size

SERVER_START_SECONDS = 4.0
"""of a service beside its steps: until the server's run trains, and has ended. Measured with a model of three layers on two
busy cores: 3.2 to 5.8 s"""
CUT_SHARE, ORDER_SHARE = 0.6, 0.1
"""of the time limit: for plans of all cuts, and for the order; the rest is for what the plan is compared with"""
Baseline = Literal["order as described", "one cut for all", "without a device"]
NO_CUT = "none of the model's cuts leaves it and the server parts that they can hold"


def plan_split(
    server: MemberSpec,
    members: Sequence[MemberSpec],
    steps: int,
    *,
    weights: Mapping[str, float] | None = None,
    flower_bytes: int = NODE_BYTES,
    start_seconds: float = START_SECONDS,
    server_start_seconds: float = SERVER_START_SECONDS,
    time_limit: float = 120.0,
    gap: float = 1e-3,
    progress: Progress | None = None,
) -> tuple[SplitPlan, dict[str, Plan], dict[str, Plan]]:
    """The shortest round found of `steps` micro-batches in all, with its proof; the plans of the devices that take part,
    and the server's for each of them, both by the device's name.

    Steps are shared out equally, or by `weights` of members, in whole updates. Each device's budget is for all that runs
    there: `flower_bytes` of it are set aside for Flower's processes. Devices for which there is no cut take no part.
    Raises InputError for members that cannot train together or a number that cannot be used, and InfeasibleError where
    no device can take part.
    """
    members = checked_members(members)
    (server,) = checked_members([server])
    if any(spec.name == SERVER for spec in members):
        raise InputError(f"a member is called {SERVER!r}, as the server is here; give it another name")
    profiles = {spec.name: spec.profile for spec in members} | {SERVER: server.profile}
    check_one_model(profiles)
    lora, unit = server.profile.model.lora, server.profile.accumulate
    if not lora:
        raise InputError(
            f"the profiles of {server.profile.model.name} train no adapter, and adapters are what federated rounds add up;"
            f" profile with {spelled('lora_rank')}"
        )
    for name, profile in profiles.items():
        check_plain(name, profile)
    if any(profile.accumulate != unit for profile in profiles.values()):
        raise InputError(
            f"the profiles differ in the steps of an update; profile all with the same {spelled('accumulate')}"
        )
    checked_steps(steps, unit)
    for name, weight in (weights or {}).items():
        if name not in profiles or not 0 < weight < math.inf:
            raise InputError(f"weight {weight} of member {name!r}: give a number above 0, for a member of the fleet")
    return _SplitPlanner(
        server=server,
        specs=members,
        steps=steps,
        weights=[(weights or {}).get(spec.name, 1.0) for spec in members],
        flower_bytes=flower_bytes,
        start_seconds=start_seconds,
        server_start_seconds=server_start_seconds,
        limit=checked_limit(time_limit),
        gap=checked_gap(gap),
        progress=progress,
    ).plan()


def shared_by_weight(weights: Sequence[float], units: int) -> list[int]:
    """Whole shares of `units` in proportion to the weights: the largest remainders are rounded up, the first of equals."""
    whole = sum(weights)
    exact = [units * weight / whole for weight in weights]
    shares = [math.floor(one) for one in exact]
    order = sorted(range(len(weights)), key=lambda at: (shares[at] - exact[at], at))
    for at in order[: units - sum(shares)]:
        shares[at] += 1
    return shares


@dataclass(kw_only=True)
class _Device:
    """A device with the server, as a pipeline of two stages."""

    spec: MemberSpec
    search: PipelineSearch
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


@dataclass(kw_only=True)
class _SplitPlanner:
    server: MemberSpec
    specs: Sequence[MemberSpec]
    steps: int
    weights: Sequence[float]
    flower_bytes: int
    start_seconds: float
    server_start_seconds: float
    limit: float
    gap: float
    progress: Progress | None

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.unit = self.server.profile.accumulate
        profiles = [self.server.profile, *(spec.profile for spec in self.specs)]
        above, *below = shared(profiles, lambda one: StagePlans(one, self.unit, 0, self.gap))
        server = Candidate(name=SERVER, plans=above, budget_bytes=self.server.budget_bytes, link=self.server.link)
        self.rooms = [max(1, spec.budget_bytes - self.flower_bytes) for spec in self.specs]
        """bytes of each device's run"""
        equal: dict[tuple[int, int, Link], _Device] = {}
        self.devices: list[_Device] = []
        for spec, plans, room in zip(self.specs, below, self.rooms):
            one = Candidate(name=spec.name, plans=plans, budget_bytes=room, link=spec.link)
            search = PipelineSearch(
                candidates=[one, server], micro_batches=self.unit, gap=self.gap, deadline=self.started + self.limit
            )
            known = equal.setdefault(one.kind, _Device(spec=spec, search=search))
            self.devices.append(replace(known, spec=spec))

    # --- the round --------------------------------------------------------------------------------------------------

    def plan(self) -> tuple[SplitPlan, dict[str, Plan], dict[str, Plan]]:
        self._explore()
        able = [at for at, device in enumerate(self.devices) if any(device.made.values())]
        if not able:
            raise self._nothing_fits()
        units = shared_by_weight([self.weights[at] for at in able], self.steps // self.unit)
        self.shares = dict.fromkeys(range(len(self.devices)), 0) | dict(zip(able, units))
        found, hoped = self._choices(able, bounds=False), self._choices(able, bounds=True)
        self._report("choosing the order")
        serving = best_order(found.ways, ORDER_SHARE * self.limit / 2)
        ideal = best_order(hoped.ways, ORDER_SHARE * self.limit / 2)
        plans, server_plans = self._member_plans(found, serving)
        members = [self._member(found, one, plans, server_plans) for one in serving.served]
        members += [self._idle(at) for at in range(len(self.specs)) if at not in found.devices]
        makespan = serving.makespan
        profiles = {spec.name: spec.profile for spec in self.specs if self.shares[self._at(spec.name)]}
        unlike = differences(profiles | {SERVER: self.server.profile})
        fleet = SplitPlan(
            **UNJUDGED,
            model=self.server.profile.model.name,
            steps=self.steps,
            accumulate=self.unit,
            batch=self.server.profile.batch,
            rank=rank_of(self.server.profile),
            adapter_bytes=sum(tensor.bytes for tensor in trained_tensors(self.server.profile)),
            server=SplitServer(
                device=self.server.profile.device.name,
                measured=self.server.profile.device.measured,
                budget_bytes=self.server.budget_bytes,
                link=self.server.link,
                start_seconds=self.server_start_seconds,
            ),
            members=members,
            order_gap=gap_to(makespan, serving.bound),
            bit_identical=not unlike,
            differences=unlike,
            baselines=[
                self._as_described(found, serving),
                self._one_cut(found),
                self._whole(found),
                *self._without(found, serving),
            ],
        )
        fleet = judged(fleet, plans, self.started, server_plans, **figures_of(makespan, ideal.bound))
        return fleet, plans, server_plans

    def _at(self, name: str) -> int:
        return next(at for at, spec in enumerate(self.specs) if spec.name == name)

    def _report(self, stage: str) -> None:
        report(self.progress, stage, self.started, math.inf, 0.0)

    # --- cuts -------------------------------------------------------------------------------------------------------

    def _explore(self) -> None:
        """Plan the cuts of the devices that may be of use, those first whose bounds are the lowest; for devices for which there is
        no time, look for one cut for which others' plans can be used.
        """
        links = [tuple(spec.link.model_dump().values()) for spec in self.specs]
        order = in_turn([device.search.candidates[0].plans for device in self.devices], [*zip(self.rooms, links)])
        waiting = {id(device.search): device for device in self.devices}
        for number, (at, share) in enumerate(while_there_is_time(order, self.started + CUT_SHARE * self.limit), 1):
            device = waiting.pop(id(self.devices[at].search))
            device.search.deadline = time.monotonic() + share
            while left := [cut for cut in self._useful(device) if cut not in device.made]:
                self._report(f"planning cuts of {device.spec.name} ({number} of {len(order)})")
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
        """The cuts that have been planned, or may be better than each of these in its head, its service or its tail. Head
        and tail are as long as the lower part of the adapter is large.
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
        device, link = self.devices[at], self.specs[at].link
        size = self._lower(device, cut)
        return Way(
            head=head_seconds(link, size, self.start_seconds),
            service=self.server_start_seconds + (self.shares[at] if units is None else units) * update_seconds,
            tail=tail_seconds(link, size),
        )

    def _choices(self, able: Sequence[int], *, bounds: bool) -> _Choices:
        """The ways that have been planned; with `bounds` those that may be better than the best too, in the seconds that
        they take at least.
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

    def _member_plans(self, found: _Choices, serving: Serving) -> tuple[dict[str, Plan], dict[str, Plan]]:
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

    def _member(
        self, found: _Choices, one: Served, plans: Mapping[str, Plan], server_plans: Mapping[str, Plan]
    ) -> SplitMember:
        at = found.devices[one.device]
        number, way = found.cuts[one.device][one.way], found.ways[one.device][one.way]
        spec, device, pipeline = self.specs[at], self.devices[at], self._made(at, number)
        below, above = device.search.candidates
        cut, (lower, upper) = below.plans.cuts[number], (held.layers for held in pipeline.division)
        names = [layer.name for layer in spec.profile.layers]
        plan, server_plan = plans[spec.name], server_plans[spec.name]
        return self._idle(at).model_copy(
            update={
                "reason": None,
                "plan": plan_file(spec.name),
                "plan_fingerprint": plan.fingerprint,
                "server_plan": server_plan_file(spec.name),
                "server_plan_fingerprint": server_plan.fingerprint,
                "layers": number,
                "layer_names": names[number - 1 : number + 1],
                "ahead": pipeline.aheads[0],
                "up": passed_of(cut.up_passing),
                "down": passed_of(cut.down_passing),
                "adapter_bytes": self._lower(device, number),
                "steps": self.shares[at] * self.unit,
                "step_seconds": pipeline.makespan / self.unit,
                "bound_seconds": min(pipeline.makespan, device.bound(number)) / self.unit,
                "peak_bytes": plan.peak_bytes + self.flower_bytes,
                "server_peak_bytes": server_plan.peak_bytes,
                "exchange_bytes": below.plans.extra_bytes(lower, 0),
                "server_exchange_bytes": above.plans.extra_bytes(upper, pipeline.aheads[0]),
                "head_seconds": way.head,
                "service_seconds": way.service,
                "tail_seconds": way.tail,
                "begin_seconds": one.begin,
                "round_seconds": one.answered,
            }
        )

    def _idle(self, at: int) -> SplitMember:
        spec = self.specs[at]
        without = (
            "its share of a round is less than an update" if any(self.devices[at].made.values()) else self._lacking(at)
        )
        return SplitMember(
            **described(spec),
            flower_bytes=self.flower_bytes,
            rank=rank_of(spec.profile),
            start_seconds=self.start_seconds,
            weight=self.weights[at],
            reason=without,
        )

    def _lacking(self, at: int) -> str:
        device = self.devices[at]
        if not device.search.plans and any(device.bound(cut) < math.inf for cut in device.cuts):
            return no_time()
        return (
            f"{NO_CUT}, within {format_size(self.specs[at].budget_bytes)}, of which {format_size(self.flower_bytes)} are for"
            f" Flower, and {format_size(self.server.budget_bytes)}"
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
            f"no device can take part ({names}): {NO_CUT}. A device needs {format_size(least)} for the lowest layers alone,"
            f" and the server may take {format_size(self.server.budget_bytes)} for all others; give more memory, or profile"
            " with a smaller batch or a shorter sequence",
            least,
        )

    # --- what it is compared with -----------------------------------------------------------------------------------

    def _as_described(self, found: _Choices, serving: Serving) -> SplitBaseline:
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
                late = late or time.monotonic() > self.started + self.limit
                if not late:
                    search = self.devices[at].search
                    search.deadline, search.plans = self.started + self.limit, True
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

    def _baseline(self, name: Baseline, choices: _Choices, order: Sequence[Served]) -> SplitBaseline:
        layers = {self.specs[choices.devices[one.device]].name: choices.cuts[one.device][one.way] for one in order}
        return SplitBaseline(
            name=name,
            makespan_seconds=max(one.answered for one in order),
            layers=layers,
        )

    def _without(self, found: _Choices, serving: Serving) -> list[SplitBaseline]:
        """Rounds without one of the devices, where they are shorter by more than its part: others take its steps, with the cuts
        that were chosen.
        """
        chosen = {one.device: found.cuts[one.device][one.way] for one in serving.served}
        result = []
        several = range(len(chosen) if len(chosen) > 1 else 0)
        for number, share in while_there_is_time(several, self.started + self.limit):
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
        layers = {self.specs[at].name: len(self.server.profile.layers) for at in found.devices}
        size = sum(tensor.bytes for tensor in trained_tensors(self.server.profile))
        plans = shared([self.specs[at].profile for at in found.devices], lambda one: AlonePlans(one, 1, self.gap))
        rooms = [self.rooms[at] for at in found.devices]
        for number, share in while_there_is_time(in_turn(plans, rooms), self.started + self.limit):
            if plans[number].plan(rooms[number], share).train is None:
                break
        longest = 0.0
        for at, own, room in zip(found.devices, plans, rooms):
            spec, plan = self.specs[at], own.known(room)
            if plan is None or plan.train is None:
                reason = f"{spec.name} cannot hold all layers" if plan else no_time()
                return SplitBaseline(name="whole models", makespan_seconds=None, layers=layers, reason=reason)
            head, tail = head_seconds(spec.link, size, self.start_seconds), tail_seconds(spec.link, size)
            longest = max(longest, head + self.shares[at] * self.unit * plan.step_seconds + tail)
        return SplitBaseline(name="whole models", makespan_seconds=longest, layers=layers)


def head_seconds(link: Link, size: int, start: float) -> float:
    """From when a round begins until a device is ready: the lower part of the adapter has come, and its run waits."""
    return size / link.down_bytes_per_second + link.latency_seconds + start


def tail_seconds(link: Link, size: int) -> float:
    """From when a device has been served until its answer has arrived."""
    return size / link.up_bytes_per_second + link.latency_seconds
