"""Lowers the layers' decisions to one schedule of the step: windows joined, names made global, sizes and seconds
attached.

The result is a list of `DraftInstruction` per phase, still without arena offsets. Each transfer stands where its tensor
is needed or made; `prefetch` moves transfers, `arena` gives every tensor its offset, and `instructions` writes the
plan's instruction list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from tightfit.planner.instructions import (
    Accumulate,
    Fetch,
    Free,
    Instruction,
    Pass,
    Perturb,
    Read,
    Run,
    Spill,
    Unpack,
    Update,
    Verb,
)
from tightfit.planner.problem.clipping import accumulate_seconds, clipped_seconds
from tightfit.planner.problem.gradients import Passages
from tightfit.planner.problem.layer_types import ALWAYS, LayeredStep, compute_seconds, transfer_seconds
from tightfit.planner.problem.step_graph import (
    PACKED_ALIGNMENT,
    STATE_PREFIXES,
    STATES,
    SUM,
    aligned,
    state_bytes,
    state_names,
)
from tightfit.planner.schedule.layer_schedule import Action, Column, Script, expand, resident_between_steps
from tightfit.planner.schedule.multi_layer_recompute import SegmentPasses, Segments

NAMED: dict[Verb, type[Free | Spill | Update]] = {kind.verb: kind for kind in (Free, Spill, Update)}
"""verb -> instruction, for those that name a tensor and nothing else"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftInstruction:
    """One instruction of a schedule whose tensors have no arena offsets yet."""

    verb: Verb
    name: str
    """the tensor (read, unpack: the weight; update, accumulate, perturb: the trainable); empty for run"""
    layer: int
    operator: int
    """run: position in the program; perturb: the multiple of epsilon"""
    outputs: tuple[str | None, ...]
    """run: storages by output position; pass: the gradient's name before and after"""
    seconds: float
    """time of computation; of a transfer, what it costs the cores"""
    transfer: float
    """seconds for which a transfer occupies the disk"""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """The schedules of a training step and of an evaluation, before tensors have arena offsets."""

    train: tuple[DraftInstruction, ...]
    evaluate: tuple[DraftInstruction, ...]
    update: tuple[DraftInstruction, ...]
    """where updates are apart, the schedule that updates all trainables after the last step of an update"""
    resident: tuple[str, ...]
    """tensors resident across steps"""
    sizes: dict[str, int]
    """arena bytes of every tensor that is ever resident"""
    scripts: tuple[Script, ...]
    """per layer"""
    remade: frozenset[str] = frozenset()
    """tensors that layers in segments recompute in the second pass for their backwards, whatever their own decisions
    say
    """

    @property
    def beside(self) -> tuple[DraftInstruction, ...]:
        """The schedules that run beside the training step, one after the other: each begins and ends with the tensors
        `resident`.
        """
        return (*self.evaluate, *self.update)


def draft(
    problem: LayeredStep,
    columns: tuple[Column, ...],
    passages: Passages | None = None,
    perturbed: Iterable[str] = (),
    segments: Segments = (),
) -> Draft:
    """Join the windows of all layers, each as its column decides; `passages` and `perturbed` are those of a
    `PartialStep`.
    """
    return _WindowJoiner(problem, columns, segments).join(passages or {}, tuple(perturbed))


def made_by(entry: DraftInstruction) -> tuple[str, ...]:
    """Tensors that the entry makes resident, or writes to again if they are resident already."""
    if entry.verb == "run":
        return tuple(name for name in entry.outputs if name is not None)
    if entry.verb == "read":
        return (f"packed:{entry.name}",)
    if entry.verb in {"unpack", "fetch"}:
        return (entry.name,)
    if entry.verb == "accumulate":
        return (f"{SUM}{entry.name}",)
    return ()


class _WindowJoiner:
    def __init__(self, problem: LayeredStep, columns: tuple[Column, ...], segments: Segments) -> None:
        self.problem = problem
        self.columns = columns
        self.passes = SegmentPasses(problem, segments)
        expanded: dict[tuple[int, int], Script] = {}
        for kind, column in zip(problem.layer_type, columns):
            if (kind, id(column)) not in expanded:
                expanded[kind, id(column)] = expand(problem.types[kind], column.decision)
        self.scripts = tuple(expanded[kind, id(column)] for kind, column in zip(problem.layer_type, columns))
        graph = problem.graph
        self.steps = {(step.layer, step.operator): step for step in (*graph.steps, *graph.inference)}
        self.tensors = {tensor.name: tensor for tensor in problem.profile.tensors}
        self.sizes: dict[str, int] = {}
        self.raw: dict[str, int] = {}
        for name, storage in problem.graph.storages.items():
            self.sizes[name] = aligned(storage.bytes)
            self.raw[name] = storage.bytes
            if storage.kind == "weight" and name in self.tensors:
                self.sizes[f"packed:{name}"] = aligned(self.tensors[name].packed_bytes, PACKED_ALIGNMENT)
            if storage.kind == "trainable":
                for role, state in zip(STATES, state_names(name, STATES), strict=True):
                    tensor = self.tensors.get(name)
                    self.raw[state] = storage.bytes if tensor is None else state_bytes(role, tensor)
                    self.sizes[state] = aligned(self.raw[state])

    def join(self, passages: Passages, perturbed: tuple[str, ...]) -> Draft:
        count = len(self.columns)
        forward = [entry for layer in range(count) for entry in self._forward_window(layer)]
        if perturbed:
            train = self._mezo_step([*forward, *self._free_outcome()], perturbed)
        else:
            marked = [(entry, -1) for entry in forward]
            for layer in reversed(range(count)):
                marked += self._second_pass(layer)
                window = [*self._entries(layer, self.scripts[layer].backward), *self._passed(layer, passages)]
                marked += [(entry, -1) for entry in window]
            train = [*self.passes.with_frees_placed(marked), *self._free_outcome()]
        evaluate = [
            *(entry for layer in range(count) for entry in self._entries(layer, self.scripts[layer].evaluate)),
            *self._free_outcome(),
        ]
        update = [
            entry for layer in reversed(range(count)) for entry in self._entries(layer, self.scripts[layer].update)
        ]
        resident = list(self.problem.always)
        for layer, (kind, column) in enumerate(zip(self.problem.layer_type, self.columns)):
            held = resident_between_steps(self.problem.types[kind], column.decision)
            resident.extend(self._global(layer, name) for name in sorted(held))
        names = {name for entry in [*train, *evaluate, *update] for name in made_by(entry)} | set(resident)
        return Draft(
            train=tuple(train),
            evaluate=tuple(evaluate),
            update=tuple(update),
            resident=tuple(dict.fromkeys(resident)),
            sizes={name: self.sizes[name] for name in sorted(names)},
            scripts=self.scripts,
            remade=self.passes.remade(train) if self.passes.layers else frozenset(),
        )

    def _forward_window(self, layer: int) -> Iterable[DraftInstruction]:
        """The layer's forward window; in a segment, its first pass."""
        script = self.scripts[layer]
        return self._entries(layer, self.passes.first(layer, script) if layer in self.passes.layers else script.forward)

    def _second_pass(self, layer: int) -> Iterable[tuple[DraftInstruction, int]]:
        """The second pass of the segment that ends with this layer, each entry with the layer it belongs to; empty for
        other layers.
        """
        first, last = self.passes.ends.get(layer, (0, -1))
        for inner in range(first, last + 1):
            yield from (
                (entry, inner) for entry in self._entries(inner, self.passes.second(inner, self.scripts[inner]))
            )

    def _mezo_step(self, forward: list[DraftInstruction], trainables: tuple[str, ...]) -> list[DraftInstruction]:
        """The step of MeZO: a forward with the trainables shifted by +epsilon, one by -epsilon (a shift of -2), and the
        updates, which undo the shift and move the trainables.
        """
        entries = []
        for shift in (1, -2):
            entries += [replace(self._entry("perturb", name, -1), operator=shift) for name in trainables]
            entries += forward
        return [*entries, *(self._entry("update", name, -1) for name in trainables)]

    def _passed(self, layer: int, passages: Passages) -> Iterable[DraftInstruction]:
        """For a skipped layer: the instruction that takes the gradient of its output for that of its input."""
        passage = passages.get(self.problem.graph.layers[layer])
        if passage is not None:
            yield replace(self._entry("pass", passage[0], layer), outputs=passage)

    def _free_outcome(self) -> Iterable[DraftInstruction]:
        profile = self.problem.profile
        for name in (profile.token_losses, profile.loss):
            if name is not None:
                yield self._entry("free", name, -1)

    def _global(self, layer: int, name: str) -> str:
        """``packed:in2`` -> ``packed:model.layers.0...``; a trainable that the layer does not bind
        is global already.
        """
        for prefix in ("packed:", *STATE_PREFIXES):
            if name.startswith(prefix):
                return prefix + self.problem.name(layer, name[len(prefix) :])
        return self.problem.name(layer, name)

    def _entries(self, layer: int, script: Iterable[Action]) -> Iterable[DraftInstruction]:
        for verb, name in script:
            if verb == "run":
                step = self.steps[layer, int(name)]
                yield DraftInstruction(
                    verb=verb,
                    name="",
                    layer=layer,
                    operator=step.operator,
                    outputs=step.outputs,
                    seconds=step.seconds,
                    transfer=0.0,
                )
            else:
                yield self._entry(verb, self._global(layer, name), layer)

    def _entry(self, verb: Verb, name: str, layer: int) -> DraftInstruction:
        seconds = transfer = 0.0
        device = self.problem.profile.device
        if verb == "read":
            size = self.tensors[name].packed_bytes
            seconds, transfer = compute_seconds(device.read, size), transfer_seconds(device.read, size)
        elif verb in {"spill", "fetch"}:
            channel = device.write if verb == "spill" else device.read
            size = self.raw[name]
            seconds, transfer = compute_seconds(channel, size), transfer_seconds(channel, size)
        elif verb == "unpack":
            seconds = self.tensors[name].unpack_seconds
        elif verb == "accumulate":
            seconds = accumulate_seconds(self.tensors[name], self.problem.profile.optimizer)
        elif verb == "update" and self.problem.profile.max_grad_norm is not None:
            seconds = clipped_seconds(self.tensors[name], self.problem.profile.optimizer)
        elif verb in {"update", "perturb"}:
            seconds = self.tensors[name].update_seconds
        return DraftInstruction(
            verb=verb, name=name, layer=layer, operator=-1, outputs=(), seconds=seconds, transfer=transfer
        )


def instructions(
    problem: LayeredStep,
    entries: Iterable[DraftInstruction],
    resident: Mapping[str, int],
    offsets: Mapping[tuple[int, str], int],
) -> list[Instruction]:
    """The plan's instruction list. `resident`: tensor resident across steps -> arena offset; `offsets`: (index of the
    entry, tensor that it makes) -> arena offset.
    """
    offset_of = dict(resident)
    passed: dict[str, str] = {}
    """gradients that skipped layers have passed on: name when made -> current name"""
    result: list[Instruction] = []
    for index, entry in enumerate(entries):
        for name in made_by(entry):
            # A tensor of no bytes has no offset (0 will do); one that is resident already is written again at its old
            # offset.
            offset_of[name] = offsets.get((index, name), offset_of.get(name, 0))
        if entry.verb == "run":
            output_offsets = tuple(None if name is None else offset_of[name] for name in entry.outputs)
            result.append(Run(problem.graph.layers[entry.layer], entry.operator, output_offsets))
        elif entry.verb == "read":
            result.append(Read(entry.name, offset_of[f"packed:{entry.name}"]))
        elif entry.verb == "unpack":
            result.append(Unpack(entry.name, offset_of[entry.name]))
        elif entry.verb == "fetch":
            result.append(Fetch(entry.name, offset_of[entry.name]))
        elif entry.verb == "accumulate":
            result.append(Accumulate(entry.name, offset_of[f"{SUM}{entry.name}"]))
        elif entry.verb == "perturb":
            result.append(Perturb(entry.name, entry.operator))
        elif entry.verb == "pass":
            before, after = map(str, entry.outputs)
            passed[
                next((first_name for first_name, current_name in passed.items() if current_name == before), before)
            ] = after
            result.append(Pass(before, after))
        else:
            result.append(NAMED[entry.verb](passed.get(entry.name, entry.name)))
        if entry.verb == "free":
            del offset_of[entry.name]
    return result


def live_profile(entries: tuple[DraftInstruction, ...], resident: Iterable[str], sizes: Mapping[str, int]) -> list[int]:
    """Bytes resident during each entry: with the tensors that it makes and those that it frees."""
    live_names = set(resident)
    live = sum(sizes[name] for name in live_names)
    result = []
    for entry in entries:
        for name in made_by(entry):
            if name not in live_names:
                live_names.add(name)
                live += sizes[name]
        result.append(live)
        if entry.verb == "free":
            live_names.remove(entry.name)
            live -= sizes[entry.name]
    return result


def tensor_decisions(problem: LayeredStep, draft_: Draft, columns: tuple[Column, ...]) -> dict[str, str]:
    """What the columns decide for each tensor: kept, recomputed or offloaded (activations, optimizer states); streamed,
    packed or unpacked (weights).
    """
    result: dict[str, str] = {}
    graph = problem.graph
    for layer, (kind, column) in enumerate(zip(problem.layer_type, columns)):
        layer_type, script = problem.types[kind], draft_.scripts[layer]
        for value in layer_type.candidates:
            name = problem.name(layer, value)
            if value in script.kept:
                result[name] = "kept"
            elif value in script.offloaded:
                result[name] = "offloaded"
            elif value in layer_type.producer and layer_type.producer[value].index in script.recomputed:
                result[name] = "recomputed"
        for value, mode in column.decision.weights:
            name = problem.name(layer, value)
            gaps = {mode.backward_gap, mode.step_gap}
            if layer_type.weights[value].trained:
                result[name] = "offloaded" if "disk" in gaps else "kept"
                continue
            result[name] = "unpacked" if gaps == {"unpacked"} else "packed" if "disk" not in gaps else "streamed"
        for update in layer_type.updates:
            if update.states:
                name = problem.name(layer, update.trainable)
                decision = "offloaded" if update.trainable in column.decision.states else "kept"
                result.update(dict.fromkeys(state_names(name, update.roles), decision))
    for name in problem.forced:
        result[name] = "kept"
    result.update(dict.fromkeys(draft_.remade, "recomputed"))
    for name, storage in graph.storages.items():
        if storage.kind in ALWAYS and name not in problem.moving:
            result[name] = "kept"
    return dict(sorted(result.items()))
