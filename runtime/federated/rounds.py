"""The server's rounds: sends the fleet's adapter out, gathers answers until the round is over, adds them up, saves.

Devices first say who they are (round 0 of their orders), and send the labels of their data where the server computes
the upper layers of the model. In a round every device has a turn. One that is there gets its order with its part of the
adapter at once. If the server computes upper layers for it, its run waits at a port of its own, and the server serves
one device after the other in the order of the plan (`tightfit.runtime.federated.service`); one that is not there is
waited for in its turn until `grace` is over, then served when it comes. A device's part counts when its answer is
there, and what the server has trained for it.

A round is over when every member's part is there; or when those of the devices that are there are, at least `least` of
them, and `grace` seconds have passed in which others may come; or when its time is up and `least` are there. The others
are left out. A device that leaves and comes back is sent the round's adapter again. Where too few have answered in time
the round goes on: their answers stay good, and all others are asked once more.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tightfit.planner.fleet.members import trained_tensors
from tightfit.planner.fleet.schema import FleetPlan, Replica
from tightfit.planner.schema import Plan
from tightfit.profiles.models.lora import check_planned
from tightfit.runtime.common.errors import InputError, TightfitError
from tightfit.runtime.common.files import write_whole
from tightfit.runtime.engine.training.adapter import BODY, WEIGHTS, adapter_config
from tightfit.runtime.federated import aggregate
from tightfit.runtime.federated.messages import HELLO, Answer, Order
from tightfit.runtime.federated.options import RoundOptions
from tightfit.runtime.federated.rounds_folder import RoundsFolder, SavedRound
from tightfit.runtime.federated.service import ServerRun
from tightfit.runtime.federated.split_stage import check_labels
from tightfit.runtime.session.fleet import free_port
from tightfit.runtime.session.given_adapter import layers_with_pairs

LOOK_SECONDS = 0.5
"""between two looks at devices and the run of the upper layers"""
HELLO_SECONDS = 120.0
"""that a device has to say who it is"""
MOST_ASKED = 5
"""times that one device is asked in a round, whatever becomes of its answers"""
NOBODY = -1


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What has come for a message: the answer with its adapter, or what became of it instead."""

    message: str
    answer: Answer | None
    adapter: bytes = b""
    error: str = ""


class Network(Protocol):
    """The devices as the server reaches them."""

    def nodes(self) -> set[int]:
        """Numbers of the nodes that are connected now."""
        ...

    def send(self, node: int, order: Order, adapter: bytes) -> str:
        """Send an order; returns the message's id."""
        ...

    def replies(self, messages: Iterable[str]) -> list[Reply]:
        """What has come since for these messages; each is told once."""
        ...


Trained = tuple[dict[str, Any], aggregate.Tensors]
"""what the record of the round says of a part, and its tensors"""


@dataclass
class Turn:
    """A device's part of a round, as far as it has come."""

    upper: Trained | None
    """what the server has trained for it; from the beginning where it has nothing to train"""
    answer: Trained | None = None
    message: str = ""
    """its order, while it is under way"""
    node: int = NOBODY
    """which was sent the latest order"""
    asked: int = 0
    """orders that it was sent, and runs of the server's that have failed for it"""


@dataclass
class Round:
    """A round while its answers come."""

    number: int
    adapter: aggregate.Tensors
    began: float
    until: float
    turns: dict[str, Turn]
    """by member, in the order of the plan"""
    answers: dict[str, Trained] = field(default_factory=dict)
    """the parts that count, by member"""
    left_out: dict[str, str] = field(default_factory=dict)
    """by member: why its part does not count"""
    service: ServerRun | None = None
    """the run of the upper layers that is under way"""


class Rounds:
    """A federated run on the server's side."""

    def __init__(
        self,
        fleet: FleetPlan,
        plans: Mapping[str, Plan],
        options: RoundOptions,
        network: Network,
        *,
        say: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`plans` are those of the fleet's parts, by the names that these have there; `say` is told what happens."""
        self.fleet, self.options, self.network = fleet, options, network
        self.say, self.clock, self.sleep = say, clock, sleep
        self.folder = RoundsFolder(options.out)
        self.members: dict[str, Replica] = dict(zip(fleet.names, fleet.replicas))
        self.plans = plans
        shapes = {part.plan: aggregate.shapes_of(plans[part.plan]) for part in fleet.parts}
        self.lower = {name: shapes[replica.parts[0].plan] for name, replica in self.members.items()}
        self.upper = {name: shapes[replica.parts[1].plan] for name, replica in self.members.items() if fleet.cut}
        """shapes of what the server trains for a device"""
        self.largest = max(fleet.replicas, key=lambda replica: replica.rank)
        plan = _whole([plans[part.plan] for part in self.largest.parts])
        self.shapes = aggregate.shapes_of(plan)
        names = [tensor.name for tensor in trained_tensors(plan)]
        self.mixed = len({replica.rank for replica in fleet.replicas}) > 1
        body = plan.model.config.get("adapter_body", BODY)
        assert plan.model.lora is not None
        base = plan.model.config.get("adapter_base", plan.model.source)
        self.config = adapter_config(plan.model.lora, names, base, body)
        if options.adapter:
            check_planned(Path(options.adapter), plan.model.lora, layers_with_pairs(plan))
        self.conditions = {
            "model": fleet.model,
            "weights": plan.model.store_fingerprint,
            "rank": self.largest.rank,
            "seed": options.seed,
        }
        self.timeout = options.timeout or 3 * fleet.makespan_seconds + 60.0
        self.ports = {name: options.port + at for at, name in enumerate(self.members) if name in self.upper}
        """where the server's run for a device listens"""
        self.places: dict[int, str] = {}
        """members by node, the latest to say who it is last"""
        self.greeted: dict[str, int] = {}
        """nodes by the message that asks who they are"""
        self.strange: dict[int, int] = {}
        """how often nodes have given no answer that helps"""
        self.missing: set[str] = set()
        """members that are not waited for in their turn"""

    def run(self) -> SavedRound:
        """All rounds that are still to be made; the last one. Raises InputError where an earlier run was another
        one.
        """
        saved = self._begun()
        while saved.number < self.options.rounds:
            saved = self._round(saved)
        self.folder.finish(saved)
        return saved

    def _begun(self) -> SavedRound:
        """The last round that was saved, or the start."""
        found = self.folder.latest()
        if found is None:
            found = SavedRound(number=0, record={"round": 0, "conditions": self.conditions}, adapter=self._first())
            self.folder.save(found, self.config)
        elif (made := found.record["conditions"]) != json.loads(json.dumps(self.conditions)):  # noqa: TID251  written by `json.dumps`
            told = "; ".join(
                f"{name} {made.get(name)}, now {now}" for name, now in self.conditions.items() if made.get(name) != now
            )
            raise InputError(f"{self.folder.out}: its rounds were made under other conditions ({told}); choose another")
        else:
            self.folder.tell(found)  # which a server that was killed may not have done
            self.say(f"going on after round {found.number}")
        return found

    def _first(self) -> bytes:
        if not self.options.adapter:
            return aggregate.closed(aggregate.started(self.shapes, self.options.seed))
        path = f"{self.options.adapter}/{WEIGHTS}"
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise InputError(
                f"{path}: {error.strerror}; give the folder of an adapter, such as a run's OUT/adapter"
            ) from error
        return aggregate.closed(aggregate.opened(content, self.shapes, self.largest.rank, path))

    # --- one round --------------------------------------------------------------------------------------------------

    def _round(self, before: SavedRound) -> SavedRound:
        number, began = before.number + 1, self.clock()
        current = aggregate.opened(before.adapter, self.shapes, self.largest.rank, f"round {before.number}")
        if self.mixed:
            current = aggregate.singular_form(current)
        gathered = self._gathered(number, current)
        told = {name: gathered.answers[name][0] for name in self.members if name in gathered.answers}
        # Parts are added up in the order of the plan.
        parts = [
            aggregate.DeviceContribution(tensors=gathered.answers[name][1], tokens=one["tokens"])
            for name, one in told.items()
        ]
        adapter = aggregate.closed(aggregate.averaged(parts, current))
        tokens = sum(part.tokens for part in parts)
        record = {
            "round": number,
            "conditions": self.conditions,
            "seconds": self.clock() - began,
            "tokens": tokens,
            "loss": sum(one["loss"] * one["tokens"] for one in told.values()) / tokens,
            "members": told,
            "left_out": {
                name: gathered.left_out.get(name, "it did not answer") for name in self.members if name not in told
            },
        }
        saved = SavedRound(number=number, record=record, adapter=adapter)
        self.folder.save(saved, self.config)
        self.say(
            f"round {number}: loss {record['loss']:.4f} over {tokens} tokens of {', '.join(told)},"
            f" {record['seconds']:.1f} s"
        )
        return saved

    def _gathered(self, number: int, adapter: aggregate.Tensors) -> Round:
        """A round with the parts that count, at least `least` of them."""
        began = self.clock()
        turns = {name: self._turn(name) for name in self.members}
        one = Round(number, adapter, began, began + self.timeout, turns)
        try:
            while not self._over(one):
                self._greet()
                self._ask_all(one)
                self._hear(one)
                self._serve(one)
                self.sleep(LOOK_SECONDS)
        finally:
            self._end_service(one)
        return one

    def _turn(self, name: str, *, node: int = NOBODY, asked: int = 0) -> Turn:
        return Turn(None if name in self.upper else ({}, {}), node=node, asked=asked)

    def _over(self, one: Round) -> bool:
        now = self.clock()
        if len(one.answers) == len(self.members):
            return True
        enough = len(one.answers) >= min(self.options.least, len(self.members))
        idle = not one.service and not any(turn.message and turn.asked <= MOST_ASKED for turn in one.turns.values())
        if enough and (now >= one.until or (idle and now - one.began >= self.options.grace)):
            return True
        if now >= one.until:
            self.say(
                f"round {one.number}: {len(one.answers)} answers in {self.timeout:.0f} s are too few, asking again"
            )
            self._end_service(one)
            one.turns |= {name: self._turn(name) for name in one.turns if name not in one.answers}
            one.until = now + self.timeout
        return False

    # --- who is there -----------------------------------------------------------------------------------------------

    def _greet(self) -> None:
        """Ask nodes that are new who they are."""
        present = self.network.nodes()
        for node in set(self.places) - present:
            del self.places[node]
        new = present - set(self.places) - set(self.greeted.values())
        new -= {node for node, times in self.strange.items() if times >= MOST_ASKED}
        known = json.dumps({name: self._digest(name) for name in self.upper}) if new else ""
        for node in sorted(new):
            order = Order(round=HELLO, seconds=HELLO_SECONDS, labels=known)
            self.greeted[self.network.send(node, order, b"")] = node
        for reply in self.network.replies(list(self.greeted)):
            node = self.greeted.pop(reply.message)
            if reply.answer is not None:
                self._welcome(node, reply.answer, reply.adapter)

    def _welcome(self, node: int, answer: Answer, labels: bytes) -> None:
        name = answer.member
        try:
            if name not in self.members:
                raise InputError(f"member {name!r} takes no part")
            if answer.error:
                raise InputError(answer.error)
            if labels:
                check_labels(labels, self.plans[name], f"the labels of {name}")
                write_whole(self.folder.labels(name), labels)
        except InputError as error:
            self.strange[node] = self.strange.get(node, 0) + 1
            self.say(f"node {node}: {error}")
            return
        self.places[node] = name
        self.missing.discard(name)

    def _digest(self, name: str) -> str:
        """sha256 of the labels that a device has sent; empty where it has sent none."""
        try:
            return hashlib.sha256(self.folder.labels(name).read_bytes()).hexdigest()
        except OSError:
            return ""

    # --- orders and answers -----------------------------------------------------------------------------------------

    def _order(self, one: Round, name: str) -> Order:
        return Order(
            round=one.number,
            steps=json.dumps({name: self.members[name].micro_batches}),
            lr=self.options.rate(one.number),
            weight_decay=self.options.weight_decay,
            seed=self.options.seed + one.number,
            seconds=max(1.0, one.until - self.clock()),
            port=self.ports.get(name, 0),
        )

    def _ask_all(self, one: Round) -> None:
        """Send its order to every device that is there and has none."""
        for name, node in {name: node for node, name in self.places.items()}.items():
            turn = one.turns[name]
            if turn.answer is None and turn.node not in (NOBODY, node):  # it has come back as another node
                turn = self._anew(one, name, self._turn(name))
            if turn.message or turn.answer or turn.asked >= MOST_ASKED or self.clock() >= one.until:
                continue
            if name in self.ports and not self.options.port:
                self.ports[name] = free_port()
            part = aggregate.closed({key: one.adapter[key] for key in self.lower[name]})
            turn.message, turn.node = self.network.send(node, self._order(one, name), part), node
            turn.asked += 1

    def _hear(self, one: Round) -> None:
        waiting = {turn.message: name for name, turn in one.turns.items() if turn.message}
        for reply in self.network.replies(list(waiting)):
            name = waiting[reply.message]
            one.turns[name].message = ""
            self._take(one, name, reply)

    def _take(self, one: Round, name: str, reply: Reply) -> None:
        turn, answer, asked = one.turns[name], reply.answer, MOST_ASKED
        try:
            if answer is None:
                asked = turn.asked
                self.places.pop(turn.node, None)
                raise InputError(f"it gave no answer ({reply.error})")
            if answer.error or (answer.round, answer.member) != (one.number, name):
                raise InputError(answer.error or f"it answered for {answer.member} in round {answer.round}")
            place = f"the answer of {name}"
            tensors = aggregate.opened(reply.adapter, self.lower[name], self.members[name].rank, place)
            turn.answer = asdict(answer), tensors
        except InputError as error:
            # What went wrong with a device alone goes wrong again; with the server's part it may have been the
            # server's.
            self._anew(one, name, self._turn(name, node=turn.node, asked=turn.asked if name in self.upper else asked))
            one.left_out[name] = str(error)
            self.say(f"round {one.number}: {name} is left out: {error}")
            return
        self._complete(one, name)

    def _anew(self, one: Round, name: str, turn: Turn) -> Turn:
        """Begin a device's turn again, and end the server's run for it, if it is under way."""
        if one.service and one.service.member == name:
            self._end_service(one)
        one.turns[name] = turn
        return turn

    def _complete(self, one: Round, name: str) -> None:
        """Count a device's part once both halves are there."""
        turn = one.turns[name]
        if turn.answer is None or turn.upper is None:
            return
        told, tensors = turn.answer[0] | turn.upper[0], turn.answer[1] | turn.upper[1]
        one.answers[name] = told, {key: tensors[key] for key in self.shapes}
        one.left_out.pop(name, None)
        self.say(f"round {one.number}: {name} took {told['steps']} steps in {told['seconds']:.1f} s")

    # --- the upper layers -------------------------------------------------------------------------------------------

    def _serve(self, one: Round) -> None:
        if one.service is None:
            name = self._next(one)
            if name is not None:
                part = aggregate.closed({key: one.adapter[key] for key in self.upper[name]})
                self.say(f"round {one.number}: serving {name}")
                one.service = ServerRun.begun(
                    self.folder, self.options, name, self._order(one, name), part, self.clock()
                )
            return
        name, turn = one.service.member, one.turns[one.service.member]
        try:
            turn.upper = one.service.trained(self.upper[name], self.members[name].rank, self.clock())
        except (TightfitError, OSError) as error:
            # The device's run still waits, and is served again; or has failed too, which its answer says. One that has
            # answered is asked again.
            turn.asked += 1
            if turn.answer:
                one.turns[name] = self._turn(name, node=turn.node, asked=turn.asked)
            one.left_out[name] = str(error)
            self.say(f"round {one.number}: {name}: {error}")
            one.service = None
            return
        if turn.upper:
            one.service = None
            self._complete(one, name)

    def _next(self, one: Round) -> str | None:
        """The device whose turn it is: the first in the plan's order that is there, unless one before it may still
        come.
        """
        patient = self.clock() - one.began < self.options.grace
        for name, turn in one.turns.items():
            if turn.upper is not None or turn.asked > MOST_ASKED:
                continue
            if turn.message:
                return name
            there = name in self.places.values()
            if there and turn.asked == MOST_ASKED:
                continue
            if name not in self.missing and patient:
                return None
            if not there:
                self.missing.add(name)
        return None

    def _end_service(self, one: Round) -> None:
        if one.service:
            one.service.end()
            one.service = None


def _whole(plans: Sequence[Plan]) -> Plan:
    """The plan of a replica's first part, with the tensors of all its parts."""
    return plans[0].model_copy(update={"tensors": [tensor for plan in plans for tensor in plan.tensors]})
