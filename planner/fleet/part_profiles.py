"""Profiles of what one member of a fleet computes, of which ordinary plans are made.

- **The whole model**, for one of several members: a plan covers one micro-batch, its optimizer is `EXCHANGE`, which has
  no states, and an update hands a gradient over to the shelf (`member_profile`).
- **A stage**, a run of neighbouring layers (`stage_profile`): before its layers stands a layer `RECEIVE_LAYER`, whose
  forward receives what the layers below hand up and whose backward sends the gradients down, and behind them a layer
  `SEND_LAYER`, whose forward sends and whose backward receives. What layers below the cut make of constants and
  positions alone (angles of rotary embeddings, masks) does not pass: the stage makes it again.
- **The parts of mobillm** (arXiv 2502.20421): the device's is `tightfit.planner.problem.device_forward`'s. The server's
  is that of the side network as `tightfit.profiles.api.profile` measures it, whose activations are part of the batch
  there; here they are received, each just before the adapter that reads it. The labels, which a message begins with,
  become the server's batch (`tightfit.runtime.engine.training.batches.ReceivedBatches`): it needs no data, and never
  sees the tokens.

Sending and receiving are operators (`tightfit.send`, `tightfit.receive`), so that tensors that pass over a cut are
kept, spilled and freed like all others. They take no time here but that of a copy; the fleet's clock says how long a
part waits. Memory that messages and shelves take is part of the plan's floor, so that the plan's peak is the member's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tightfit.planner.fleet.clock import copy_seconds
from tightfit.planner.fleet.members import trained_tensors
from tightfit.planner.fleet.parts import RINGS, message_bytes, messages_bytes
from tightfit.planner.fleet.schema import BUFFERS, PIECE_BYTES, Shelf
from tightfit.planner.problem.device_forward import BYTES_PER_SECOND, CALL_SECONDS, DEFAULT_BITS, LABELS
from tightfit.planner.problem.messages import Direction, message_operator
from tightfit.planner.problem.step_graph import StepGraph, step_graph
from tightfit.planner.schema import Plan
from tightfit.profiles.devices.estimate import SUM_PASSES, UPDATE_PASSES
from tightfit.profiles.models.side_shape import CONFIG_KEY, INPUT, SideShape
from tightfit.profiles.schema import (
    EXCHANGE,
    POSITIONS,
    DeviceFigures,
    Floor,
    Layer,
    Operator,
    Profile,
    Program,
    Tensor,
    Value,
    adamw,
)
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.fleet.message import ITEM_BYTES, Passing, paged
from tightfit.runtime.engine.training.job import RECEIVE, SEND

FILE_BYTES = 64 << 10
"""a shelf on disk copies what is not whole pages through a buffer of this size; set aside for either kind, so that a
shelf on disk is never the larger one"""
HAND_OVER_SECONDS = 20e-6
"""to hand one gradient over, beside its bytes: a call of a copying kernel and the bookkeeping around it"""
CLOSING_PASSES = 3
"""passes over memory with which an update of several steps begins and ends: it divides the sum and makes it zero"""
RECEIVE_LAYER, SEND_LAYER = "received", "sent"
"""names of the layers at the ends of a stage"""
LOSS = "sent/loss"
"""scalar that stands for the loss where the stage does not compute it; its value means nothing"""
RECEIVED = "received"
"""the layers that receive are called ``received.1`` and so on, by the place in the message"""


# --- the whole model --------------------------------------------------------------------------------------------------


def exchange_optimizer(micro_batches: int) -> dict[str, Any]:
    """The `optimizer` field of a member's plan."""
    return {"name": EXCHANGE, "state_tensors": 0, "accumulate": micro_batches}


def hand_over_seconds(size: int, device: DeviceFigures, gradients: Shelf) -> float:
    """Seconds of the cores that handing a gradient of `size` bytes over to the shelf takes."""
    written = size * device.write.compute_seconds_per_byte if gradients == "disk" else 0.0
    return HAND_OVER_SECONDS + copy_seconds(size) + written


def member_profile(profile: Profile, micro_batches: int, extra_bytes: int, gradients: Shelf) -> Profile:
    """The profile of a micro-batch on a member whose exchange takes `extra_bytes` of memory."""
    tensors = [
        tensor.model_copy(
            # The update comes after the last micro-batch, from values that are in memory.
            update={"update_seconds": hand_over_seconds(tensor.bytes, profile.device, gradients), "movable": False}
        )
        if tensor.kind == "trainable"
        else tensor
        for tensor in profile.tensors
    ]
    return profile.model_copy(
        update={
            "optimizer": exchange_optimizer(micro_batches),
            "tensors": tensors,
            "device": raised(profile.device, extra_bytes),
        }
    )


def alone_profile(profile: Profile, micro_batches: int) -> Profile:
    """The profile of a member that takes part alone: an ordinary one, which accumulates all micro-batches."""
    scale = _passes(micro_batches) / _passes(profile.accumulate)
    tensors = [
        tensor.model_copy(update={"update_seconds": scale * tensor.update_seconds})
        if tensor.kind == "trainable"
        else tensor
        for tensor in profile.tensors
    ]
    return profile.model_copy(update={"optimizer": adamw(micro_batches), "tensors": tensors})


def update_seconds(profile: Profile) -> float:
    """Seconds of the optimizer's arithmetic for all trained tensors, once, whatever number of steps the profile is
    of.
    """
    measured = sum(tensor.update_seconds for tensor in trained_tensors(profile))
    return measured * UPDATE_PASSES / _passes(profile.accumulate)


def _passes(accumulate: int) -> float:
    """Passes over memory of an update, in the mean over the steps that make it, as devices are estimated: each of
    several steps adds to the sum of gradients, which the update divides and makes zero.
    """
    return float(UPDATE_PASSES) if accumulate == 1 else SUM_PASSES + (UPDATE_PASSES + CLOSING_PASSES) / accumulate


def raised(device: DeviceFigures, extra_bytes: int) -> DeviceFigures:
    """The device with a floor that is higher by so many bytes, from when training has started."""
    floor = device.floor
    inference = floor.inference_resident_bytes
    changes = {
        "resident_bytes": floor.resident_bytes + extra_bytes,
        "inference_resident_bytes": None if inference is None else inference + extra_bytes,
    }
    return device.model_copy(update={"floor": floor.model_copy(update=changes)})


# --- trained tensors in pieces, in which they pass --------------------------------------------------------------------


def pieces_of(source: Profile | Plan) -> tuple[int, ...]:
    """Bytes of each piece, in the order in which pieces pass: whole neighbouring tensors, `PIECE_BYTES` or less, where
    no tensor alone is larger.
    """
    result: list[int] = []
    for tensor in trained_tensors(source):
        if not result or (result[-1] and result[-1] + tensor.bytes > PIECE_BYTES):
            result.append(0)
        result[-1] += tensor.bytes
    return tuple(result)


def slots_of(micro_batches: int, *, first: bool) -> int:
    """Rows of a member's shelf of gradients: one for each micro-batch, but the first of the chain adds its own up."""
    return 1 if first else micro_batches


def exchange_bytes(floor: Floor, pieces: Sequence[int], *, slots: int, gradients: Shelf, states: Shelf) -> int:
    """Bytes that a member holds for the exchange alone, on top of what its plan's schedule needs."""
    total = paged(sum(pieces))
    held = floor.transport_bytes + BUFFERS * paged(max(pieces, default=0)) + 2 * FILE_BYTES
    held += slots * total if gradients == "memory" else 0
    return held + (2 * total if states == "memory" else 0)


def micro_batch_seconds(plan: Plan, gradients: Shelf, *, first: bool) -> float:
    """Predicted seconds of one micro-batch: those of the plan's step, or where gradients go to disk, of all that the
    disk then carries, if that is more. The first of a chain adds its gradients up there, and reads what it adds to.
    """
    if gradients == "memory" or plan.train is None:
        return plan.step_seconds
    read, write = plan.device.read.bytes_per_second, plan.device.write.bytes_per_second
    carried = plan.train.read_bytes / read + plan.train.write_bytes / write
    return max(plan.step_seconds, carried + shelf_seconds(plan, gradients, first=first))


def shelf_seconds(source: Plan | Profile, gradients: Shelf, *, first: bool) -> float:
    """Seconds of the disk that the gradients of one micro-batch take."""
    if gradients == "memory":
        return 0.0
    total = sum(tensor.bytes for tensor in trained_tensors(source))
    device = source.device
    return total / device.write.bytes_per_second + (total / device.read.bytes_per_second if first else 0.0)


# --- some of the layers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What passes between the layers before number `at` and those from it on."""

    at: int
    up: tuple[str, ...]
    """activations, by their global names, in the order in which they are sent"""
    down: tuple[str, ...]
    """gradients"""
    up_passing: tuple[Passing, ...]
    """their form, in the same order"""
    down_passing: tuple[Passing, ...]


def cuts(profile: Profile) -> list[Cut]:
    """All places where a model can be cut: both sides have something that is trained, gradients pass down,
    and messages can hold what passes.
    """
    graph = step_graph(profile)
    made = _Makers(profile, graph)
    trained = [_trained(graph, layer) for layer in range(len(profile.layers))]
    result = []
    for at in range(1, len(profile.layers)):
        if not any(trained[:at]) or not any(trained[at:]):
            continue
        cut = made.cut(at)
        if cut.up and cut.down and all(one.dtype in ITEM_BYTES for one in (*cut.up_passing, *cut.down_passing)):
            result.append(cut)
    return result


def stage_profile(
    profile: Profile, below: Cut | None, above: Cut | None, *, micro_batches: int, extra_bytes: int = 0, bits: int = 0
) -> Profile:
    """The profile of the layers between two cuts; None: from the first layer, or to the last.

    Its updates are AdamW's of `micro_batches` accumulated micro-batches. `extra_bytes`: what the process holds for its
    messages. `bits`: 8 to send activations and gradients rounded to 8 bits per row, 0 as they are.
    """
    graph = step_graph(profile)
    first, last = (below.at if below else 0), (above.at if above else len(profile.layers))
    if not 0 <= first < last <= len(profile.layers):
        raise InputError(f"layers {first} to {last} are no stage of a model of {len(profile.layers)} layers")
    maker = _Makers(profile, graph)
    programs: dict[str, Program] = {}
    layers: list[Layer] = []
    known = {program.name: program for program in profile.programs}
    if below:
        for layer, kept in maker.again(first, last):
            part = _part(known[layer.program], kept)
            programs[part.name] = part
            layers.append(layer.model_copy(update={"program": part.name, "bindings": _bound(layer, part)}))
        program, layer = _passage(maker, RECEIVE_LAYER, below, bits)
        programs[program.name] = program
        layers.append(layer)
    for layer in profile.layers[first:last]:
        programs[layer.program] = known[layer.program]
        layers.append(layer)
    if above:
        program, layer = _passage(maker, SEND_LAYER, above, bits)
        programs[program.name] = program
        layers.append(layer)
    bound = {name for layer in layers for name in layer.bindings.values()}
    bound |= {f"grad:{name}" for name in bound}
    tensors = [tensor for tensor in profile.tensors if tensor.kind == "batch" or tensor.name in bound]
    declared = {tensor.name for tensor in tensors}
    tensors += [
        maker.tensor(name) for name in sorted(bound - declared) if name in graph.storages and name not in declared
    ]
    if above:
        tensors.append(Tensor(name=LOSS, kind="activation", shape=[], dtype="float32", bytes=4))
    own = alone_profile(profile, micro_batches)
    figures = {tensor.name: tensor for tensor in own.tensors}
    changes: dict[str, Any] = {
        "tensors": [figures.get(tensor.name, tensor) for tensor in tensors],
        "programs": list(programs.values()),
        "layers": layers,
        "device": raised(profile.device, extra_bytes),
        "fingerprint": _fingerprint(profile, first, last, micro_batches, extra_bytes, bits),
    }
    if above:
        changes |= {"loss": LOSS, "token_losses": None}
    return own.model_copy(update=changes)


def _fingerprint(profile: Profile, *numbers: int) -> str:
    return hashlib.sha256(f"{profile.fingerprint} stage {numbers}".encode()).hexdigest()


def _trained(graph: StepGraph, layer: int) -> bool:
    return any(graph.storages[name].kind == "trainable" for name in graph.names[layer].values())


class _Makers:
    """What the storages of a profile's step are made of."""

    def __init__(self, profile: Profile, graph: StepGraph) -> None:
        self.profile, self.graph = profile, graph
        self.steps = {step.index: step for step in (*graph.steps, *graph.inference)}
        self.values = {
            graph.names[number][value.name]: value
            for number, layer in enumerate(profile.layers)
            for value in next(p for p in profile.programs if p.name == layer.program).values
        }
        self.by_output: dict[str, int] = {}
        for step in graph.steps:
            for name in filter(None, step.outputs):
                self.by_output.setdefault(name, step.index)
        self.constant: dict[str, bool] = {}

    def made_of_constants(self, name: str) -> bool:
        """Whether an activation follows from constants and the tokens' positions, without tokens, weights and what is
        trained.
        """
        if name not in self.constant:
            step = self.by_output.get(name)
            operator = None if step is None else self._operator(step)
            self.constant[name] = (
                self.graph.storages[name].kind == "constant" or name == POSITIONS
                if step is None
                else operator is not None
                and operator.recomputable
                and not operator.gathers
                and all(self.made_of_constants(one) for one in self.graph.steps[step].inputs)
            )
        return self.constant[name]

    def _operator(self, step: int) -> Operator:
        one = self.graph.steps[step]
        program = self.profile.layers[one.layer].program
        return next(p for p in self.profile.programs if p.name == program).operators[one.operator]

    def cut(self, at: int) -> Cut:
        below = [step for step in self.steps.values() if step.layer < at]
        beyond = [step for step in self.steps.values() if step.layer >= at]
        activations = {n for s in below if s.phase != "backward" for n in s.outputs if n is not None}
        gradients = {n for s in beyond if s.phase == "backward" for n in s.outputs if n is not None}
        read_above = {name for step in beyond for name in step.inputs}
        read_below = {name for step in below if step.phase == "backward" for name in step.inputs}
        # In the order in which they are made.
        up = tuple(
            name
            for name in self.by_output
            if name in activations and name in read_above and not self.made_of_constants(name)
        )
        # What the forward above the cut makes for the backward below it does not exist in the models that are traced.
        down = tuple(name for name in self.by_output if name in gradients and name in read_below)
        return Cut(
            at=at,
            up=up,
            down=down,
            up_passing=tuple(map(self.passing, up)),
            down_passing=tuple(map(self.passing, down)),
        )

    def passing(self, name: str) -> Passing:
        value = self.values[name]
        return Passing(shape=tuple(value.shape), dtype=value.dtype)

    def again(self, first: int, last: int) -> list[tuple[Layer, list[int]]]:
        """The layers before `first` with those of their operators that make, of constants, what layers from there to
        `last` read.
        """
        wanted = [
            name
            for step in self.steps.values()
            if first <= step.layer < last
            for name in step.inputs
            if name in self.by_output and self.graph.steps[self.by_output[name]].layer < first
            if self.made_of_constants(name)
        ]
        kept: set[int] = set()
        while wanted:
            step = self.by_output.get(wanted.pop())
            if step is not None and step not in kept:
                kept.add(step)
                wanted.extend(self.graph.steps[step].inputs)
        by_layer: dict[int, list[int]] = {}
        for step in sorted(kept):
            by_layer.setdefault(self.graph.steps[step].layer, []).append(self.graph.steps[step].operator)
        return [(self.profile.layers[layer], operators) for layer, operators in sorted(by_layer.items())]

    def tensor(self, name: str) -> Tensor:
        """A value that a layer keeps to itself as one that several layers use."""
        declared = next((tensor for tensor in self.profile.tensors if tensor.name == name), None)
        if declared is not None:
            return declared
        value = self.values[name]
        return Tensor(name=name, kind=value.kind, shape=value.shape, dtype=value.dtype, bytes=value.bytes)

    def value(self, name: str, local: str) -> Value:
        return self.values[name].model_copy(update={"name": local})


def _part(program: Program, kept: Sequence[int]) -> Program:
    """The program with some of its operators, which run in the forward and for inference."""
    operators = [program.operators[position] for position in kept]
    used = {name for one in operators for name in (*one.inputs, *filter(None, one.outputs))}
    return Program(
        name=f"{program.name}, constants",
        values=[value for value in program.values if value.name in used],
        operators=operators,
    )


def _bound(layer: Layer, part: Program) -> dict[str, str]:
    names = {value.name for value in part.values}
    return {value: name for value, name in layer.bindings.items() if value in names}


def _passage(maker: _Makers, name: str, cut: Cut, bits: int) -> tuple[Program, Layer]:
    """The layer at one side of a cut: of `RECEIVE_LAYER` or `SEND_LAYER`."""
    ahead, behind = (RECEIVE, SEND) if name == RECEIVE_LAYER else (SEND, RECEIVE)
    values: list[Value] = []
    operators: list[Operator] = []
    bindings: dict[str, str] = {}
    if name == SEND_LAYER:
        values.append(Value(name="loss", shape=[], stride=[], dtype="float32", bytes=4, kind="activation"))
        bindings["loss"] = LOSS
    phases: tuple[tuple[Literal["forward", "backward"], str, Direction, Iterable[str]], ...] = (
        ("forward", ahead, "up", cut.up),
        ("backward", behind, "down", cut.down),
    )
    for phase, target, direction, passing in phases:
        for number, passed in enumerate(passing):
            value = maker.value(passed, f"{direction}{number}")
            values.append(value)
            bindings[value.name] = passed
            seconds = hand_over_seconds(value.bytes, maker.profile.device, "memory")
            operators.append(message_operator(target, value, number, bits, seconds, phase=phase, direction=direction))
    if name == SEND_LAYER:
        last = max(place for place, one in enumerate(operators) if one.phase == "forward")
        operators[last] = operators[last].model_copy(update={"outputs": ["loss"]})
    return Program(name=f"{name} {cut.at}", values=values, operators=operators), Layer(
        name=name, program=f"{name} {cut.at}", bindings=bindings
    )


# --- a device's forward, and the server's side network ----------------------------------------------------------------


def side_shape(profile: Profile) -> SideShape:
    """The side network that a profile is of. Raises InputError for a profile of something else."""
    said = profile.model.config.get(CONFIG_KEY)
    if said is None:
        raise InputError(
            f"the server's profile is of {profile.model.name} itself; profile the side network: `tightfit profile MODEL"
            " --side-rank 64`"
        )
    return SideShape(blocks=tuple(said["blocks"]), rank=said["rank"])


def server_profile(profile: Profile, *, micro_batches: int, bits: int = DEFAULT_BITS) -> Profile:
    """The server's profile, of its measured `profile` of the side network; its updates are AdamW's of `micro_batches`
    accumulated micro-batches, and its floor has room for the connections and the messages.

    Raises InputError for a profile of something else than a side network.
    """
    side = side_shape(profile)
    own = alone_profile(profile, micro_batches)
    received = {f"{INPUT}.{number}": number + 1 for number in range(len(side.blocks))}
    """activation -> its place in the message, after the labels"""
    tensors = {tensor.name: tensor for tensor in own.tensors}
    layers: list[Layer] = []
    programs: dict[str, Program] = {}
    values = {
        layer.bindings[value.name]: value
        for layer in own.layers
        for value in next(program for program in own.programs if program.name == layer.program).values
        if value.name in layer.bindings
    }
    inputs = {
        (layer.program, value) for layer in own.layers for value, name in layer.bindings.items() if name in received
    }
    there: set[str] = set()
    for layer in own.layers:
        for name in layer.bindings.values():
            if name in received and name not in there:
                there.add(name)
                program, receiver = _receiver(values[name], name, received[name], bits)
                programs[program.name] = program
                layers.append(receiver)
        layers.append(layer)
    for program in own.programs:
        made = [
            value.model_copy(update={"kind": "activation"}) if (program.name, value.name) in inputs else value
            for value in program.values
        ]
        programs[program.name] = program.model_copy(update={"values": made})
    text = f"{profile.fingerprint} server {micro_batches} {bits}"
    labels = tensors[LABELS]
    changed = [
        tensor.model_copy(update={"kind": "activation"}) if tensor.name in received else tensor
        for tensor in own.tensors
    ]
    batch = [labels.model_copy(update={"name": "input_ids"}), labels]  # as all batches are; the first is never filled
    passing = received_tensors(own)
    extra = messages_bytes(profile.device.floor, from_below=message_bytes(passing, bits), buffers=RINGS)
    return own.model_copy(
        update={
            "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
            "tensors": [*batch, *(tensor for tensor in changed if tensor.name != LABELS)],
            "programs": list(programs.values()),
            "layers": layers,
            "device": raised(profile.device, extra),
        }
    )


def received_tensors(profile: Profile) -> tuple[Passing, ...]:
    """What a side network takes of a micro-batch, in the order of the message: labels, then activations."""
    tensors = {tensor.name: tensor for tensor in profile.tensors}

    def passing(tensor: Tensor) -> Passing:
        return Passing(shape=tuple(tensor.shape), dtype=tensor.dtype)

    activations = (f"{INPUT}.{number}" for number in range(len(side_shape(profile).blocks)))
    return tuple(passing(tensors[name]) for name in (LABELS, *activations))


def _receiver(value: Value, name: str, number: int, bits: int) -> tuple[Program, Layer]:
    """The layer that takes tensor `number` out of the message."""
    made = value.model_copy(update={"name": "output", "kind": "activation"})
    operator = message_operator(RECEIVE, made, number, bits, CALL_SECONDS + made.bytes / BYTES_PER_SECOND)
    program = Program(name=f"{RECEIVED} {number}", values=[made], operators=[operator])
    return program, Layer(name=f"{RECEIVED}.{number}", program=program.name, bindings={"output": name})
