"""Expands one layer's decision into the instructions of its forward, backward and evaluation windows, and counts its
figures.

Instructions use the layer's local names. Reads, fetches and recomputation come as late as possible, frees as early as
possible. `measure` counts the bytes that each window holds and the seconds it takes; `prefetch` later moves transfers
into free memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tightfit.planner.instructions import Verb
from tightfit.planner.problem.layer_figures import SCALE, LayerFigures
from tightfit.planner.problem.layer_types import (
    LayerType,
    TrainableUpdate,
    WeightMode,
    compute_seconds,
    transfer_seconds,
    weight_uses,
)
from tightfit.planner.problem.step_graph import STATE_PREFIXES, SUM, state_names

Action = tuple[Verb, str]
"""(verb, local name); for "run" the name is the operator's position in the program"""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of one layer's tensors: candidates are kept, offloaded or, if in neither set, recomputed; each
    weight has a mode.
    """

    keep: frozenset[str]
    offload: frozenset[str]
    weights: tuple[tuple[str, WeightMode], ...]
    states: frozenset[str]
    """trainables whose optimizer state lies on disk between steps"""


@dataclass(frozen=True, kw_only=True)
class Script:
    """The instructions of one layer under a decision, window by window."""

    forward: tuple[Action, ...]
    backward: tuple[Action, ...]
    evaluate: tuple[Action, ...]
    update: tuple[Action, ...]
    """the updates of its trainables, where these are apart"""
    kept: frozenset[str]
    """candidates that stay resident from forward to backward"""
    offloaded: frozenset[str]
    recomputed: tuple[int, ...]
    """operators that run again, in execution order"""


@dataclass(frozen=True, kw_only=True)
class Column(LayerFigures[float]):
    """A layer's decision with its figures, in bytes and seconds, counted on the instructions it expands to."""

    decision: Decision

    @property
    def core_seconds(self) -> float:
        """Seconds for which the layer keeps the cores busy, the cores' part of transfers included."""
        return (
            self.forward_seconds + self.backward_seconds + self.arriving_forward + self.arriving_backward + self.leaving
        )

    @property
    def row(self) -> list[float]:
        """The figures in the order of FIELDS, in KiB and ms."""
        return [value * scale for value, scale in zip(self.values(), SCALE)]


def expand(kind: LayerType, decision: Decision) -> Script:
    """The instructions of a layer's three windows under `decision`. Raises AssertionError where a tensor that is needed
    is neither kept, offloaded nor recomputable.
    """
    return _Expansion(kind, decision).script()


def measure(kind: LayerType, decision: Decision) -> Column:
    """The column of a decision: its figures, in bytes and seconds, counted on the instructions it expands to."""
    script = expand(kind, decision)
    outside = resident_between_steps(kind, decision)
    weights = _in_gap({name: mode.backward_gap for name, mode in decision.weights})
    between = _resident_states(kind, decision) | weights | script.kept
    forward = _seconds(kind, script.forward)
    backward = _seconds(kind, script.backward)
    apart = _seconds(kind, script.update)
    share = 1 / max(1, kind.apart)
    # An evaluation is the other schedule in which all layers are outside their windows of training.
    update_peak = _peak(kind, script.update, outside) - kind.across_evaluate if script.update else 0
    return Column(
        decision=decision,
        forward_peak=_peak(kind, script.forward, outside | kind.enters_forward),
        backward_peak=_peak(kind, script.backward, between | kind.enters_backward),
        evaluate_peak=max(update_peak, _peak(kind, script.evaluate, outside | kind.enters_forward)),
        between=sum(size_of(kind, name) for name in between),
        outside=sum(size_of(kind, name) for name in outside),
        forward_seconds=forward.compute,
        backward_seconds=backward.compute + share * apart.compute,
        arriving_forward=forward.arriving,
        arriving_backward=backward.arriving + share * apart.arriving,
        leaving=forward.leaving + backward.leaving + share * apart.leaving,
        reads_forward=forward.reads,
        reads_backward=backward.reads,
        spills_forward=forward.spills,
        fetches_backward=backward.fetches,
        # Nothing is written after the updates that are apart, so that all of their transfers count alike.
        states_fetched=backward.states_fetched + share * apart.disk,
        states_spilled=backward.states_spilled,
        instructions=len(script.forward) + len(script.backward) + len(script.evaluate) + len(script.update),
    )


def resident_between_steps(kind: LayerType, decision: Decision) -> set[str]:
    """Local names of what the layer holds from its backward window to the next step's forward window: weights and
    optimizer states.
    """
    return _resident_states(kind, decision) | _in_gap({name: mode.step_gap for name, mode in decision.weights})


def _resident_states(kind: LayerType, decision: Decision) -> set[str]:
    return {
        name for update in kind.updates if update.trainable not in decision.states for name in state_names_of(update)
    }


def state_names_of(update: TrainableUpdate) -> tuple[str, ...]:
    return state_names(update.trainable, update.roles)


def _in_gap(places: dict[str, str]) -> set[str]:
    return {name if place == "unpacked" else f"packed:{name}" for name, place in places.items() if place != "disk"}


def size_of(kind: LayerType, name: str) -> int:
    """Arena bytes of anything that a script allocates or frees."""
    if name.startswith("packed:"):
        return kind.weights[name[7:]].packed_bytes
    if name in kind.weights:
        return kind.weights[name].bytes
    if name.startswith(STATE_PREFIXES):
        role, _, trainable = name.partition(":")
        update = next(update for update in kind.updates if update.trainable == trainable)
        return update.role_bytes[update.roles.index(role)]
    return kind.bytes[name]


class _Expansion:
    def __init__(self, kind: LayerType, decision: Decision) -> None:
        self.kind = kind
        self.decision = decision
        self.modes = dict(decision.weights)
        self.operations = kind.operations
        self.producer = kind.producer
        self.candidates = set(kind.candidates)
        self._plan_backward()

    def script(self) -> Script:
        return Script(
            forward=tuple(self._forward(evaluate=False)),
            backward=tuple(self._backward()),
            evaluate=tuple(self._forward(evaluate=True)),
            update=tuple(action for update in self.kind.updates for action in self._update(update))
            if self.kind.apart
            else (),
            kept=self.kept,
            offloaded=self.offloaded,
            recomputed=tuple(self.again),
        )

    def _plan_backward(self) -> None:
        """Set the order of the backward window: each operator comes after the re-runs that its inputs need."""
        available = set(self.decision.keep) | set(self.decision.offload)
        used: set[str] = set()
        self.order: list[int] = []
        self.again: list[int] = []
        for op in self.kind.backward:
            needed = [value for value in op.inputs if value in self.candidates]
            reruns: set[int] = set()
            while needed:
                value = needed.pop()
                used.add(value)
                if value in available:
                    continue
                maker = self.producer.get(value)
                assert maker is not None, f"{value} was neither kept nor offloaded, and is not of this layer"
                assert maker.recomputable, f"{value} can neither be kept nor made again"
                if maker.index not in reruns:
                    reruns.add(maker.index)
                    needed.extend(v for v in maker.inputs if v in self.candidates)
            for index in sorted(reruns):
                self.again.append(index)
                self.order.append(index)
                available.update(self.operations[index].outputs)
            self.order.append(op.index)
        self.kept = frozenset(self.decision.keep & used)
        self.offloaded = frozenset(self.decision.offload & used)
        self.last_use: dict[str, int] = {}
        for position, index in enumerate(self.order):
            op = self.operations[index]
            for value in [*op.inputs, *op.outputs, *op.weights]:
                self.last_use[value] = position

    def _mode(self, weight: str) -> WeightMode:
        return self.modes[weight]

    def _forward(self, *, evaluate: bool) -> Iterable[Action]:
        kind = self.kind
        staying = kind.leaves_evaluate if evaluate else kind.leaves_forward | self.kept
        operations = kind.evaluate if evaluate else kind.forward
        uses = weight_uses(operations)
        last: dict[str, int] = {}
        for position, op in enumerate(operations):
            for value in [*op.inputs, *op.outputs]:
                last[value] = position
        if not evaluate:
            yield from (("spill", value) for value in sorted(kind.owned & self.offloaded))
        for position, op in enumerate(operations):
            for weight in op.weights:
                if uses[weight][0] == position or self._unpacked_at_each_use(weight):
                    first, last_use = uses[weight][0] == position, uses[weight][1] == position
                    yield from self._load_forward(weight, first=first, last=last_use, evaluate=evaluate)
            yield ("run", str(op.index))
            if not evaluate:
                yield from (("spill", value) for value in dict.fromkeys(op.outputs) if value in self.offloaded)
            for value in dict.fromkeys([*op.inputs, *op.outputs]):
                if last[value] == position and value not in staying:
                    yield ("free", value)
            for weight in op.weights:
                after = self._mode(weight).step_gap if evaluate else self._mode(weight).backward_gap
                if self._unpacked_at_each_use(weight) if uses[weight][1] != position else after != "unpacked":
                    yield ("free", weight)

    def _unpacked_at_each_use(self, weight: str) -> bool:
        """Whether each tile unpacks the weight for itself."""
        return self.kind.weights[weight].repeated and self._mode(weight).hold != "unpacked"

    def _load_forward(self, weight: str, *, first: bool, last: bool, evaluate: bool) -> Iterable[Action]:
        """Bring a weight that is not unpacked to a use, which may be the first or last of the window."""
        mode = self._mode(weight)
        if mode.step_gap == "unpacked":
            return
        if self.kind.weights[weight].trained:
            yield ("fetch", weight)
            return
        if (mode.step_gap if first else mode.hold) == "disk":
            yield ("read", weight)
        yield ("unpack", weight)
        after = mode.step_gap if evaluate else mode.backward_gap
        if (mode.hold if self._unpacked_at_each_use(weight) and not last else after) != "packed":
            yield ("free", f"packed:{weight}")

    def _backward(self) -> Iterable[Action]:
        kind = self.kind
        resident = set(self.kept) | set(kind.enters_backward)
        updates: dict[int, list[TrainableUpdate]] = {}
        for update in kind.updates:
            updates.setdefault(update.after, []).append(update)
        unpacked = {w for w, mode in self.modes.items() if mode.backward_gap == "unpacked"}
        packed = {w for w, mode in self.modes.items() if mode.backward_gap == "packed"}
        direct = -1
        staying = kind.leaves_backward | kind.closes_backward | {update.gradient for update in kind.updates}
        backward = {op.index for op in kind.backward}
        for position, index in enumerate(self.order):
            op = self.operations[index]
            for value in op.inputs:
                if value in self.offloaded and value not in resident:
                    yield ("fetch", value)
                    resident.add(value)
            for weight in op.weights:
                if weight in unpacked:
                    continue
                if self.kind.weights[weight].trained:
                    unpacked.add(weight)
                    yield ("fetch", weight)
                    continue
                if weight not in packed:
                    yield ("read", weight)
                    packed.add(weight)
                yield ("unpack", weight)
                unpacked.add(weight)
                if not self._keeps_packed(weight, position):
                    packed.discard(weight)
                    yield ("free", f"packed:{weight}")
            yield ("run", str(index))
            resident.update(op.outputs)
            for value in dict.fromkeys([*op.inputs, *op.outputs]):
                if self.last_use[value] == position and value not in staying:
                    resident.discard(value)
                    yield ("free", value)
            for weight in op.weights:
                # Values that are updated here stay until then.
                waits = self.kind.weights[weight].trained and not kind.apart
                if not waits and not self._keeps_unpacked(weight, position):
                    unpacked.discard(weight)
                    yield ("free", weight)
            if index in backward:
                direct += 1
                for update in updates.get(direct, ()):
                    yield from self._accumulate(update) if kind.apart else self._update(update)
        yield from (("free", value) for value in sorted(kind.closes_backward))

    def _update(self, update: TrainableUpdate) -> Iterable[Action]:
        """Update a trainable. Where that is apart, all that is on disk is fetched; the sum is not written, as the next
        step begins another.
        """
        away = update.trainable in self.decision.states
        moved = state_names_of(update) if away else ()
        fetched = moved
        if update.trainable in self.modes and self._mode(update.trainable).step_gap == "disk":
            moved = (update.trainable, *moved)
            fetched = moved if self.kind.apart else fetched
        yield from (("fetch", name) for name in fetched)
        yield ("update", update.trainable)
        written = (name for name in moved if not (self.kind.apart and name.startswith(SUM)))
        yield from (("spill", name) for name in written)
        yield from (("free", name) for name in moved)
        if not self.kind.apart:
            yield ("free", update.gradient)

    def _accumulate(self, update: TrainableUpdate) -> Iterable[Action]:
        """Add a gradient to its sum; one that stands alone is copied, over whatever was there."""
        name = f"{SUM}{update.trainable}"
        away = update.trainable in self.decision.states
        if away and self.kind.apart > 1:
            yield ("fetch", name)
        yield ("accumulate", update.trainable)
        if away:
            yield from (("spill", name), ("free", name))
        yield ("free", update.gradient)

    def _after(self, weight: str, position: int) -> str:
        """Where the weight is to be (disk, packed or unpacked) after its use at `position` of the backward window."""
        mode = self._mode(weight)
        if self.last_use[weight] == position:
            return mode.step_gap
        if self.kind.weights[weight].repeated:
            return mode.hold
        if self._inside_backward(weight, position):
            return "unpacked"
        return mode.hold

    def _inside_backward(self, weight: str, position: int) -> bool:
        """Whether `position` lies from the first direct use on, for weights whose uses share one unpacking (not
        `unpacked_per_use`, nor `repeated`).
        """
        if self.kind.weights[weight].repeated:
            return False
        return not self.kind.weights[weight].unpacked_per_use and self.order[position] >= self.kind.backward[0].index

    def _keeps_packed(self, weight: str, position: int) -> bool:
        mode = self._mode(weight)
        if mode.backward_gap == mode.step_gap == "packed":
            return True
        after = self._after(weight, position)
        if after == "packed":
            return True
        # The weight stays unpacked until a later use, and its packed form has to be there after that one.
        held = self.kind.weights[weight].repeated and mode.hold == "unpacked"
        return mode.step_gap == "packed" and (held or self._inside_backward(weight, position))

    def _keeps_unpacked(self, weight: str, position: int) -> bool:
        return self._after(weight, position) == "unpacked"


def _peak(kind: LayerType, script: Iterable[Action], start: Iterable[str]) -> int:
    """Most bytes held during the script, which begins with the tensors `start` resident."""
    resident = set(start)
    outputs = {index: op.outputs for index, op in kind.operations.items()}
    live = peak = sum(size_of(kind, name) for name in resident)
    for verb, name in script:
        if verb == "free":
            resident.remove(name)
            live -= size_of(kind, name)
            continue
        outputs_made: tuple[str, ...] = ()
        if verb == "run":
            outputs_made = outputs[int(name)]
        elif verb == "read":
            outputs_made = (f"packed:{name}",)
        elif verb in {"unpack", "fetch"}:
            outputs_made = (name,)
        elif verb == "accumulate":
            outputs_made = (f"{SUM}{name}",)
        for value in outputs_made:
            if value not in resident:
                resident.add(value)
                live += size_of(kind, value)
        peak = max(peak, live)
    return peak


@dataclass(kw_only=True)
class _ScriptSeconds:
    compute: float = 0.0
    arriving: float = 0.0
    leaving: float = 0.0
    reads: float = 0.0
    spills: float = 0.0
    fetches: float = 0.0
    states_fetched: float = 0.0
    states_spilled: float = 0.0

    @property
    def disk(self) -> float:
        return self.reads + self.spills + self.fetches + self.states_fetched + self.states_spilled


def _seconds(kind: LayerType, script: Iterable[Action]) -> _ScriptSeconds:
    """Seconds for which the script keeps the cores and the disk busy, by kind of work."""
    total = _ScriptSeconds()
    operators = {index: op.seconds for index, op in kind.operations.items()}
    adding = {update.trainable: update.seconds for update in kind.updates}
    updates = {update.trainable: update.apart_seconds for update in kind.updates} if kind.apart else adding
    for verb, name in script:
        if verb == "run":
            total.compute += operators[int(name)]
        elif verb == "read":
            total.arriving += kind.weights[name].read_compute_seconds
            total.reads += kind.weights[name].read_seconds
        elif verb == "unpack":
            total.compute += kind.weights[name].unpack_seconds
        elif verb == "update":
            total.compute += updates[name]
        elif verb == "accumulate":
            total.compute += adding[name]
        elif verb in {"spill", "fetch"}:
            channel = kind.write if verb == "spill" else kind.read
            seconds = transfer_seconds(channel, kind.raw_bytes[name])
            cost = compute_seconds(channel, kind.raw_bytes[name])
            total.arriving += cost if verb == "fetch" else 0.0
            total.leaving += cost if verb == "spill" else 0.0
            if name in kind.weights:  # a trainable's values: read like a weight, written like a state
                total.reads += seconds if verb == "fetch" else 0.0
                total.states_spilled += seconds if verb == "spill" else 0.0
            elif name.startswith(STATE_PREFIXES):
                total.states_fetched += seconds if verb == "fetch" else 0.0
                total.states_spilled += seconds if verb == "spill" else 0.0
            else:
                total.fetches += seconds if verb == "fetch" else 0.0
                total.spills += seconds if verb == "spill" else 0.0
    return total
