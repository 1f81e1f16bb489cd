"""Rematerialisation across layers: segments, runs of layers whose forward runs a second time as a whole.

After the first pass through a segment only the tensors stay that the segment reads from before it, kept or offloaded.
Just before the backward of the segment's last layer, all its forwards run again, now as the training forward under each
layer's own decision; then the backwards follow as usual. √n layers per segment is the rule of Chen et al. (arXiv
1604.06174).

Within both passes a tensor lives from when it is made to its last use before it is made again. The second pass leaves
out operators whose outputs nothing would read: those for the output of the segment's last layer, and those that a layer
recomputes in its own backward window anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tightfit.planner.instructions import Run
from tightfit.planner.problem.layer_types import ALWAYS, LayeredStep
from tightfit.planner.problem.step_graph import StepOperator
from tightfit.planner.schedule.layer_schedule import Action, Script

if TYPE_CHECKING:
    from tightfit.planner.schedule.lowering import DraftInstruction
    from tightfit.planner.schema import Plan

Segments = tuple[tuple[int, int], ...]
"""(first, last) layer of each segment, in forward order; a layer is in one at most"""


def repeatable(problem: LayeredStep) -> Segments:
    """The longest runs of layers whose whole forward may run twice.

    Left out are layers with random operators or with the step's loss, and layers that overwrite a tensor that another
    layer made or that outlives the step; also the last layer, whose backward follows its forward at once, so that
    running it again would save nothing.
    """
    profile, graph = problem.profile, problem.graph
    count = len(problem.layer_type)
    outcome = {profile.loss, profile.token_losses}

    def repeats(step: StepOperator) -> bool:
        if not step.recomputable:
            return False
        for name in filter(None, step.outputs):
            storage = graph.storages[name]
            makers = [graph.steps[i] for i in storage.producers]
            elsewhere = any(maker.layer != step.layer for maker in makers if maker.phase == "forward")
            if name in outcome or elsewhere or storage.kind in ALWAYS or storage.kind == "weight":
                return False
        return True

    # Layers that have operators of their own for inference are left out: their first pass, run as in an evaluation,
    # would use those.
    split = {step.layer for step in graph.inference}
    may = [layer not in split and all(map(repeats, steps)) for layer, steps in enumerate(problem.forward_steps[:-1])]
    runs: list[tuple[int, int]] = []
    for layer in range(count - 1):
        if may[layer] and runs and runs[-1][1] == layer - 1:
            runs[-1] = (runs[-1][0], layer)
        elif may[layer]:
            runs.append((layer, layer))
    return tuple(runs)


def equal_segments(problem: LayeredStep, length: int) -> Segments:
    """Segments of `length` layers, cut from every repeatable run starting at its end.

    The segment just before the model's last layer is left out: its backward comes first, so keeping its tensors takes
    no more memory than any other segment does during its own backward.
    """
    pieces: list[tuple[int, int]] = []
    for first, last in repeatable(problem):
        ends = list(range(last, first - 1, -length))
        pieces += [(max(first, end - length + 1), end) for end in reversed(ends)]
    if pieces and pieces[-1][1] == len(problem.layer_type) - 2:
        del pieces[-1]
    return tuple(piece for piece in pieces if piece[1] > piece[0])


def sqrt_segments(problem: LayeredStep) -> Segments:
    """Segments of about √n of n layers (Chen et al. 2016)."""
    return equal_segments(problem, max(2, round(math.sqrt(len(problem.layer_type) - 1))))


def entering(problem: LayeredStep, segment: tuple[int, int]) -> dict[str, int]:
    """Tensors that the forwards of a segment read and that were made before it: tensor -> the segment's layer whose
    decision covers it, or -1.
    """
    first, last = segment
    steps = [step for layer in range(first, last + 1) for step in problem.forward_steps[layer]]
    written = {name for step in steps for name in step.outputs}
    read = {name for step in steps for name in step.inputs if _lives(problem, name)} - written
    owner = dict.fromkeys(sorted(read), -1)
    for layer in range(first, last + 1):
        for value in problem.types[problem.layer_type[layer]].owned:
            if problem.name(layer, value) in read:
                owner[problem.name(layer, value)] = layer
    return owner


def _lives(problem: LayeredStep, name: str) -> bool:
    kind = problem.graph.storages[name].kind
    return kind not in ALWAYS and kind != "weight"


def rerun_layers(plan: Plan) -> list[str]:
    """Names of the layers in a plan's segments, in forward order, found in its instructions: those whose forward runs
    again before a later layer's backward, up to that layer. Empty for plans that recompute inside a layer's own
    backward window only.
    """
    order = {layer.name: index for index, layer in enumerate(plan.layers)}
    programs = {program.name: program for program in plan.programs}
    backward = {
        layer.name: {i for i, op in enumerate(programs[layer.program].operators) if op.phase == "backward"}
        for layer in plan.layers
    }
    rerun: set[int] = set()
    for step in plan.steps:
        ran: set[tuple[str, int]] = set()
        lowest = len(order)
        for instruction in step.instructions:
            if not isinstance(instruction, Run):
                continue
            layer, position = instruction.layer, instruction.operator
            if position in backward[layer]:
                rerun.update(range(lowest, order[layer] + 1) if lowest < order[layer] else ())
                lowest = len(order)
            elif (layer, position) in ran:
                lowest = min(lowest, order[layer])
            ran.add((layer, position))
    return [layer.name for layer in plan.layers if order[layer.name] in rerun]


class SegmentPasses:
    """The instructions of the two passes through the segments: for each layer's window, and cleaned up over the whole
    step.
    """

    def __init__(self, problem: LayeredStep, segments: Segments) -> None:
        self.problem = problem
        self.ends = {last: (first, last) for first, last in segments}
        self.layers = {layer for first, last in segments for layer in range(first, last + 1)}
        self.given: dict[int, frozenset[str]] = {}
        """layer -> tensors made before its segment that its decision covers, in local names"""
        for segment in segments:
            owner = entering(problem, segment)
            for layer in range(segment[0], segment[1] + 1):
                owned = problem.types[problem.layer_type[layer]].owned
                self.given[layer] = frozenset(v for v in owned if owner.get(problem.name(layer, v)) == layer)
        ran = [step for layer in sorted(self.layers) for step in problem.forward_steps[layer]]
        names = {name for step in ran for name in [*step.inputs, *filter(None, step.outputs)]}
        self.names = frozenset(name for name in names if _lives(problem, name))
        """tensors whose lifetimes the passes change"""

    def first(self, layer: int, script: Script) -> Iterator[Action]:
        """The first pass: the forward as in an evaluation, after spilling the segment's inputs that are to be
        offloaded.
        """
        yield from (("spill", value) for value in sorted(self.given[layer] & script.offloaded))
        yield from script.evaluate

    def second(self, layer: int, script: Script) -> Iterator[Action]:
        """The second pass: the training forward, after fetching the segment's offloaded inputs, which need not be
        spilled again.
        """
        away = self.given[layer] & script.offloaded
        yield from (("fetch", value) for value in sorted(away))
        yield from (action for action in script.forward if action[0] != "spill" or action[1] not in away)

    def with_frees_placed(self, entries: Sequence[tuple[DraftInstruction, int]]) -> tuple[DraftInstruction, ...]:
        """The step's entries with their frees placed anew, each after the tensor's last use before it is made again,
        and without operators of a second pass whose outputs nothing reads. `entries`: (entry, layer whose second pass
        it belongs to, or -1).
        """
        if not self.layers:
            return tuple(entry for entry, _ in entries)
        storages, steps = self.problem.graph.storages, self.problem.graph.steps
        makers = {name: steps[storages[name].producers[0]] for name in self.names}
        live: set[str] = set()
        entries_kept: list[tuple[DraftInstruction, int]] = []
        for entry, second_pass in reversed(entries):
            if entry.verb == "free" and entry.name in self.names:
                continue
            outputs = self.names.intersection(filter(None, entry.outputs))
            used, begun = set(outputs), set()
            if entry.verb == "run":
                if second_pass >= 0 and not outputs & live:
                    continue
                used.update(self.names.intersection(self.problem.inputs[entry.layer, entry.operator]))
                # Several operators may write parts of one tensor: its lifetime begins with the first of them.
                operator = entry.layer, entry.operator
                begun = {name for name in outputs if (makers[name].layer, makers[name].operator) == operator}
            elif entry.verb in {"spill", "fetch"} and entry.name in self.names:
                used = {entry.name}
                begun = used if entry.verb == "fetch" else set()
            entries_kept.extend((_free(entry, name), second_pass) for name in sorted(used - live, reverse=True))
            entries_kept.append((entry, second_pass))
            live |= used
            live -= begun
        assert not live, f"{sorted(live)} are used before they are made"
        return tuple(self._without_idle_weights(entries_kept[::-1]))

    def _without_idle_weights(self, entries: Sequence[tuple[DraftInstruction, int]]) -> Iterator[DraftInstruction]:
        """Leave out reads, unpackings and frees of weights in a second pass whose operators were left out."""
        busy: dict[int, set[str]] = {layer: set() for layer in self.layers}
        verbs: dict[tuple[int, str], set[str]] = {}
        for entry, owner in entries:
            if owner >= 0:
                if entry.verb == "run":
                    busy[owner].update(self.problem.inputs[entry.layer, entry.operator])
                verbs.setdefault((owner, entry.name), set()).add(entry.verb)

        def idle(layer: int, weight: str) -> bool:
            return weight not in busy[layer] and verbs.get((layer, weight), set()) >= {"unpack", "free"}

        for entry, owner in entries:
            if owner >= 0 and entry.verb in {"read", "unpack", "free"}:
                weight = entry.name.removeprefix("packed:")
                if idle(owner, weight):
                    packed = entry.verb == "read" or entry.name != weight
                    passing = "read" in verbs[owner, weight] and "free" in verbs.get((owner, f"packed:{weight}"), set())
                    if not packed or passing:
                        continue
            yield entry

    def remade(self, entries: Iterable[DraftInstruction]) -> frozenset[str]:
        """Tensors that layers in segments need for their backwards and that some operator makes a second time.

        `entries` are those that `with_frees_placed` returned.
        """
        ran: set[tuple[int, int]] = set()
        made_twice: set[str] = set()
        for entry in entries:
            if entry.verb == "run":
                operator = entry.layer, entry.operator
                if operator in ran:
                    made_twice.update(filter(None, entry.outputs))
                ran.add(operator)
        needed = set(self.problem.forced)
        for layer in self.layers:
            candidates = self.problem.types[self.problem.layer_type[layer]].candidates
            needed.update(self.problem.name(layer, value) for value in candidates)
        return frozenset(made_twice & needed)


def _free(entry: DraftInstruction, name: str) -> DraftInstruction:
    return replace(entry, verb="free", name=name, operator=-1, outputs=(), seconds=0.0, transfer=0.0)
