"""The server's rounds: sends the fleet's adapter out, gathers answers until the round is over, adds them up, saves.

A round is over when every member has answered; or when the devices that are there have, at least `least` of them, and
`grace` seconds have passed in which others may come; or when its time is up and `least` have answered. Devices that did
not answer are left out. One that leaves and comes back is sent the round's adapter again. Where too few have answered in
time the round goes on: their answers stay good, and all others are asked once more.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from tightfit.planner.fleet.schema import AnyRounds, FederatedMember
from tightfit.planner.schema import Plan
from tightfit.profiles.models.lora import check_planned
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.adapter import BODY, adapter_config
from tightfit.runtime.federated import aggregate
from tightfit.runtime.federated.messages import Answer, Order
from tightfit.runtime.federated.options import RoundOptions
from tightfit.runtime.federated.rounds_folder import RoundsFolder, Saved
from tightfit.runtime.session.given_adapter import layers_with_pairs

POLL_SECONDS = 1.0
MOST_ASKED = 5
"""times that one node is asked in a round, whatever becomes of its answers"""


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


@dataclass
class Gathering:
    """A round while its answers come."""

    waiting: dict[str, int] = field(default_factory=dict)
    """node by message"""
    asked: dict[int, int] = field(default_factory=dict)
    """how often each node was asked"""
    answers: dict[str, tuple[Answer, aggregate.Tensors]] = field(default_factory=dict)
    """by member"""
    gone: set[int] = field(default_factory=set)
    """nodes that went away before they had answered, and may come back"""
    left_out: dict[str, str] = field(default_factory=dict)
    """by member or node: why its answer does not count"""


class Rounds:
    """A federated run on the server's side."""

    def __init__(
        self,
        fleet: AnyRounds,
        plans: Mapping[str, Plan],
        options: RoundOptions,
        network: Network,
        *,
        say: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`plans` are those of the members that take part, by name; `say` is told what happens."""
        self.fleet, self.options, self.network = fleet, options, network
        self.say, self.clock, self.sleep = say, clock, sleep
        self.folder = RoundsFolder(options.out)
        self.members: dict[str, FederatedMember] = {member.name: member for member in fleet.taking}
        self.largest = max(self.members.values(), key=lambda member: member.rank)
        plan = plans[self.largest.name]
        self.shapes = aggregate.shapes_of(plan)
        self.mixed = len({member.rank for member in self.members.values()}) > 1
        body = plan.model.config.get("adapter_body", BODY)
        names = [tensor.name for tensor in plan.tensors if tensor.kind == "trainable"]
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

    def run(self) -> Saved:
        """All rounds that are still to be made; the last one. Raises InputError where an earlier run was another one."""
        saved = self._begun()
        while saved.number < self.options.rounds:
            saved = self._round(saved)
        self.folder.finish(saved)
        return saved

    def _begun(self) -> Saved:
        """The last round that was saved, or the start."""
        found = self.folder.latest()
        if found is None:
            found = Saved(number=0, record={"round": 0, "conditions": self.conditions}, adapter=self._first())
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
        path = f"{self.options.adapter}/adapter_model.safetensors"
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise InputError(
                f"{path}: {error.strerror}; give the folder of an adapter, such as a run's OUT/adapter"
            ) from error
        return aggregate.closed(aggregate.opened(content, self.shapes, self.largest.rank, path))

    # --- one round --------------------------------------------------------------------------------------------------

    def _round(self, before: Saved) -> Saved:
        number, began = before.number + 1, self.clock()
        current = aggregate.opened(before.adapter, self.shapes, self.largest.rank, f"round {before.number}")
        if self.mixed:
            current = aggregate.singular_form(current)
        gathered = self._gathered(number, aggregate.closed(current))
        answered = [name for name in self.members if name in gathered.answers]  # in the order of the plan
        parts = [
            aggregate.Part(tensors=gathered.answers[name][1], tokens=gathered.answers[name][0].tokens)
            for name in answered
        ]
        adapter = aggregate.closed(aggregate.averaged(parts, current))
        told = {name: asdict(gathered.answers[name][0]) for name in answered}
        tokens = sum(part.tokens for part in parts)
        record = {
            "round": number,
            "conditions": self.conditions,
            "seconds": self.clock() - began,
            "tokens": tokens,
            "loss": sum(told[name]["loss"] * told[name]["tokens"] for name in answered) / tokens,
            "members": told,
            "left_out": {
                name: gathered.left_out.get(name, "it did not answer") for name in self.members if name not in told
            },
        }
        saved = Saved(number=number, record=record, adapter=adapter)
        self.folder.save(saved, self.config)
        self.say(
            f"round {number}: loss {record['loss']:.4f} over {tokens} tokens of {', '.join(answered)},"
            f" {record['seconds']:.1f} s"
        )
        return saved

    def _gathered(self, number: int, adapter: bytes) -> Gathering:
        """The answers of a round, at least `least` of them."""
        one = Gathering()
        began = self.clock()
        until = began + self.timeout
        while True:
            now = self.clock()
            self._ask(one, number, adapter, until - now)
            for reply in self.network.replies(list(one.waiting)):
                self._take(one, reply, number)
            enough = len(one.answers) >= min(self.options.least, len(self.members))
            if len(one.answers) == len(self.members):
                return one
            if enough and (now >= until or (not one.waiting and now - began >= self.options.grace)):
                return one
            if now >= until:
                self.say(
                    f"round {number}: {len(one.answers)} answers in {self.timeout:.0f} s are too few, asking again"
                )
                one.waiting.clear()
                one.asked.clear()
                until = now + self.timeout
            self.sleep(POLL_SECONDS)

    def _ask(self, one: Gathering, number: int, adapter: bytes, seconds: float) -> None:
        """Send the round's order to each node that has none."""
        busy = set(one.waiting.values())
        for node in sorted(self.network.nodes()):
            most = MOST_ASKED if node in one.gone else 1
            if node in busy or one.asked.get(node, 0) >= most or seconds <= 0:
                continue
            one.asked[node] = one.asked.get(node, 0) + 1
            order = Order(
                round=number,
                steps=json.dumps({name: member.steps for name, member in self.members.items()}),
                lr=self.options.rate(number),
                weight_decay=self.options.weight_decay,
                seed=self.options.seed + number,
                seconds=seconds,
            )
            one.waiting[self.network.send(node, order, adapter)] = node

    def _take(self, one: Gathering, reply: Reply, number: int) -> None:
        node = one.waiting.pop(reply.message)
        answer = reply.answer
        if answer is None:
            one.gone.add(node)
            self.say(f"round {number}: node {node} gave no answer ({reply.error})")
            return
        one.gone.discard(node)
        member = self.members.get(answer.member)
        try:
            if member is None:
                raise InputError(f"member {answer.member!r} takes no part")
            if answer.error:
                raise InputError(answer.error)
            if answer.round != number or answer.member in one.answers:
                return  # of an earlier round, or there twice
            place = f"the answer of {answer.member}"
            shapes = self.shapes
            one.answers[answer.member] = answer, aggregate.opened(reply.adapter, shapes, member.rank, place)
            one.left_out.pop(answer.member, None)
        except InputError as error:
            one.left_out[answer.member] = str(error)
            self.say(f"round {number}: {answer.member} is left out: {error}")
            return
        self.say(f"round {number}: {answer.member} took {answer.steps} steps in {answer.seconds:.1f} s")
