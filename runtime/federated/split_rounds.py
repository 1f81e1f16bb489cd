"""Split federated rounds on the server's side: serves one device after the other, and adds the whole adapters up.

Devices first say who they are (round 0 of their orders) and send the labels of their data. In a round every device that is
there gets its order with the lower part of the adapter at once, so that it is ready when its turn comes: its run waits at a
port of its own. In the order of the plan the server runs the upper layers for each, as a `tightfit run` under its own cap.
A device that is not there is waited for in its turn until `grace` is over, then served when it comes. Its part counts when
both its answer and the upper part are there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tightfit.planner.fleet.schema import SplitPlan
from tightfit.planner.schema import Plan
from tightfit.runtime.common import interpreter
from tightfit.runtime.common.errors import InputError, TightfitError
from tightfit.runtime.common.files import write_whole
from tightfit.runtime.engine.training.adapter import WEIGHTS
from tightfit.runtime.federated import aggregate
from tightfit.runtime.federated.device import MODULE, end, report_of, stage_arguments, start
from tightfit.runtime.federated.messages import HELLO, Answer, Order
from tightfit.runtime.federated.options import RoundOptions
from tightfit.runtime.federated.rounds import MOST_ASKED, Gathering, Network, Reply, Rounds
from tightfit.runtime.federated.split_stage import check_labels
from tightfit.runtime.session.fleet import free_port
from tightfit.runtime.supervision.failure import last_message

LOOK_SECONDS = 0.5
"""between two looks at devices and the run of the upper layers"""
HELLO_SECONDS = 120.0
"""that a device has to say who it is"""
STAGES, LABELS = "stages", "labels"
"""folders in the output: of the server's runs, of the labels that devices have sent; by device"""


@dataclass(frozen=True, kw_only=True)
class SplitAnswer(Answer):
    """What a device says of its part, with the server's side of it."""

    server_seconds: float
    """for which the server was busy with it"""
    server_peak_bytes: int


@dataclass
class _Turn:
    """A device's part of a round, as far as it has come."""

    message: str = ""
    """its order, while it is under way"""
    node: int = -1
    asked: int = 0
    """orders that it was sent, and runs of the server's that have failed for it"""
    answer: tuple[Answer, aggregate.Tensors] | None = None
    upper: tuple[dict[str, Any], aggregate.Tensors] | None = None
    """what the server trained for it: the report, and the tensors"""


@dataclass
class _Service:
    """The run of the upper layers that is under way."""

    member: str
    process: subprocess.Popen[bytes]
    began: float


@dataclass
class _State:
    """A round while devices are served."""

    number: int
    adapter: aggregate.Tensors
    began: float
    until: float
    turns: dict[str, _Turn]
    gathered: Gathering = field(default_factory=Gathering)
    service: _Service | None = None


class SplitRounds(Rounds):
    """Rounds of a split federated plan."""

    def __init__(
        self,
        fleet: SplitPlan,
        plans: Mapping[str, Plan],
        server_plans: Mapping[str, Plan],
        options: RoundOptions,
        network: Network,
        **said: Any,
    ) -> None:
        """`plans` and `server_plans` are those of the devices that take part, by name; for `said` see `Rounds`."""
        whole = {name: _whole(plan, server_plans[name]) for name, plan in plans.items()}
        super().__init__(fleet, whole, options, network, **said)
        self.lower = {name: aggregate.shapes_of(plan) for name, plan in plans.items()}
        self.upper = {name: aggregate.shapes_of(plan) for name, plan in server_plans.items()}
        self.plans = plans
        self.ports = {member.name: options.port + place for place, member in enumerate(fleet.taking)}
        self.places: dict[int, str] = {}
        """members by node"""
        self.greeted: dict[str, int] = {}
        """nodes by the message that asks who they are"""
        self.strange: dict[int, int] = {}
        """how often nodes have given no answer that helps"""
        self.missing: set[str] = set()
        """members that are not waited for in their turn"""
        self.out = Path(options.out)

    # --- one round --------------------------------------------------------------------------------------------------

    def _gathered(self, number: int, adapter: bytes) -> Gathering:
        current = aggregate.opened(adapter, self.shapes, self.largest.rank, f"round {number}")
        began = self.clock()
        one = _State(number, current, began, began + self.timeout, {name: _Turn() for name in self.members})
        try:
            while not self._over(one):
                self._greet()
                self._ask_all(one)
                self._hear(one)
                self._serve(one)
                self.sleep(LOOK_SECONDS)
        finally:
            if one.service:
                end(one.service.process)
        return one.gathered

    def _over(self, one: _State) -> bool:
        answers, now = one.gathered.answers, self.clock()
        if len(answers) == len(self.members):
            return True
        enough = len(answers) >= min(self.options.least, len(self.members))
        open_turns = [turn for turn in one.turns.values() if turn.message and turn.asked <= MOST_ASKED]
        idle = one.service is None and not open_turns
        if enough and (now >= one.until or (idle and now - one.began >= self.options.grace)):
            return True
        if now >= one.until:
            self.say(f"round {one.number}: {len(answers)} answers in {self.timeout:.0f} s are too few, asking again")
            self._end_service(one)
            one.turns |= {name: _Turn() for name in one.turns if name not in answers}
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
        known = json.dumps({name: self._digest(name) for name in self.members}) if new else ""
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
                write_whole(self._labels(name), labels)
        except InputError as error:
            self.strange[node] = self.strange.get(node, 0) + 1
            self.say(f"node {node}: {error}")
            return
        self.places[node] = name
        self.missing.discard(name)

    def _labels(self, name: str) -> Path:
        return self.out / LABELS / f"{name}.records"

    def _digest(self, name: str) -> str:
        """sha256 of the labels that a device has sent; empty where it has sent none."""
        try:
            return hashlib.sha256(self._labels(name).read_bytes()).hexdigest()
        except OSError:
            return ""

    # --- orders and answers -----------------------------------------------------------------------------------------

    def _order(self, one: _State, name: str) -> Order:
        return Order(
            round=one.number,
            steps=json.dumps({name: self.members[name].steps}),
            lr=self.options.rate(one.number),
            weight_decay=self.options.weight_decay,
            seed=self.options.seed + one.number,
            seconds=max(1.0, one.until - self.clock()),
            port=self.ports[name],
        )

    def _ask_all(self, one: _State) -> None:
        """Send its order to every device that is there and has none."""
        for node, name in self.places.items():
            turn = one.turns[name]
            if turn.message or turn.answer or turn.upper or turn.asked >= MOST_ASKED or self.clock() >= one.until:
                continue
            lower = aggregate.closed({key: one.adapter[key] for key in self.lower[name]})
            if not self.options.port:
                self.ports[name] = free_port()
            turn.message, turn.node = self.network.send(node, self._order(one, name), lower), node
            turn.asked += 1

    def _hear(self, one: _State) -> None:
        waiting = {turn.message: name for name, turn in one.turns.items() if turn.message}
        for reply in self.network.replies(list(waiting)):
            name = waiting[reply.message]
            one.turns[name].message = ""
            self._take_answer(one, name, reply)

    def _take_answer(self, one: _State, name: str, reply: Reply) -> None:
        turn, answer = one.turns[name], reply.answer
        try:
            if answer is None:
                raise InputError(f"it gave no answer ({reply.error})")
            if answer.error or (answer.round, answer.member) != (one.number, name):
                raise InputError(answer.error or f"it answered for {answer.member} in round {answer.round}")
            tensors = aggregate.opened(reply.adapter, self.lower[name], self.largest.rank, f"the answer of {name}")
            turn.answer = answer, tensors
        except InputError as error:
            self._failed(one, name, str(error))
            if answer is None:
                self.places.pop(turn.node, None)
            return
        self._complete(one, name)

    def _failed(self, one: _State, name: str, why: str) -> None:
        """A device's part has failed; it is asked again while it may."""
        one.turns[name] = _Turn(asked=one.turns[name].asked)
        one.gathered.left_out[name] = why
        self.say(f"round {one.number}: {name} is left out: {why}")
        if one.service and one.service.member == name:
            self._end_service(one)

    def _complete(self, one: _State, name: str) -> None:
        """Count a device's part once both halves are there."""
        turn = one.turns[name]
        if turn.answer is None or turn.upper is None:
            return
        (answer, lower), (report, upper) = turn.answer, turn.upper
        both = lower | upper
        told = SplitAnswer(
            **asdict(answer),
            server_seconds=report["server_seconds"],
            server_peak_bytes=report["peak_bytes"]["measured"],
        )
        one.gathered.answers[name] = told, {key: both[key] for key in self.shapes}
        one.gathered.left_out.pop(name, None)
        self.say(f"round {one.number}: {name} took {answer.steps} steps in {answer.seconds:.1f} s")

    # --- the upper layers -------------------------------------------------------------------------------------------

    def _serve(self, one: _State) -> None:
        if one.service is None:
            name = self._next(one)
            if name is not None:
                one.service = self._begun_service(one, name)
            return
        service = one.service
        code = service.process.poll()
        if code is None:
            return
        one.service, turn = None, one.turns[service.member]
        try:
            if code:
                said = last_message(self._stage(service.member) / "log")
                raise InputError(f"the server's run for it ended with code {code}: {said}")
            run = self._stage(service.member) / "run"
            report = report_of(str(run)) | {"server_seconds": self.clock() - service.began}
            place = f"the upper part of {service.member}"
            content = (run / "adapter" / WEIGHTS).read_bytes()
            turn.upper = report, aggregate.opened(content, self.upper[service.member], self.largest.rank, place)
        except (TightfitError, OSError) as error:
            # The device's run still waits, and is served again; or has failed too, which its answer says. One that has
            # answered is asked again.
            turn.asked += 1
            if turn.answer:
                one.turns[service.member] = _Turn(asked=turn.asked)
            one.gathered.left_out[service.member] = str(error)
            self.say(f"round {one.number}: {service.member}: {error}")
            return
        self._complete(one, service.member)

    def _next(self, one: _State) -> str | None:
        """The device whose turn it is: the first in the plan's order that is there, unless one before it may still come."""
        patient = self.clock() - one.began < self.options.grace
        for name, turn in one.turns.items():
            if turn.upper is not None or name in one.gathered.answers:
                continue
            if turn.asked > MOST_ASKED:
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

    def _stage(self, name: str) -> Path:
        return self.out / STAGES / name

    def _begun_service(self, one: _State, name: str) -> _Service:
        folder = self._stage(name)
        shutil.rmtree(folder / "given", ignore_errors=True)
        write_whole(folder / "given" / WEIGHTS, aggregate.closed({key: one.adapter[key] for key in self.upper[name]}))
        arguments = stage_arguments(
            self.options.fleet,
            name,
            self._order(one, name),
            self.options.meet,
            str(self._labels(name)),
            str(folder / "given"),
            str(folder / "run"),
        )
        command = interpreter.command(MODULE, *arguments, "--server", *["--no-cgroup"] * (not self.options.cgroup))
        self.say(f"round {one.number}: serving {name}")
        return _Service(name, start(command, str(folder / "log")), self.clock())

    def _end_service(self, one: _State) -> None:
        if one.service:
            end(one.service.process)
            one.service = None


def _whole(lower: Plan, upper: Plan) -> Plan:
    """The plan of the lower layers, with all that is trained above."""
    trained = [tensor for tensor in upper.tensors if tensor.kind == "trainable"]
    return lower.model_copy(update={"tensors": [*lower.tensors, *trained]})
