"""Steps that do without the whole backward: two forwards (MeZO), or a backward through a subset of layers (LCSB).

Each is the profile of what is left of the step, so that everything the planner knows of a step holds for it as well. What
such a step does not train rests: its values, and its optimizer states, are constants of the step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tightfit.planner.problem.step_graph import STATE_PREFIXES, state_count, state_names
from tightfit.planner.schema import MEZO, Plan
from tightfit.profiles.schema import Layer, Operator, Profile, Program, Tensor
from tightfit.profiles.tracing.inference import inference_only
from tightfit.runtime.common.errors import InputError

POSITIONS = 4
"""blocks of layers that LCSB's cycle goes through"""
ADDENDS = {"aten.addmm": 0, "tightfit.projection_backward": 4}
"""products that add up on one of their arguments -> which"""
Passages = dict[str, tuple[str, str]]
"""layer -> (gradient of its output, gradient of its input), of equal shape"""


@dataclass(frozen=True, kw_only=True)
class PartialStep:
    """One step of a cycle, or the only one."""

    profile: Profile
    """of what is left of the step; layers keep their names, and where `skipped` are some operators their positions"""
    skipped: tuple[str, ...] = ()
    """layers whose backward is left out"""
    passages: Passages = field(default_factory=dict)
    """of those skipped layers below which a backward follows"""
    perturbed: tuple[str, ...] = ()
    """trainables of a step of two forwards"""


def two_forwards(profile: Profile) -> PartialStep:
    """MeZO's step (Malladi et al. 2023, algorithm 1): forwards only; every trainable is a constant to both of them.

    No gradient and no optimizer state exist, so an activation lives until its last use in the forward, layers run what
    they have for inference, and the process never meets the kernels of a backward. Raises InputError where nothing is
    trained.
    """
    refuse_accumulation(profile, MEZO)
    optimizer = {"name": MEZO, "state_tensors": 0}
    perturbed = tuple(tensor.name for tensor in profile.tensors if tensor.kind == "trainable")
    if not perturbed:
        raise InputError(f"mezo moves trained tensors and {profile.model.name} has none; choose another policy")
    drawn = [t.model_copy(update={"update_seconds": update_seconds(t, optimizer)}) for t in profile.tensors]
    device = profile.device.model_copy(update={"floor": profile.device.floor.inference})
    stateless = profile.model_copy(update={"optimizer": optimizer, "tensors": drawn, "device": device})
    every = {layer.name for layer in profile.layers}
    return PartialStep(profile=_without_backward(stateless, every, inference_only), perturbed=perturbed)


def without_resting_states(profile: Profile) -> Profile:
    """A partial step without the optimizer states of layers at rest: a schedule might leave them on disk."""
    free = [t for t in profile.tensors if t.kind != "constant" or not t.name.startswith(STATE_PREFIXES)]
    return profile.model_copy(update={"tensors": free})


def update_seconds(tensor: Tensor, optimizer: Mapping[str, Any]) -> float:
    """Of one update of a trainable; of MeZO's also of one perturbation, which takes as long: both draw its noise.

    Where drawing was not measured it counts as much as an update by AdamW.
    """
    return (optimizer.get("name") == MEZO and tensor.perturb_seconds) or tensor.update_seconds


def cycle(profile: Profile, positions: int = POSITIONS) -> tuple[PartialStep, ...]:
    """LCSB's steps (arXiv 2602.13073): the trained blocks in `positions` runs of neighbours, lowest first; each step has
    a backward through one run, the gradient passes the blocks above it through their residual, and none below is needed.
    (The lowest block of a run still makes a gradient of its input, which nobody reads.) A block at rest is not updated, as
    torch.optim leaves alone what has no gradient; the paper counts on momentum to move it on.

    Raises InputError for a model with a trained layer that has no residual to pass a gradient through, or with one such
    layer only.
    """
    refuse_accumulation(profile, "lcsb")
    passages, blocks = equal_passages(profile), trained_blocks(profile)
    bound = {layer.name: (program, layer.bindings) for layer, program in _bound_programs(profile)}
    if len(blocks) < 2:
        raise InputError(
            f"lcsb leaves out the backward of some of several trained layers, {profile.model.name} has"
            f" {len(blocks)} that {'takes' if len(blocks) == 1 else 'take'} a gradient from above; choose another policy"
        )
    for name in blocks:
        if name not in passages:
            raise InputError(
                f"lcsb passes gradients through the residual around a layer, and layer {name} has none: what comes from"
                " above is not one gradient of the shape that it hands down; choose another policy"
            )
        if passages[name][1] and not _has_residual(*bound[name], *passages[name]):
            raise InputError(
                f"lcsb passes gradients through the residual around a layer, and layer {name} has none: no sum takes the"
                " gradient of its output over into that of its input; choose another policy"
            )
    count = min(positions, len(blocks))
    cuts = [position * len(blocks) // count for position in range(count + 1)]
    return tuple(_leave_out(profile, set(blocks) - set(blocks[low:high])) for low, high in itertools.pairwise(cuts))


def refuse_accumulation(profile: Profile, policy: str) -> None:
    """Raises InputError where several steps make one update of `profile`."""
    if profile.accumulate > 1:
        raise InputError(
            f"{policy} moves trained tensors after every step, and this profile sums the gradients of {profile.accumulate};"
            " profile without --accumulate, or choose another policy"
        )


def trained_blocks(source: Profile | Plan) -> list[str]:
    """Layers with trainables that take a gradient from above, in forward order: those LCSB goes round."""
    trained = {tensor.name for tensor in source.tensors if tensor.kind == "trainable"}
    from_above, _ = _gradients(source)
    return [layer.name for layer in source.layers if from_above[layer.name] and trained & set(layer.bindings.values())]


def equal_passages(source: Profile | Plan) -> Passages:
    """The layers that take one gradient from above and hand at most one of equal shape and type down.

    Where a layer hands none down, because nothing below is trained, its input has no gradient: the second name is empty.
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
    """Whether sums alone lead from one gradient to the other: where y = x + f(x), the gradient of x is that of y plus more."""
    reached = {value for value, name in bindings.items() if name == above}
    for operator in program.operators:
        if operator.phase == "backward" and reached & _carried_over(operator):
            reached.update(filter(None, operator.outputs))
    return below in {bindings.get(value) for value in reached}


def _carried_over(operator: Operator) -> set[str]:
    """Inputs that the operator's result is the sum of, or a copy of."""
    for prefix, place in ADDENDS.items():
        if operator.target.startswith(prefix):
            addend = operator.args[place]
            return {addend["operand"]["value"]} if isinstance(addend, dict) and "operand" in addend else set()
    copies = operator.target.startswith(("aten.add.", "aten._to_copy.", "aten.clone."))
    return set(operator.inputs) if copies else set()


def _bound_programs(source: Profile | Plan) -> list[tuple[Layer, Program]]:
    programs = {program.name: program for program in source.programs}
    return [(layer, programs[layer.program]) for layer in source.layers]


def _gradients(source: Profile | Plan) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Per layer: gradients that it reads and another layer makes, and that it makes and another layer reads."""
    made: dict[str, set[str]] = {}
    read: dict[str, set[str]] = {}
    for layer, program in _bound_programs(source):
        for operator in program.operators:
            if operator.phase != "backward":
                continue
            for value in operator.inputs:
                read.setdefault(layer.bindings.get(value, ""), set()).add(layer.name)
            for output in operator.outputs:
                made.setdefault(layer.bindings.get(output or "", ""), set()).add(layer.name)
    shared = _bound_gradients(source)

    def through(layer: Layer, one: dict[str, set[str]], other: dict[str, set[str]]) -> list[str]:
        return [
            name
            for name in dict.fromkeys(layer.bindings.values())
            if name in shared and layer.name in one.get(name, ()) and other.get(name, set()) - {layer.name}
        ]

    return (
        {layer.name: through(layer, read, made) for layer in source.layers},
        {layer.name: through(layer, made, read) for layer in source.layers},
    )


def _bound_gradients(source: Profile | Plan) -> dict[str, tuple[list[int], str, int]]:
    """Gradients that layers share: name -> shape, type, bytes."""
    return {
        layer.bindings[value.name]: (value.shape, value.dtype, value.bytes)
        for layer, program in _bound_programs(source)
        for value in program.values
        if value.kind == "gradient" and value.name in layer.bindings
    }


def _leave_out(profile: Profile, skipped: set[str]) -> PartialStep:
    """Without the backward of `skipped`, and without any below the lowest layer that still trains something."""
    passages = equal_passages(profile)
    trained = {t.name for t in profile.tensors if t.kind == "trainable"}
    training = [layer.name not in skipped and bool(trained & set(layer.bindings.values())) for layer in profile.layers]
    lowest = training.index(True)
    idle = {layer.name for layer in profile.layers[:lowest]} | skipped
    above_lowest = [layer.name for layer in profile.layers[lowest + 1 :] if layer.name in skipped]
    passed = {name: passages[name] for name in above_lowest if passages[name][1]}
    # One tensor to the planner, with the name it was made under: a gradient that is passed on does not move.
    made_as: dict[str, str] = {}
    for above, below in (passed[layer.name] for layer in reversed(profile.layers) if layer.name in passed):
        made_as[below] = made_as.get(above, above)
    left = _without_backward(profile, idle, _forward)
    layers = [
        layer.model_copy(update={"bindings": {v: made_as.get(name, name) for v, name in layer.bindings.items()}})
        for layer in left.layers
    ]
    cut = {before.name for before, after in zip(profile.layers, left.layers) if before.program != after.program}
    return PartialStep(
        profile=left.model_copy(update={"layers": layers}),
        skipped=tuple(layer.name for layer in profile.layers if layer.name in cut),
        passages=passed,
    )


def _without_backward(profile: Profile, layers: Collection[str], forward: Callable[[Program], Program]) -> Profile:
    """The profile with the backward operators of `layers` gone and what only they train at rest.

    `forward` makes their programs from those they had.
    """
    programs = {program.name: program for program in profile.programs}
    stripped: dict[str, Program] = {}
    bound: list[Layer] = []
    for layer in profile.layers:
        program = programs[layer.program]
        if layer.name in layers:
            left = forward(program)
            if left.operators != program.operators:
                program = stripped.setdefault(left.name, left)
        values = {value.name for value in program.values}
        bindings = {value: name for value, name in layer.bindings.items() if value in values}
        bound.append(layer.model_copy(update={"program": program.name, "bindings": bindings}))
    resting = _resting(profile, layers)
    states = state_count(profile.optimizer)
    tensors: list[Tensor] = []
    for tensor in profile.tensors:
        if tensor.name not in resting:
            tensors.append(tensor)
            continue
        still = tensor.model_copy(update={"kind": "constant"})
        tensors += [still, *(still.model_copy(update={"name": name}) for name in state_names(tensor.name, states))]
    used = {layer.program for layer in bound}
    every = [*profile.programs, *stripped.values()]
    return profile.model_copy(
        update={"layers": bound, "tensors": tensors, "programs": [p for p in every if p.name in used]}
    )


def _forward(program: Program) -> Program:
    """Without its backward; what is left keeps its position."""
    operators = [operator for operator in program.operators if operator.phase != "backward"]
    used = {name for operator in operators for name in [*operator.inputs, *operator.outputs]}
    values = [value for value in program.values if value.name in used]
    return Program(name=f"{program.name} forward", values=values, operators=operators)


def _resting(profile: Profile, layers: Collection[str]) -> set[str]:
    """Trainables that layers of `layers` alone use. Raises InputError for one that others use as well."""
    users: dict[str, list[str]] = {tensor.name: [] for tensor in profile.tensors if tensor.kind == "trainable"}
    for layer in profile.layers:
        for name in set(layer.bindings.values()):
            if name in users:
                users[name].append(layer.name)
    for name, found in users.items():
        left = [layer for layer in found if layer not in layers]
        if left and len(left) < len(found):
            raise InputError(
                f"{name} is trained by {_listed(found)} together, and the backward of some of them cannot be left out"
                " alone; choose another policy"
            )
    return {name for name, found in users.items() if not set(found) - set(layers)}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:3])
