"""The fleet's judge: replays what all members and links do together, checks invariants, states makespans.

It reads the fleet's plan and its parts' plans alone and shares nothing with the searches but the clocks (`replay`). A
rule that holds for every kind of fleet stands here once, for each part of each replica. Every violated
invariant raises `InvalidFleet` with the invariant's name and the member:

| invariant | what must hold |
|---|---|
| names | every member has a name of its own, and takes part once; the server of rounds in every replica |
| micro-batches | replicas take all micro-batches together: in a step one run after the other, in rounds whole updates |
| layers | the parts of a chain follow one another, hold every layer once, and their plans are of these layers |
| ahead | no part is ahead by less than nothing, more than a step or than the part below allows; the last one is in turns |
| link | both directions carry something, and latency is not negative |
| plan | every part has a plan, the one with the fingerprint that is stated; nobody else has one |
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
from tightfit.planner.fleet.parts import buffers_of, message_bytes, messages_bytes, passing_of
from tightfit.planner.fleet.replay import FleetSimulation, Replays, replayed, stations_of
from tightfit.planner.fleet.schema import SERVER, FleetPlan, Member, Part, Passed, Replica, Turn
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


def simulate_fleet(fleet: FleetPlan, plans: Mapping[str, Plan]) -> FleetSimulation:
    """Replay `fleet` with the plans of its parts, by the names that these have there.

    Raises InvalidFleet where an invariant breaks, and `tightfit.planner.simulation.simulate.InvalidSchedule` where one
    does in a part's own plan.
    """
    return _Judge(fleet, plans).judged()


class _Judge:
    def __init__(self, fleet: FleetPlan, plans: Mapping[str, Plan]) -> None:
        self.fleet, self.plans = fleet, plans
        self.members = {member.name: member for member in fleet.members}
        self.replays = Replays()
        self._messages: dict[int, Messages] = {}
        """by plan: many members may have one"""

    def judged(self) -> FleetSimulation:
        replicas = self.fleet.replicas
        self._check_members()
        self._check_shares()
        for replica in replicas:
            self._check_layers(replica)
        for replica in replicas:
            for part in replica.parts:
                self._check_plan(replica, part)
            self._check_trained(replica)
        if others := self.plans.keys() - {part.plan for part in self.fleet.parts}:
            raise InvalidFleet("plan", min(others), "it computes nothing and has a plan")
        for replica in replicas:
            self._check_messages(replica)
            for place, part in enumerate(replica.parts):
                self._check_memory(replica, part, self._needed(replica, place))
                self._check_seconds(replica, part)
        simulation = self._replayed()
        self._check_makespan(simulation)
        return simulation

    def _plan(self, part: Part) -> Plan:
        return self.plans[part.plan]

    def _whose(self, replica: Replica, part: Part) -> str:
        """Whose a part is, for people."""
        device = replica.parts[0].member
        return f"the server, for {device}" if self.fleet.in_rounds and part.member != device else part.member

    # --- members ---------------------------------------------------------------------------------------------------

    def _check_members(self) -> None:
        fleet = self.fleet
        names = [member.name for member in fleet.members]
        for at, name in enumerate(names):
            if name in names[:at]:
                raise InvalidFleet("names", name, "two members have this name")
        taking = [part.member for part in fleet.parts]
        for at, name in enumerate(taking):
            if name not in names:
                raise InvalidFleet("names", name, "it computes something and is no member")
            if name in taking[:at] and not (fleet.in_rounds and name == SERVER):
                raise InvalidFleet("names", name, "it computes two parts")
        for member in fleet.members:
            link = member.link
            carried = (link.up_bytes_per_second, link.down_bytes_per_second)
            if not all(0 < rate < math.inf for rate in carried) or not 0 <= link.latency_seconds < math.inf:
                raise InvalidFleet("link", member.name, f"{link} carries nothing")

    def _check_shares(self) -> None:
        """The replicas compute all micro-batches together."""
        fleet = self.fleet
        if not fleet.in_rounds and fleet.accumulate != fleet.micro_batches:
            raise InvalidFleet(
                "micro-batches",
                "the fleet",
                f"an update has {fleet.accumulate} of the {fleet.micro_batches} micro-batches of a step",
            )
        following = 0
        for replica in fleet.replicas:
            name = replica.parts[0].member
            if not fleet.in_rounds and replica.first != following:
                raise InvalidFleet(
                    "micro-batches", name, f"it begins with micro-batch {replica.first} where {following} comes next"
                )
            if fleet.in_rounds and replica.micro_batches % fleet.accumulate:
                raise InvalidFleet(
                    "micro-batches",
                    name,
                    f"it takes {replica.micro_batches} micro-batches, and an update takes {fleet.accumulate}",
                )
            following += replica.micro_batches
        if following != fleet.micro_batches:
            raise InvalidFleet(
                "micro-batches", "the fleet", f"it computes {following} micro-batches of {fleet.micro_batches}"
            )

    # --- a replica -------------------------------------------------------------------------------------------------

    def _check_layers(self, replica: Replica) -> None:
        """The stated layers follow one another, and no part waits for ever for another."""
        parts, most = replica.parts, self.fleet.accumulate
        following = 0
        for part in parts:
            if bool(part.layers) != self.fleet.cut:
                raise InvalidFleet(
                    "layers", part.member, f"layers {part.layers} are stated of a {self.fleet.kind} fleet"
                )
            if not part.layers:
                continue
            first, last = part.layers
            if first != following or last <= first:
                raise InvalidFleet(
                    "layers", part.member, f"it holds layers {first} to {last} where {following} comes next"
                )
            following = last
        if not agree([part.ahead for part in parts]):
            raise InvalidFleet(
                "ahead", "the chain", "a part is farther ahead than the one below, and would wait for ever"
            )
        for part in parts:
            if not 0 <= part.ahead <= (0 if part is parts[-1] else most):
                raise InvalidFleet("ahead", self._whose(replica, part), f"it is ahead by {part.ahead} of {most}")

    def _check_plan(self, replica: Replica, part: Part) -> None:
        fleet, plan, name = self.fleet, self.plans.get(part.plan), self._whose(replica, part)
        if plan is None:
            raise InvalidFleet("plan", name, "it computes something and has no plan")
        if plan.fingerprint != part.plan_fingerprint:
            raise InvalidFleet(
                "plan",
                name,
                f"its plan is {plan.fingerprint[:12]}…, the fleet's was {part.plan_fingerprint[:12]}…",
            )
        wanted = self._optimizer(replica, part, plan)
        if plan.optimizer != wanted:
            raise InvalidFleet("optimizer", name, f"its plan is for {plan.optimizer}, its part needs {wanted}")
        if (plan.model.name, plan.batch) != (fleet.model, fleet.batch):
            raise InvalidFleet(
                "model",
                name,
                f"its plan is of {plan.model.name} in batches of {plan.batch}, the fleet of {fleet.model} in batches of"
                f" {fleet.batch}",
            )
        own = [layer.name for layer in own_layers(plan)]
        if part.layers and ((len(own), [own[0], own[-1]]) != (part.layers[1] - part.layers[0], part.layer_names)):
            raise InvalidFleet(
                "layers", name, f"it holds layers {part.layers} ({part.layer_names}), its plan is of {len(own)} ({own})"
            )

    def _optimizer(self, replica: Replica, part: Part, plan: Plan) -> dict[str, Any]:
        """What a part's plan has to be for."""
        fleet, count = self.fleet, self.fleet.accumulate
        if not fleet.in_rounds and len(fleet.replicas) > 1:
            return exchange_optimizer(count)
        if fleet.one_way and part is replica.parts[0]:
            return device_optimizer(count)
        if fleet.kind == "federated" and (plan.optimizer.get("name", "adamw"), plan.accumulate) == ("adamw", count):
            return plan.optimizer  # with states as profiled
        return adamw(count)

    def _check_trained(self, replica: Replica) -> None:
        """What the plans of a replica train is what is stated, each tensor in one part."""
        fleet, name = self.fleet, replica.parts[0].member
        trained = [
            {tensor.name: tensor.bytes for tensor in trained_tensors(self._plan(part))} for part in replica.parts
        ]
        lower, whole = sum(trained[0].values()), sum(sum(own.values()) for own in trained)
        if len(set().union(*trained)) < sum(map(len, trained)):
            raise InvalidFleet("model", name, "two of its parts train one tensor")
        less = fleet.kind == "federated" and whole <= fleet.trained_bytes  # its rank may be lower
        if whole != fleet.trained_bytes and not less:
            raise InvalidFleet("model", name, f"its plan trains {whole} bytes, the fleet {fleet.trained_bytes}")
        if not fleet.in_rounds:
            return
        ranks = [(self._plan(part).model.lora or {}).get("rank") for part in replica.parts]
        fits = replica.rank <= fleet.rank if less else replica.rank == fleet.rank
        if set(ranks) != {replica.rank} or lower != replica.adapter_bytes or not fits:
            raise InvalidFleet(
                "model",
                name,
                f"adapters of rank {ranks} are trained, {lower} bytes there and {whole} in all; stated are rank"
                f" {replica.rank} and {replica.adapter_bytes} bytes, of the fleet {fleet.rank} and"
                f" {fleet.trained_bytes}",
            )

    def _check_messages(self, replica: Replica) -> None:
        seen: set[str] = set()
        parts, labels = replica.parts, int(self.fleet.one_way)
        for at, part in enumerate(parts):
            name = self._whose(replica, part)
            own = {layer.name for layer in own_layers(self._plan(part))}
            if seen & own:
                raise InvalidFleet("layers", name, f"another part computes {min(seen & own)} too")
            seen |= own
            sent_up, sent_down = self._passed(part, SEND, "up"), self._passed(part, SEND, "down")
            if bool(sent_up[0]) != (at < len(parts) - 1) or bool(self._passed(part, RECEIVE, "up")[0]) != bool(at):
                raise InvalidFleet("layers", name, "its plan does not begin, or end, where its part does")
            for stated, (passed, bits) in ((part.up, sent_up), (part.down, sent_down)):
                if passed != stated or bits - {self.fleet.bits}:
                    raise InvalidFleet("messages", name, "its plan sends something else than is stated")
        for below, above in pairwise(parts):
            passed, bits = self._passed(below, SEND, "up")
            # The batch's labels, at the beginning of a message that passes one way, are no operator's input.
            if self._passed(above, RECEIVE, "up") != (passed[labels:], bits):
                raise InvalidFleet(
                    "messages", self._whose(replica, above), "it does not receive what its neighbour sends"
                )
            if self._passed(below, RECEIVE, "down") != self._passed(above, SEND, "down"):
                raise InvalidFleet(
                    "messages", self._whose(replica, below), "it does not receive what its neighbour sends"
                )

    def _passed(self, part: Part, target: str, direction: str) -> tuple[list[Passed], set[int]]:
        """What the operators `target` of a part's plan pass in a direction, in the order of the message, and in which
        bits.
        """
        plan = self._plan(part)
        if id(plan) not in self._messages:
            self._messages[id(plan)] = _messages(plan)
        tensors, bits = self._messages[id(plan)].get((target, direction), ({}, set()))
        return [tensors[number] for number in sorted(tensors)], bits

    def _needed(self, replica: Replica, place: int) -> int:
        """Bytes that a part holds for what passes."""
        fleet, parts = self.fleet, replica.parts
        plan = self._plan(parts[place])
        if not fleet.in_rounds and len(fleet.replicas) > 1:
            return exchange_bytes(
                plan.device.floor,
                pieces_of(plan),
                slots=slots_of(replica.micro_batches, first=replica is fleet.replicas[0]),
                gradients=replica.gradients,
                states=replica.states,
            )

        def size(passed: Sequence[Passed]) -> int:
            return message_bytes(passing_of(passed), fleet.bits)

        return messages_bytes(
            plan.device.floor,
            from_below=size(parts[place - 1].up) if place else 0,
            to_below=size(parts[place].down),
            to_above=size(parts[place].up),
            from_above=size(parts[place + 1].down) if place + 1 < len(parts) else 0,
            buffers=buffers_of(fleet, replica, place),
        )

    def _check_memory(self, replica: Replica, part: Part, needed: int) -> None:
        plan, member, name = self._plan(part), self.members[part.member], self._whose(replica, part)
        floor = plan.device.floor
        if part.exchange_bytes != needed:
            raise InvalidFleet(
                "exchange", name, f"{part.exchange_bytes} bytes are set aside for what passes, which takes {needed}"
            )
        if plan.floor_bytes != floor.held_bytes or floor.resident_bytes < needed:
            raise InvalidFleet(
                "exchange", name, f"its plan's floor of {floor.held_bytes} bytes does not hold the exchange's {needed}"
            )
        peak_bytes = self.replays.of(plan).peak_bytes
        peak, allowed = plan.peak_bytes + member.aside_bytes, member.budget_bytes
        if member.aside_bytes < 0 or max(peak, plan.budget_bytes + member.aside_bytes) > allowed:
            raise InvalidFleet(
                "budget",
                name,
                f"its plan is for {plan.budget_bytes} bytes and peaks at {peak}, {allowed} are allowed",
            )
        if not part.peak_bytes == peak == peak_bytes + member.aside_bytes:
            raise InvalidFleet(
                "peak",
                name,
                f"the fleet states {part.peak_bytes} bytes, its plan {peak}, the replay"
                f" {peak_bytes + member.aside_bytes}",
            )

    def _check_seconds(self, replica: Replica, part: Part) -> None:
        fleet, plan, name = self.fleet, self._plan(part), self._whose(replica, part)
        simulation = self.replays.of(plan)
        takes = simulation.step_seconds
        if not fleet.in_rounds and len(fleet.replicas) > 1:
            takes = micro_batch_seconds(plan, replica.gradients, first=replica is fleet.replicas[0])
        stated: list[tuple[float | None, float]] = [
            (plan.step_seconds, simulation.step_seconds),
            (part.micro_batch_seconds, takes),
        ]
        if part.layers:
            assert simulation.evaluate is not None
            stated.append((part.forward_seconds, simulation.evaluate.seconds))
        for claim, seconds in stated:
            if claim is None or not _same(claim, seconds, seconds):
                raise InvalidFleet("seconds", name, f"{claim} s are stated, the replay finds {seconds} s")
        _check_bound(name, part.bound_seconds, takes)

    # --- the whole -------------------------------------------------------------------------------------------------

    def _replayed(self) -> FleetSimulation:
        fleet = self.fleet
        if fleet.in_rounds:
            return self._round()
        if fleet.cut:
            return FleetSimulation(makespan_seconds=self._played(fleet.replicas[0]).makespan)
        return replayed(fleet, self.plans)

    def _check_makespan(self, simulation: FleetSimulation) -> None:
        fleet = self.fleet
        claims = ("makespan_seconds", "compute_seconds", "exchange_seconds", "update_seconds")
        for claim in claims:
            stated, seconds = getattr(fleet, claim), getattr(simulation, claim)
            if not _same(stated, seconds, simulation.makespan_seconds):
                raise InvalidFleet("makespan", claim, f"{stated} s are stated, the replay finds {seconds} s")
        _check_bound("bound_seconds", fleet.bound_seconds, simulation.makespan_seconds)

    def _played(self, replica: Replica) -> Played:
        """An update of a replica on the clock, of which each message is held against what it needs."""
        stations = stations_of(self.fleet, replica, self.plans, self.replays)
        played = play(stations, self.fleet.accumulate)
        does = {(doing.what, doing.station, doing.number): doing for doing in played.doings if doing.to is None}
        slack = ROUNDING * played.makespan
        for message in played.doings:
            if message.to is None:
                continue
            source, number = stations[message.station], message.number
            arrived = message.end + source.link.latency_seconds + stations[message.to].link.latency_seconds
            if message.to > message.station:
                marks = source.forward if source.ahead else source.train
                ready = does["forward", message.station, number].begin + marks.send_up
                used = does["forward", message.to, number].end
            else:
                ready = does["backward", message.station, number].begin
                used = does["backward", message.to, number].begin
            if message.begin < ready - slack or used < arrived - slack:
                raise InvalidFleet(
                    "order",
                    replica.parts[message.to].member,
                    f"micro-batch {number} from {replica.parts[message.station].member} is made at {ready} s, sent at"
                    f" {message.begin} s, there at {arrived} s and used until {used} s",
                )
        return played

    def _round(self) -> FleetSimulation:
        """A round: each device gets the adapter, takes its steps, where there is a server in turn with it, and
        answers.
        """
        fleet = self.fleet
        free, answered = 0.0, [0.0]
        for replica in fleet.replicas:
            device = self.members[replica.parts[0].member]
            takes, down_bytes, start = replica.parts[0].micro_batch_seconds, fleet.trained_bytes, 0.0
            if fleet.cut:
                takes = self._played(replica).makespan / fleet.accumulate
                down_bytes, start = replica.adapter_bytes, self.members[SERVER].start_seconds
            self._check_same("step", device, replica.step_seconds, takes)
            _check_bound(device.name, replica.bound_seconds, takes)
            if min(device.start_seconds, start) < 0:
                raise InvalidFleet("seconds", device.name, "a start takes less than no time")
            link = device.link
            head = down_bytes / link.down_bytes_per_second + link.latency_seconds + device.start_seconds
            counted = Turn.model_construct(
                head_seconds=head,
                begin_seconds=max(free, head) if fleet.cut else head,
                service_seconds=start + replica.micro_batches * replica.step_seconds,
                tail_seconds=replica.adapter_bytes / link.up_bytes_per_second + link.latency_seconds,
            )
            for what in Turn.model_fields:
                stated = None if replica.turn is None else getattr(replica.turn, what)
                invariant = "order" if what == "begin_seconds" else "seconds"
                self._check_same(what.removesuffix("_seconds"), device, stated, getattr(counted, what), invariant)
            free = counted.end_seconds
            answered.append(counted.answered_seconds)
        return FleetSimulation(makespan_seconds=max(answered))

    def _check_same(
        self, what: str, member: Member, stated: float | None, counted: float, invariant: str = "seconds"
    ) -> None:
        if stated is None or not _same(stated, counted, counted):
            raise InvalidFleet(
                invariant, member.name, f"{stated} s are stated for its {what}, the count is {counted} s"
            )


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
