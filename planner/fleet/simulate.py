"""The fleet's judge: replays what all members and links do together, checks invariants, states makespans.

It reads the fleet's plan and its members' plans alone and shares nothing with the searches but the clocks (`replay`). A
rule that holds for every kind of fleet stands here once, for each part of each chain (`parts`). Every violated
invariant raises `InvalidFleet` with the invariant's name and the member:

| invariant | what must hold |
|---|---|
| names | every member has a name of its own; where the order matters, those that compute come first |
| micro-batches | data parallel: the members' runs follow one another in the chain's order and cover every micro-batch once |
| layers | the parts of a chain follow one another, hold every layer once, and their plans are of these layers |
| ahead | no part is ahead by less than nothing, more than a step or than the part below allows; the last one is in turns |
| steps | rounds: members take all steps together, in whole updates |
| link | both directions carry something, and latency is not negative |
| plan | every part has a plan, the one with the fingerprint that is stated; members that take no part have none |
| optimizer | that plan is of the fleet's updates: it hands gradients over, sends activations, or updates by itself |
| model | the plans are of the fleet's model and batch, and train what is stated, each tensor in one part of a chain |
| messages | what a part sends is what the next one receives, in the stated form, and so are the bytes of all messages |
| exchange | `exchange_bytes` are what shelves and messages need, and the plan's floor has room for them |
| budget | no peak is above its member's budget, and no plan is for more than that |
| peak | the stated peak is the plan's, which is what its replay finds, with what is set aside |
| seconds | a micro-batch takes what the plan's replay says, and each time of a round is what it adds up to |
| order | no message is taken before it has arrived, and none sent before it was made; a server serves one device at a time |
| makespan | what is stated is what the replay finds |
| bound | no bound is above what it bounds |
"""  # noqa: E501  a row of a table is one line

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from tightfit.planner.fleet.clock import Played, agree, play
from tightfit.planner.fleet.members import trained_tensors
from tightfit.planner.fleet.part_profiles import (
    RECEIVE_LAYER,
    SEND_LAYER,
    exchange_bytes,
    exchange_optimizer,
    micro_batch_seconds,
    pieces_of,
    slots_of,
)
from tightfit.planner.fleet.parts import Chain, Part, bits_of, message_bytes, messages_bytes, passing_of, replicas
from tightfit.planner.fleet.replay import FleetSimulation, Replays, replayed, stations_of
from tightfit.planner.fleet.schema import (
    AnyFleet,
    FederatedMember,
    FederatedPlan,
    FleetPlan,
    Passed,
    PipelinePlan,
    SidePlan,
    SplitMember,
    SplitPlan,
)
from tightfit.planner.problem.device_forward import device_optimizer
from tightfit.planner.schema import Plan
from tightfit.profiles.schema import Layer, adamw
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.job import RECEIVE, SEND

Messages = dict[tuple[str, str], tuple[dict[int, Passed], set[int]]]
"""by operator and direction: tensors by their places, and the bits of their numbers"""
ROUNDING = 1e-9
"""relative difference up to which two numbers of seconds are the same"""


class InvalidFleet(InputError):  # noqa: N818  named by what it is about, like the rest of the tree
    """A fleet's plan that breaks an invariant and must not run; says which invariant, and of which member."""

    def __init__(self, invariant: str, member: str, text: str) -> None:
        super().__init__(f"invalid fleet ({invariant}) at {member}: {text}; plan the fleet again from its profiles")
        self.invariant = invariant
        self.member = member


def simulate_fleet(
    fleet: AnyFleet, plans: Mapping[str, Plan], server_plans: Mapping[str, Plan] | None = None
) -> FleetSimulation:
    """Replay `fleet` with the plans of its members, by name, and in split rounds those that the server has for each.

    Raises InvalidFleet where an invariant breaks, and `tightfit.planner.simulation.simulate.InvalidSchedule` where one
    does in a member's own plan.
    """
    return _Judge(fleet, plans, server_plans or {}).judged()


class _Judge:
    def __init__(self, fleet: AnyFleet, plans: Mapping[str, Plan], server_plans: Mapping[str, Plan]) -> None:
        self.fleet, self.bits = fleet, bits_of(fleet)
        self.by_member, self.by_device = plans, server_plans
        self.replays = Replays()
        self._messages: dict[int, Messages] = {}
        """by plan: many members may have one"""
        self.chains = replicas(fleet)

    def judged(self) -> FleetSimulation:
        fleet = self.fleet
        self._check_members()
        if isinstance(fleet, FleetPlan):
            self._check_micro_batches(fleet)
        elif isinstance(fleet, FederatedPlan | SplitPlan):
            self._check_steps(fleet)
        for chain in self.chains:
            self._check_layers(chain)
        self._check_idle()
        for at, chain in enumerate(self.chains):
            for part in chain:
                self._check_plan(chain, part)
            self._check_trained(at, chain)
        for at, chain in enumerate(self.chains):
            self._check_messages(chain)
            for place, part in enumerate(chain):
                self._check_memory(part, self._needed(at, chain, place))
                self._check_seconds(at, part)
        found = self._replayed()
        self._check_makespan(found)
        return found

    def _plan(self, part: Part) -> Plan:
        return (self.by_device if part.server else self.by_member)[part.member]

    # --- members ---------------------------------------------------------------------------------------------------

    def _check_members(self) -> None:
        fleet = self.fleet
        names = [member.name for member in fleet.members]
        for at, name in enumerate(names):
            if name in names[:at]:
                raise InvalidFleet("names", name, "two members have this name")
        computing = [member.takes_part for member in fleet.members]
        if not isinstance(fleet, FederatedPlan) and computing != sorted(computing, reverse=True):
            late = names[computing.index(False)]
            raise InvalidFleet("names", late, "it takes no part and stands before members that do")
        links = [(member.name, member.link) for member in fleet.members]
        if isinstance(fleet, SplitPlan):
            links.append(("the server", fleet.server.link))
        for name, link in links:
            carried = (link.up_bytes_per_second, link.down_bytes_per_second)
            if not all(0 < rate < math.inf for rate in carried) or not 0 <= link.latency_seconds < math.inf:
                raise InvalidFleet("link", name, f"{link} carries nothing")

    def _check_idle(self) -> None:
        """Members that take no part have no plan."""
        for member in self.fleet.members:
            stated: list[object] = [member.plan, member.plan_fingerprint, self.by_member.get(member.name)]
            if isinstance(member, FederatedMember):
                stated.append(member.round_seconds or None)
            if isinstance(member, SplitMember):
                stated += [member.server_plan, self.by_device.get(member.name)]
            if not member.takes_part and any(one is not None for one in stated):
                raise InvalidFleet("plan", member.name, "it computes nothing and has a plan")

    def _check_micro_batches(self, fleet: FleetPlan) -> None:
        following = 0
        for member in fleet.chain:
            if member.first != following:
                raise InvalidFleet(
                    "micro-batches",
                    member.name,
                    f"it begins with micro-batch {member.first} where {following} comes next",
                )
            following += member.micro_batches
        if following != fleet.micro_batches:
            raise InvalidFleet(
                "micro-batches",
                "the chain",
                f"it computes {following} micro-batches of the {fleet.micro_batches} of a step",
            )

    def _check_steps(self, fleet: FederatedPlan | SplitPlan) -> None:
        if sum(member.steps for member in fleet.members) != fleet.steps:
            raise InvalidFleet("steps", "the fleet", f"its members do not take {fleet.steps} steps in all")
        for member in fleet.members:
            if member.steps % fleet.accumulate:
                raise InvalidFleet(
                    "steps", member.name, f"it takes {member.steps} steps, and an update takes {fleet.accumulate}"
                )

    # --- a chain ---------------------------------------------------------------------------------------------------

    @property
    def _micro_batches(self) -> int:
        """Of an update."""
        fleet = self.fleet
        return fleet.accumulate if isinstance(fleet, FederatedPlan | SplitPlan) else fleet.micro_batches

    def _check_layers(self, chain: Chain) -> None:
        """The stated layers follow one another, and no part waits for ever for another."""
        following: int | None = 0
        for part in chain:
            if part.layers is None:
                continue
            first, last = part.layers
            if first != following or (last is not None and last <= first):
                raise InvalidFleet(
                    "layers", part.name, f"it holds layers {first} to {last} where {following} comes next"
                )
            following = last
        if not chain:
            raise InvalidFleet("layers", "the chain", "nobody holds a layer")
        if not agree([part.ahead for part in chain]):
            raise InvalidFleet(
                "ahead", "the chain", "a part is farther ahead than the one below, and would wait for ever"
            )
        for part in chain:
            most = 0 if part is chain[-1] else self._micro_batches
            if not 0 <= part.ahead <= most:
                raise InvalidFleet("ahead", part.name, f"it is ahead by {part.ahead} of {self._micro_batches}")

    def _check_plan(self, chain: Chain, part: Part) -> None:
        fleet, plan = self.fleet, (self.by_device if part.server else self.by_member).get(part.member)
        if plan is None or part.plan is None:
            raise InvalidFleet("plan", part.name, "it computes something and has no plan")
        if plan.fingerprint != part.plan_fingerprint:
            raise InvalidFleet(
                "plan",
                part.name,
                f"its plan is {plan.fingerprint[:12]}…, the fleet's was {str(part.plan_fingerprint)[:12]}…",
            )
        wanted = self._optimizer(chain, part, plan)
        if plan.optimizer != wanted:
            raise InvalidFleet("optimizer", part.name, f"its plan is for {plan.optimizer}, its part needs {wanted}")
        if (plan.model.name, plan.batch) != (fleet.model, fleet.batch):
            raise InvalidFleet(
                "model",
                part.name,
                f"its plan is of {plan.model.name} in batches of {plan.batch}, the fleet of {fleet.model} in batches of"
                f" {fleet.batch}",
            )
        own = [layer.name for layer in own_layers(plan)]
        stated, ends = part.layers or (0, None), (own[0], own[-1])
        if (stated[1] is not None and len(own) != stated[1] - stated[0]) or any(
            said not in (None, name) for said, name in zip(part.ends, ends)
        ):
            raise InvalidFleet(
                "layers", part.name, f"it holds layers {stated} ({part.ends}), its plan is of {len(own)} ({ends})"
            )

    def _optimizer(self, chain: Chain, part: Part, plan: Plan) -> dict[str, Any]:
        """What a part's plan has to be for."""
        fleet, count = self.fleet, self._micro_batches
        if isinstance(fleet, FleetPlan) and len(self.chains) > 1:
            return exchange_optimizer(count)
        if isinstance(fleet, SidePlan) and part is chain[0]:
            return device_optimizer(count)
        if isinstance(fleet, FederatedPlan) and (plan.optimizer.get("name", "adamw"), plan.accumulate) == (
            "adamw",
            count,
        ):
            return plan.optimizer  # with states as profiled
        return adamw(count)

    def _check_trained(self, at: int, chain: Chain) -> None:
        """What the plans of a chain train is what is stated, each tensor in one part."""
        fleet, device = self.fleet, chain[0]
        trained = [{tensor.name: tensor.bytes for tensor in trained_tensors(self._plan(part))} for part in chain]
        lower, whole = sum(trained[0].values()), sum(sum(own.values()) for own in trained)
        if isinstance(fleet, FleetPlan) and whole != fleet.trained_bytes:
            raise InvalidFleet("model", device.name, f"its plan trains {whole} bytes, the fleet {fleet.trained_bytes}")
        if not isinstance(fleet, FederatedPlan | SplitPlan):
            return
        member = fleet.taking[at]
        ranks = [(self._plan(part).model.lora or {}).get("rank") for part in chain]
        stated, most = (member.rank, whole), (fleet.rank, fleet.adapter_bytes)
        fits = stated == most if isinstance(fleet, SplitPlan) else stated[0] <= most[0] and stated[1] <= most[1]
        if ranks != [member.rank] * len(chain) or lower != member.adapter_bytes or not fits:
            raise InvalidFleet(
                "model",
                device.name,
                f"adapters of rank {ranks} are trained, {lower} bytes there and {whole} in all; stated are rank"
                f" {member.rank} and {member.adapter_bytes} bytes, of the fleet {fleet.rank} and {fleet.adapter_bytes}",
            )
        if len(set().union(*trained)) < sum(map(len, trained)):
            raise InvalidFleet("model", device.name, "its plan and the server's train a tensor both")

    def _check_messages(self, chain: Chain) -> None:
        seen: set[str] = set()
        for at, part in enumerate(chain):
            plan = self._plan(part)
            own = {layer.name for layer in own_layers(plan)}
            if seen & own:
                raise InvalidFleet("layers", part.name, f"another part computes {min(seen & own)} too")
            seen |= own
            sent_up, sent_down = self._passed(part, SEND, "up"), self._passed(part, SEND, "down")
            if bool(sent_up[0]) != (at < len(chain) - 1) or bool(self._passed(part, RECEIVE, "up")[0]) != bool(at):
                raise InvalidFleet("layers", part.name, "its plan does not begin, or end, where its part does")
            for stated, (passed, bits) in ((part.up, sent_up), (part.down, sent_down)):
                if passed != list(stated) or bits - {self.bits}:
                    raise InvalidFleet("messages", part.name, "its plan sends something else than is stated")
        for below, above in pairwise(chain):
            passed, bits = self._passed(below, SEND, "up")
            if self._passed(above, RECEIVE, "up") != (passed[above.labels :], bits):
                raise InvalidFleet("messages", above.name, "it does not receive what its neighbour sends")
            if self._passed(below, RECEIVE, "down") != self._passed(above, SEND, "down"):
                raise InvalidFleet("messages", below.name, "it does not receive what its neighbour sends")
        fleet = self.fleet
        if isinstance(fleet, PipelinePlan):
            both = [self._size(below.up) + self._size(above.down) for below, above in pairwise(chain)]
            if fleet.link_bytes != [fleet.micro_batches * one for one in both]:
                raise InvalidFleet(
                    "messages", "link_bytes", f"{fleet.link_bytes} bytes are stated for messages of {both}"
                )
        if isinstance(fleet, SidePlan) and fleet.message_bytes != self._size(fleet.message):
            raise InvalidFleet("messages", "message_bytes", f"{fleet.message_bytes} bytes are stated")

    def _passed(self, part: Part, target: str, direction: str) -> tuple[list[Passed], set[int]]:
        """What the operators `target` of a part's plan pass in a direction, in the order of the message, and in which
        bits.
        """
        plan = self._plan(part)
        if id(plan) not in self._messages:
            self._messages[id(plan)] = _messages(plan)
        found, bits = self._messages[id(plan)].get((target, direction), ({}, set()))
        return [found[number] for number in sorted(found)], bits

    def _size(self, passed: Sequence[Passed]) -> int:
        return message_bytes(passing_of(passed), self.bits)

    def _needed(self, at: int, chain: Chain, place: int) -> int:
        """Bytes that a part holds for what passes."""
        fleet, part = self.fleet, chain[place]
        plan = self._plan(part)
        if isinstance(fleet, FleetPlan) and len(self.chains) > 1:
            member = fleet.chain[at]
            return exchange_bytes(
                plan.device.floor,
                pieces_of(plan),
                slots=slots_of(member.micro_batches, first=not at),
                gradients=member.gradients,
                states=member.states,
            )
        return messages_bytes(
            plan.device.floor,
            from_below=self._size(chain[place - 1].up) if place else 0,
            to_below=self._size(part.down),
            to_above=self._size(part.up),
            from_above=self._size(chain[place + 1].down) if place + 1 < len(chain) else 0,
            buffers=part.buffers,
        )

    def _check_memory(self, part: Part, needed: int) -> None:
        plan, floor = self._plan(part), self._plan(part).device.floor
        if part.exchange_bytes != needed:
            raise InvalidFleet(
                "exchange",
                part.name,
                f"{part.exchange_bytes} bytes are set aside for what passes, which takes {needed}",
            )
        if plan.floor_bytes != floor.held_bytes or floor.resident_bytes < needed:
            raise InvalidFleet(
                "exchange",
                part.name,
                f"its plan's floor of {floor.held_bytes} bytes does not hold the exchange's {needed}",
            )
        found = self.replays.of(plan)
        peak, allowed = plan.peak_bytes + part.aside_bytes, part.budget_bytes
        if part.aside_bytes < 0 or max(peak, plan.budget_bytes + part.aside_bytes) > allowed:
            raise InvalidFleet(
                "budget",
                part.name,
                f"its plan is for {plan.budget_bytes} bytes and peaks at {peak}, {allowed} are allowed",
            )
        if not part.peak_bytes == peak == found.peak_bytes + part.aside_bytes:
            raise InvalidFleet(
                "peak",
                part.name,
                f"the fleet states {part.peak_bytes} bytes, its plan {peak}, the replay"
                f" {found.peak_bytes + part.aside_bytes}",
            )

    def _check_seconds(self, at: int, part: Part) -> None:
        fleet, plan = self.fleet, self._plan(part)
        found = self.replays.of(plan)
        takes = found.step_seconds
        if isinstance(fleet, FleetPlan):
            takes = micro_batch_seconds(plan, fleet.chain[at].gradients, first=not at)
        stated: list[tuple[float | None, float]] = [(plan.step_seconds, found.step_seconds)]
        if not isinstance(fleet, SplitPlan):  # which states those of both parts together
            stated.append((part.micro_batch_seconds, takes))
        if isinstance(fleet, PipelinePlan):
            assert found.evaluate is not None
            stated.append((part.forward_seconds, found.evaluate.seconds))
        for said, seconds in stated:
            if said is None or not _same(said, seconds, seconds):
                raise InvalidFleet("seconds", part.name, f"{said} s are stated, the replay finds {seconds} s")
        if not isinstance(fleet, SplitPlan):
            _check_bound(part.name, part.bound_seconds, takes)

    # --- the whole -------------------------------------------------------------------------------------------------

    def _replayed(self) -> FleetSimulation:
        fleet = self.fleet
        if isinstance(fleet, FederatedPlan | SplitPlan):
            return self._round(fleet)
        if isinstance(fleet, PipelinePlan):
            (chain,) = self.chains
            return FleetSimulation(makespan_seconds=self._played(chain).makespan)
        return replayed(fleet, self.by_member)

    def _check_makespan(self, found: FleetSimulation) -> None:
        fleet = self.fleet
        claims = {"makespan_seconds": (fleet.makespan_seconds, found.makespan_seconds)}
        if isinstance(fleet, FleetPlan):
            claims["compute_seconds"] = fleet.compute_seconds, found.compute_seconds
            claims["exchange_seconds"] = fleet.exchange_seconds, found.exchange_seconds
            claims["update_seconds"] = fleet.update_seconds, found.update_seconds
        for claim, (stated, seconds) in claims.items():
            if not _same(stated, seconds, found.makespan_seconds):
                raise InvalidFleet("makespan", claim, f"{stated} s are stated, the replay finds {seconds} s")
        _check_bound("bound_seconds", fleet.bound_seconds, found.makespan_seconds)

    def _played(self, chain: Chain) -> Played:
        """An update of a chain on the clock, of which each message is held against what it needs."""
        stations = stations_of(chain, [self._plan(part) for part in chain], self.bits, self.replays)
        told = play(stations, self._micro_batches)
        does = {(one.what, one.station, one.number): one for one in told.doings if one.to is None}
        slack = ROUNDING * told.makespan
        for one in told.doings:
            if one.to is None:
                continue
            source, number = stations[one.station], one.number
            arrived = one.end + source.link.latency_seconds + stations[one.to].link.latency_seconds
            if one.to > one.station:
                marks = source.forward if source.ahead else source.train
                ready = does["forward", one.station, number].begin + marks.send_up
                used = does["forward", one.to, number].end
            else:
                ready = does["backward", one.station, number].begin
                used = does["backward", one.to, number].begin
            if one.begin < ready - slack or used < arrived - slack:
                raise InvalidFleet(
                    "order",
                    chain[one.to].name,
                    f"micro-batch {number} from {chain[one.station].name} is made at {ready} s, sent at {one.begin} s,"
                    f" there at {arrived} s and used until {used} s",
                )
        return told

    def _round(self, fleet: FederatedPlan | SplitPlan) -> FleetSimulation:
        """A round: each device gets the adapter, takes its steps, where there is a server in turn with it, and
        answers.
        """
        free = 0.0
        for member, chain in zip(fleet.taking, self.chains):
            step, link, down_bytes, start = member.step_seconds or 0.0, member.link, fleet.adapter_bytes, 0.0
            if isinstance(fleet, SplitPlan):
                takes = self._played(chain).makespan / fleet.accumulate
                self._check_same("step", member, member.step_seconds, takes)
                _check_bound(member.name, member.bound_seconds, takes)
                down_bytes, start = member.adapter_bytes, fleet.server.start_seconds
            if min(member.start_seconds, start) < 0:
                raise InvalidFleet("seconds", member.name, "a start takes less than no time")
            head = down_bytes / link.down_bytes_per_second + link.latency_seconds + member.start_seconds
            service = start + member.steps * step
            tail = member.adapter_bytes / link.up_bytes_per_second + link.latency_seconds
            begin = head
            if isinstance(member, SplitMember):
                self._check_same("head", member, member.head_seconds, head)
                self._check_same("service", member, member.service_seconds, service)
                self._check_same("tail", member, member.tail_seconds, tail)
                begin = max(free, head)
                self._check_same("beginning", member, member.begin_seconds, begin, "order")
                free = begin + service
            self._check_same("round", member, member.round_seconds, begin + service + tail)
        return FleetSimulation(makespan_seconds=max(member.round_seconds for member in fleet.members))

    def _check_same(
        self, what: str, member: FederatedMember, said: float | None, counted: float, invariant: str = "seconds"
    ) -> None:
        if said is None or not _same(said, counted, counted):
            raise InvalidFleet(invariant, member.name, f"{said} s are stated for its {what}, the count is {counted} s")


def own_layers(plan: Plan) -> list[Layer]:
    """The layers of the model that the plan of a part computes."""
    names = [layer.name for layer in plan.layers]
    first = names.index(RECEIVE_LAYER) + 1 if RECEIVE_LAYER in names else 0
    return plan.layers[first : names.index(SEND_LAYER) if SEND_LAYER in names else len(names)]


def _messages(plan: Plan) -> Messages:
    """What a plan's operators send and receive."""
    result: Messages = {}
    for program in plan.programs:
        values = {value.name: value for value in program.values}
        for operator in program.operators:
            if operator.target in (SEND, RECEIVE):
                found, bits = result.setdefault((operator.target, str(operator.kwargs["direction"])), ({}, set()))
                value = values[str((operator.inputs if operator.target == SEND else operator.outputs)[0])]
                found[int(operator.kwargs["number"])] = Passed(shape=list(value.shape), dtype=value.dtype)
                bits.add(int(operator.kwargs["bits"]))
    return result


def _check_bound(what: str, bound: float | None, seconds: float) -> None:
    if bound is None or not 0 <= bound <= seconds * (1 + ROUNDING):
        raise InvalidFleet("bound", what, f"{bound} s are said to be a lower bound, the replay takes {seconds} s")


def _same(one: float, other: float, scale: float) -> bool:
    """Whether two numbers of seconds are the same, beside a time of `scale`."""
    return abs(one - other) <= ROUNDING * scale
