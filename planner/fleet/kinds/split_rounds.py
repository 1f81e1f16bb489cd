"""Split federated rounds: devices hold the lower layers, and a server the rest, for one device after the other.

For every device and every cut of the model, device and server are a pipeline of two stages, each planned within its
budget (`fleet_search.DivisionSearch`); so many updates of it, after the start of the server's run, are the service.
Steps are shared out by weight, in whole updates. Cuts are tried by their bounds. One is left out where another is known
that is no worse in all: its head, its service and its tail. Then `programs.best_order` chooses a cut for every device
and the order at once. With the bounds of all cuts that might be better in the place of the services found, the same
program bounds the round. Of many devices, those for which there was no time have plans that were made for others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from tightfit.planner.fleet.bounds import Candidate, Division, DivisionBounds, Held
from tightfit.planner.fleet.description import DescribedFleet
from tightfit.planner.fleet.fleet_search import DivisionSearch, Pipeline
from tightfit.planner.fleet.kinds.frame import figures_of
from tightfit.planner.fleet.kinds.pipeline import stage_fields
from tightfit.planner.fleet.kinds.rounds import Rounds, WholePlans, in_turn, round_seconds, turn_of
from tightfit.planner.fleet.members import (
    MemberSpec,
    check_one_model,
    check_plain,
    checked_members,
    rank_of,
    shared,
    trained_tensors,
)
from tightfit.planner.fleet.options import SERVER_START_SECONDS, FleetOptions
from tightfit.planner.fleet.part_plans import StagePlans, no_time, while_there_is_time
from tightfit.planner.fleet.programs import (
    Served,
    ServiceOrder,
    Way,
    best_order,
    served,
    shared_by_weight,
)
from tightfit.planner.fleet.schema import SERVER, Baseline, FleetPlan, Link, Member, Replica
from tightfit.planner.plan_result import gap_to
from tightfit.planner.schema import Plan
from tightfit.runtime.common.errors import InfeasibleError, InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.units import format_size

CUT_SHARE, ORDER_SHARE = 0.6, 0.1
"""of the time limit: for plans of all cuts, and for the order; the rest is for what the plan is compared with"""
NO_CUT = "none of the model's cuts leaves it and the server parts that they can hold"


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


class SplitRounds(Rounds):
    kind = "split federated"

    def __init__(self, described: DescribedFleet, asked: FleetOptions) -> None:
        super().__init__(described, asked)
        assert described.server is not None
        specs, (server,) = self.specs, checked_members([described.server])
        _check(specs, server, described.weights)
        self.server = server
        self.server_start_seconds = SERVER_START_SECONDS if asked.server_start is None else asked.server_start
        self.weights = [described.weights.get(spec.name, 1.0) for spec in specs]
        profiles = [server.profile, *(spec.profile for spec in specs)]
        above, *below = shared(profiles, lambda one: StagePlans(one, self.accumulate, 0, self.gap))
        upper = Candidate(name=SERVER, plans=above, budget_bytes=server.budget_bytes, link=server.link)
        equal: dict[tuple[int, int, Link], _Device] = {}
        self.devices: list[_Device] = []
        for spec, plans, room in zip(specs, below, self.rooms):
            one = Candidate(name=spec.name, plans=plans, budget_bytes=room, link=spec.link)
            search = DivisionSearch(
                candidates=[one, upper], micro_batches=self.accumulate, gap=self.gap, deadline=self.until(1.0)
            )
            known = equal.setdefault(one.kind, _Device(spec=spec, search=search))
            self.devices.append(replace(known, spec=spec))

    def plan(self) -> tuple[FleetPlan, dict[str, Plan]]:
        self._explore()
        able = [at for at, device in enumerate(self.devices) if any(device.made.values())]
        if not able:
            raise self._nothing_fits()
        units = shared_by_weight([self.weights[at] for at in able], self.micro_batches // self.accumulate)
        self.shares = dict.fromkeys(range(len(self.devices)), 0) | dict(zip(able, units))
        found, hoped = self._choices(able, bounds=False), self._choices(able, bounds=True)
        self.report("choosing the order")
        serving = best_order(found.ways, ORDER_SHARE * self.asked.time_limit / 2)
        ideal = best_order(hoped.ways, ORDER_SHARE * self.asked.time_limit / 2)
        plans: dict[str, Plan] = {}
        replicas = [self._replica(found, served_device, plans) for served_device in serving.served]
        profile = self.server.profile
        taking = {self.names[at]: self.specs[at].profile for at in found.devices}
        fleet = self.stated(
            replicas,
            self._reason,
            **figures_of(round_seconds(replicas), ideal.bound),
            **self.exactness(taking | {SERVER: profile}),
            rank=rank_of(profile),
            trained_bytes=sum(tensor.bytes for tensor in trained_tensors(profile)),
            order_gap=gap_to(serving.makespan, serving.bound),
            baselines=[
                self._as_described(found, serving),
                self._one_cut(found),
                self._whole(found),
                *self._without(found, serving),
            ],
        )
        server = Member(
            name=SERVER,
            device=profile.device.name,
            measured=profile.device.measured,
            budget_bytes=self.server.budget_bytes,
            link=self.server.link,
            start_seconds=self.server_start_seconds,
        )
        fleet = fleet.model_copy(update={"members": [*fleet.members, server]})
        return self.judged(fleet, plans), plans

    def member(self, at: int, reason: str | None = None) -> Member:
        return super().member(at, reason).model_copy(update={"weight": self.weights[at]})

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

    def _replica(self, found: _Choices, served_device: Served, plans: dict[str, Plan]) -> Replica:
        """A device's lower layers and the server's upper ones, whose plans are put into `plans`."""
        at = found.devices[served_device.device]
        cut = found.cuts[served_device.device][served_device.way]
        way = found.ways[served_device.device][served_device.way]
        name, device, pipeline = self.names[at], self.devices[at], self._made(at, cut)
        below, above = (candidate.plans for candidate in device.search.candidates)
        lower, upper = pipeline.division
        ahead = pipeline.aheads[0]
        budget = below.common_budget(lower.layers, device.search.candidates[0].budget_bytes, 0)
        plan = plans[name] = below.member_plan(lower.layers, budget, 0)
        server_plan = above.member_plan(upper.layers, self.server.budget_bytes, ahead)
        plans[f"{SERVER}/{name}"] = server_plan
        server_part = {"member": SERVER, "plan": f"{SERVER}/{name}", "peak_bytes": server_plan.peak_bytes}
        parts = [
            self.part(at, plan, **stage_fields(below, lower, plan, ahead, 0)),
            self.part(at, server_plan, **server_part, **stage_fields(above, upper, server_plan, 0, ahead)),
        ]
        return Replica(
            parts=parts,
            micro_batches=self.shares[at] * self.accumulate,
            rank=rank_of(self.specs[at].profile),
            adapter_bytes=self._lower(device, cut),
            step_seconds=pipeline.makespan / self.accumulate,
            bound_seconds=min(pipeline.makespan, device.bound(cut)) / self.accumulate,
            turn=turn_of(way, served_device.begin),
        )

    def _reason(self, at: int) -> str:
        fits = any(self.devices[at].made.values())
        return "its share of a round is less than an update" if fits else self._lacking(at)

    def _lacking(self, at: int) -> str:
        device = self.devices[at]
        if not device.search.plans and any(device.bound(cut) < math.inf for cut in device.cuts):
            return no_time()
        return (
            f"{NO_CUT}, within {format_size(self.specs[at].budget_bytes)}, of which {format_size(self.aside_bytes)}"
            f" are for Flower, and {format_size(self.server.budget_bytes)}"
        )

    def _nothing_fits(self) -> InfeasibleError:
        """The error for a fleet of which no device can take part, with the smallest budget of one that could."""
        needed = []
        for device in self.devices:
            below = device.search.candidates[0]
            for cut in device.cuts[:1]:
                room = below.plans.least_room((0, cut), 1.0)
                needed.append(room + below.plans.extra_bytes((0, cut), 0) + self.aside_bytes)
        least = min(needed, default=0)
        names = ", ".join(spec.name for spec in self.specs)
        return InfeasibleError(
            f"no device can take part ({names}): {NO_CUT}. A device needs {format_size(least)} for the lowest layers"
            f" alone, and the server may take {format_size(self.server.budget_bytes)} for all others; give more memory,"
            " or profile with a smaller batch or a shorter sequence",
            least,
        )

    # --- what it is compared with -----------------------------------------------------------------------------------

    def _as_described(self, found: _Choices, serving: ServiceOrder) -> Baseline:
        """The chosen cuts, in the order in which devices are described."""
        chosen = {one.device: one.way for one in serving.served}
        order = [(device, chosen[device]) for device in sorted(chosen)]
        return self._baseline("order as described", found, served(found.ways, order))

    def _one_cut(self, found: _Choices) -> Baseline:
        """The best cut that is the same for all, in its best order."""
        best: Baseline | None = None
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
        return Baseline(name="one cut for all", makespan_seconds=None, reason=reason)

    def _baseline(
        self,
        name: Literal["order as described", "one cut for all", "without a device"],
        choices: _Choices,
        order: Sequence[Served],
    ) -> Baseline:
        layers = {self.specs[choices.devices[one.device]].name: choices.cuts[one.device][one.way] for one in order}
        return Baseline(name=name, makespan_seconds=max(one.answered for one in order), shares=layers)

    def _without(self, found: _Choices, serving: ServiceOrder) -> list[Baseline]:
        """Rounds without one of the devices, where they are shorter by more than its part: others take its steps, with
        the cuts that were chosen.
        """
        chosen = {one.device: found.cuts[one.device][one.way] for one in serving.served}
        result = []
        several = range(len(chosen) if len(chosen) > 1 else 0)
        for number, share in while_there_is_time(several, self.until(1.0)):
            others = {at: chosen[place] for place, at in enumerate(found.devices) if place != number}
            units = shared_by_weight([self.weights[at] for at in others], self.micro_batches // self.accumulate)
            ways = [
                [self._way(at, cut, self._made(at, cut).makespan, count)]
                for (at, cut), count in zip(others.items(), units)
                if count
            ]
            makespan = best_order(ways, min(1.0, share)).makespan
            if makespan < serving.makespan * (1 - 1 / len(chosen)):
                layers = {self.specs[at].name: cut for at, cut in others.items()}
                result.append(Baseline(name="without a device", makespan_seconds=makespan, shares=layers))
        return result

    def _whole(self, found: _Choices) -> Baseline:
        """Every device holds all layers, takes as many steps, and waits for nobody."""
        layers = {self.names[at]: len(self.server.profile.layers) for at in found.devices}
        size = sum(tensor.bytes for tensor in trained_tensors(self.server.profile))
        profiles, rooms = zip(*((self.specs[at].profile, self.rooms[at]) for at in found.devices))
        whole = WholePlans(profiles, rooms, self.gap)
        for _ in whole.explore(self.until(1.0)):
            if any(map(whole.too_small, range(len(rooms)))):
                break
        longest = 0.0
        for number, at in enumerate(found.devices):
            plan = whole.known(number)
            if plan is None:
                reason = f"{self.names[at]} cannot hold all layers" if whole.too_small(number) else no_time()
                return Baseline(name="whole models", makespan_seconds=None, shares=layers, reason=reason)
            steps = self.shares[at] * self.accumulate * plan.step_seconds
            longest = max(longest, self.way(self.specs[at].link, (size, size), steps).alone)
        return Baseline(name="whole models", makespan_seconds=longest, shares=layers)


def _check(specs: Sequence[MemberSpec], server: MemberSpec, weights: Mapping[str, float]) -> None:
    """Raises InputError for members that cannot train together, and weights that cannot be used."""
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
    for name, weight in weights.items():
        if name not in {spec.name for spec in specs} or not 0 < weight < math.inf:
            raise InputError(f"weight {weight} of member {name!r}: give a number above 0, for a device of the fleet")
