"""Steps without a complete backward: two forwards only (MeZO), or a backward through a subset of layers (LCSB).

Each such step is described by a profile of its own that holds only what is left of the full step, so that all of the
planner works on it unchanged. A trainable that the step does not train is at rest: its value and its optimizer states
are constants of that profile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tightfit.planner.problem.optimizers import refuse_other_optimizers
from tightfit.planner.problem.step_graph import STATE_PREFIXES, state_bytes, state_names, state_roles
from tightfit.planner.schema import MEZO, Plan
from tightfit.profiles.schema import Layer, Operator, Profile, Program, Tensor
from tightfit.profiles.tracing.inference import inference_only
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.engine.kernels.optimizer import state_shape
from tightfit.runtime.engine.training.job import kept_buffers

POSITIONS = 4
"""number of runs of neighbouring layers that LCSB's cycle trains in turn"""
ADDENDS = {"aten.addmm": 0, "tightfit.projection_backward": 4, "tightfit.dropout_projection_backward": 6}
"""operators that add a product to one of their arguments -> position of that argument"""
Passages = dict[str, tuple[str, str]]
"""layer -> (gradient of its output, gradient of its input), of equal shape"""


@dataclass(frozen=True, kw_only=True)
class PartialStep:
    """One step of a cycle, or the only one."""

    profile: Profile
    """profile of what is left of the step; layers keep their names and, where there are `skipped` ones, operators their
    positions
    """
    skipped: tuple[str, ...] = ()
    """layers whose backward is left out"""
    passages: Passages = field(default_factory=dict)
    """passages of the skipped layers that have a trained layer below them, which needs the gradient"""
    perturbed: tuple[str, ...] = ()
    """trainables that MeZO's step perturbs; empty for other steps"""


def two_forwards(profile: Profile) -> PartialStep:
    """MeZO's step (Malladi et al. 2023, algorithm 1): forwards only; every trainable is a constant to both of them.

    There are no gradients and no optimizer states: an activation lives until its last use in the forward, layers run
    their operators for inference, and the process never loads the kernels of a backward. Raises InputError where
    nothing is trained, or where gradients are accumulated over several steps.
    """
    refuse_accumulation(profile, MEZO)
    refuse_statistics(profile, MEZO)
    refuse_other_optimizers(profile.optimizer, MEZO, "moves along a random direction, by an update of its own")
    optimizer = {"name": MEZO, "state_tensors": 0}
    perturbed = tuple(tensor.name for tensor in profile.tensors if tensor.kind == "trainable")
    if not perturbed:
        raise InputError(f"mezo moves trained tensors and {profile.model.name} has none; choose another policy")
    tensors = [t.model_copy(update={"update_seconds": update_seconds(t, optimizer)}) for t in profile.tensors]
    device = profile.device.model_copy(update={"floor": profile.device.floor.inference})
    stateless = profile.model_copy(update={"optimizer": optimizer, "tensors": tensors, "device": device})
    all_layers = {layer.name for layer in profile.layers}
    return PartialStep(profile=_without_backward(stateless, all_layers, inference_only), perturbed=perturbed)


def without_resting_states(profile: Profile) -> Profile:
    """The profile of a partial step without the optimizer states of layers at rest, which some schedule could leave on
    disk: for bounds on any schedule.
    """
    free = [t for t in profile.tensors if t.kind != "constant" or not t.name.startswith(STATE_PREFIXES)]
    return profile.model_copy(update={"tensors": free})


def update_seconds(tensor: Tensor, optimizer: Mapping[str, Any]) -> float:
    """Seconds of one update of a trainable; with MeZO also those of one perturbation, which takes as long, as both draw
    the same noise.

    Where drawing noise was not measured, the seconds are those of an update by the profile's own optimizer.
    """
    return (optimizer.get("name") == MEZO and tensor.perturb_seconds) or tensor.update_seconds


def lcsb_cycle(profile: Profile, positions: int = POSITIONS) -> tuple[PartialStep, ...]:
    """LCSB's steps (arXiv 2602.13073), one for each of `positions` runs of neighbouring trained blocks, lowest run
    first.

    A step has a backward through the blocks of its run only. Past the blocks above, the gradient is handed down through
    their residual connections; blocks below need none. (The lowest block of a run still computes a gradient of its
    input, which nothing reads.) A block at rest is not updated, as torch.optim leaves parameters without a gradient
    alone; the paper relies on momentum to move it on.

    Raises InputError for a model with a trained layer that has no residual to pass a gradient through, or with fewer
    than two trained layers that take a gradient from above, and where gradients are accumulated over several steps.
    """
    refuse_accumulation(profile, "lcsb")
    refuse_tables(profile, "lcsb")
    refuse_statistics(profile, "lcsb")
    passages, blocks = equal_passages(profile), trained_blocks(profile)
    bound = {layer.name: (program, layer.bindings) for layer, program in _bound_programs(profile)}
    if len(blocks) < 2:
        raise InputError(
            f"lcsb leaves out the backward of some of several trained layers, {profile.model.name} has {len(blocks)}"
            f" that {'takes' if len(blocks) == 1 else 'take'} a gradient from above; choose another policy"
        )
    for name in blocks:
        if name not in passages:
            raise InputError(
                f"lcsb passes gradients through the residual around a layer, and layer {name} has none: what comes from"
                " above is not one gradient of the shape that it hands down; choose another policy"
            )
        if passages[name][1] and not _has_residual(*bound[name], *passages[name]):
            raise InputError(
                f"lcsb passes gradients through the residual around a layer, and layer {name} has none: no sum takes"
                " the gradient of its output over into that of its input; choose another policy"
            )
    count = min(positions, len(blocks))
    cuts = [position * len(blocks) // count for position in range(count + 1)]
    return tuple(_leave_out(profile, set(blocks) - set(blocks[low:high])) for low, high in itertools.pairwise(cuts))


def refuse_accumulation(profile: Profile, policy: str) -> None:
    """Raises InputError where `profile` accumulates the gradients of several steps for one update."""
    if profile.accumulate > 1:
        raise InputError(
            f"{policy} moves trained tensors after every step, and this profile sums the gradients of"
            f" {profile.accumulate}; profile without {spelled('accumulate')}, or choose another policy"
        )


def refuse_tables(profile: Profile, trainer: str) -> None:
    """Raises InputError where `profile` trains modules in full, which `trainer` cannot."""
    if profile.model.tables:
        raise InputError(
            f"{trainer} trains LoRA pairs alone, and this profile trains {' and '.join(profile.model.tables)} in full"
            f" as well; profile without {spelled('modules_to_save')}, or choose another way to train"
        )


def refuse_preference(profile: Profile, trainer: str) -> None:
    """Raises InputError where `profile` learns from pairs of answers, which `trainer` cannot."""
    if preference := profile.model.preference:
        raise InputError(
            f"{trainer} predicts tokens, and this profile learns from pairs of answers ({preference.loss}); profile"
            f" without {spelled('loss')}"
        )


def refuse_statistics(profile: Profile, trainer: str) -> None:
    """Raises InputError where a step of `profile` changes running statistics, which `trainer` cannot."""
    if kept := kept_buffers(profile.layers, profile.programs):
        raise InputError(
            f"{trainer} does not keep running statistics, and {profile.model.name} has some"
            f" ({kept[0]}{', ...' if len(kept) > 1 else ''}); use GroupNorm or LayerNorm in the model, or choose"
            " another way to train"
        )


def trained_blocks(source: Profile | Plan) -> list[str]:
    """Layers with trainables that take a gradient from the layer above, in forward order: those that LCSB's cycle
    trains in turn.
    """
    trained = {tensor.name for tensor in source.tensors if tensor.kind == "trainable"}
    from_above, _ = _gradients(source)
    return [layer.name for layer in source.layers if from_above[layer.name] and trained & set(layer.bindings.values())]


def equal_passages(source: Profile | Plan) -> Passages:
    """Layers that take exactly one gradient from above and hand at most one down, of equal shape and type, each with
    the two gradients.

    Where a layer hands none down, because nothing below it is trained, the second name is empty.
    """
    facts = _bound_gradients(source)
    from_above, handed_down = _gradients(source)
    result: Passages = {}
    for layer in source.layers:
        above, below = from_above[layer.name], handed_down[layer.name]
        if len(above) != 1 or len(below) > 1:
            continue
        if not below:
            result[layer.name] = (above[0], "")
        elif facts[above[0]] == facts[below[0]]:
            result[layer.name] = (above[0], below[0])
    return result


def _has_residual(program: Program, bindings: Mapping[str, str], above: str, below: str) -> bool:
    """Whether the layer has a residual connection: for y = x + f(x) the gradient of x (`below`) is that of y (`above`)
    plus other terms, so sums and copies alone lead from one to the other.
    """
    reached = {value for value, name in bindings.items() if name == above}
    for operator in program.operators:
        if operator.phase == "backward" and reached & _carried_over(operator):
            reached.update(filter(None, operator.outputs))
    return below in {bindings.get(value) for value in reached}


def _carried_over(operator: Operator) -> set[str]:
    """Inputs that the operator's result is a copy of, or a sum with."""
    for prefix, position in ADDENDS.items():
        if operator.target.startswith(prefix):
            addend = operator.args[position]
            return {addend["operand"]["value"]} if isinstance(addend, dict) and "operand" in addend else set()
    copies = operator.target.startswith(("aten.add.", "aten._to_copy.", "aten.clone."))
    return set(operator.inputs) if copies else set()


def _bound_programs(source: Profile | Plan) -> list[tuple[Layer, Program]]:
    programs = {program.name: program for program in source.programs}
    return [(layer, programs[layer.program]) for layer in source.layers]


def _gradients(source: Profile | Plan) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Per layer: the gradients that it reads and another layer makes; and those that it makes and
    another layer reads.
    """
    makers: dict[str, set[str]] = {}
    readers: dict[str, set[str]] = {}
    for layer, program in _bound_programs(source):
        for operator in program.operators:
            if operator.phase != "backward":
                continue
            for value in operator.inputs:
                readers.setdefault(layer.bindings.get(value, ""), set()).add(layer.name)
            for output in operator.outputs:
                makers.setdefault(layer.bindings.get(output or "", ""), set()).add(layer.name)
    shared = _bound_gradients(source)

    def through(layer: Layer, here: dict[str, set[str]], elsewhere: dict[str, set[str]]) -> list[str]:
        return [
            name
            for name in dict.fromkeys(layer.bindings.values())
            if name in shared and layer.name in here.get(name, ()) and elsewhere.get(name, set()) - {layer.name}
        ]

    return (
        {layer.name: through(layer, readers, makers) for layer in source.layers},
        {layer.name: through(layer, makers, readers) for layer in source.layers},
    )


def _bound_gradients(source: Profile | Plan) -> dict[str, tuple[list[int], str, int]]:
    """Gradients that cross layers: name -> (shape, type, bytes)."""
    return {
        layer.bindings[value.name]: (value.shape, value.dtype, value.bytes)
        for layer, program in _bound_programs(source)
        for value in program.values
        if value.kind == "gradient" and value.name in layer.bindings
    }


def _leave_out(profile: Profile, skipped: set[str]) -> PartialStep:
    """The step without the backward of the layers in `skipped` and of all layers below the lowest that still trains
    something.
    """
    passages = equal_passages(profile)
    trained = {t.name for t in profile.tensors if t.kind == "trainable"}
    training = [layer.name not in skipped and bool(trained & set(layer.bindings.values())) for layer in profile.layers]
    lowest = training.index(True)
    idle = {layer.name for layer in profile.layers[:lowest]} | skipped
    above_lowest = [layer.name for layer in profile.layers[lowest + 1 :] if layer.name in skipped]
    passed = {name: passages[name] for name in above_lowest if passages[name][1]}
    # A gradient that is passed on stays in place: to the planner it is one tensor, under the name of the gradient first
    # made.
    first_name: dict[str, str] = {}
    for above, below in (passed[layer.name] for layer in reversed(profile.layers) if layer.name in passed):
        first_name[below] = first_name.get(above, above)
    partial = _without_backward(profile, idle, _forward)
    layers = [
        layer.model_copy(update={"bindings": {v: first_name.get(name, name) for v, name in layer.bindings.items()}})
        for layer in partial.layers
    ]
    cut = {before.name for before, after in zip(profile.layers, partial.layers) if before.program != after.program}
    return PartialStep(
        profile=partial.model_copy(update={"layers": layers}),
        skipped=tuple(layer.name for layer in profile.layers if layer.name in cut),
        passages=passed,
    )


def _without_backward(profile: Profile, layers: Collection[str], forward: Callable[[Program], Program]) -> Profile:
    """The profile with the backward operators of `layers` removed, and with the trainables that only they use at rest.

    `forward` makes the layers' new programs of their old ones. Raises InputError as `resting`.
    """
    idle = {layer.program for layer in profile.layers if layer.name in layers}
    programs = {program.name: program for program in profile.programs}
    forwards = {name: cut for name in idle if (cut := forward(programs[name])).operators != programs[name].operators}
    bound: list[Layer] = []
    for layer in profile.layers:
        program = programs[layer.program]
        if layer.name in layers:
            program = forwards.get(layer.program, program)
        values = {value.name for value in program.values}
        bindings = {value: name for value, name in layer.bindings.items() if value in values}
        bound.append(layer.model_copy(update={"program": program.name, "bindings": bindings}))
    at_rest = resting(profile, layers)
    states = state_roles(profile.optimizer)
    tensors: list[Tensor] = []
    for tensor in profile.tensors:
        if tensor.name not in at_rest:
            tensors.append(tensor)
            continue
        constant = tensor.model_copy(update={"kind": "constant"})
        tensors += [constant, *(_resting_state(constant, role) for role in states)]
    used_names = {layer.program for layer in bound}
    candidates = [*profile.programs, *(forwards[p.name] for p in profile.programs if p.name in forwards)]
    used = [program for program in candidates if program.name in used_names]
    return profile.model_copy(update={"layers": bound, "tensors": tensors, "programs": used})


def _resting_state(constant: Tensor, role: str) -> Tensor:
    """An optimizer state of a trainable that is at rest, which is a constant as that is."""
    size, shape = state_bytes(role, constant), list(state_shape(role, constant.shape))
    (name,) = state_names(constant.name, [role])
    return constant.model_copy(update={"name": name, "shape": shape, "bytes": size})


def _forward(program: Program) -> Program:
    """The program without its backward operators; the forward's keep their positions."""
    operators = [operator for operator in program.operators if operator.phase != "backward"]
    used = {name for operator in operators for name in [*operator.inputs, *operator.outputs]}
    values = [value for value in program.values if value.name in used]
    return Program(name=f"{program.name} forward", values=values, operators=operators)


def resting(profile: Profile, layers: Collection[str]) -> set[str]:
    """Trainables that layers of `layers` alone use. Raises InputError for one that others use as well."""
    users: dict[str, list[str]] = {tensor.name: [] for tensor in profile.tensors if tensor.kind == "trainable"}
    for layer in profile.layers:
        for name in set(layer.bindings.values()):
            if name in users:
                users[name].append(layer.name)
    for name, layer_names in users.items():
        outside = [layer for layer in layer_names if layer not in layers]
        if outside and len(outside) < len(layer_names):
            raise InputError(
                f"{name} is trained by {_listed(layer_names)} together, and the backward of some of them cannot be left"
                " out alone; choose another policy"
            )
    return {name for name, layer_names in users.items() if not set(layer_names) - set(layers)}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:3])
