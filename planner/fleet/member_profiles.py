"""Profiles of a fleet's members: whether they are of one model, and what of them a member's own plan is made.

A member's plan covers one micro-batch. Its optimizer is `EXCHANGE`: it has no states, and an update hands a gradient
over to the shelf. Memory that the exchange takes is part of the plan's floor, so that the plan's peak is the member's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from tightfit.planner.fleet.pieces import trained_tensors
from tightfit.planner.fleet.schema import Shelf
from tightfit.planner.problem.gradients import refuse_statistics
from tightfit.profiles.devices.estimate import SUM_PASSES, UPDATE_PASSES
from tightfit.profiles.schema import EXCHANGE, DeviceFigures, Profile, Program, adamw
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled

T = TypeVar("T")
HAND_OVER_SECONDS = 20e-6
"""to hand one gradient over, beside its bytes: a call of a copying kernel and the bookkeeping around it"""
CLOSING_PASSES = 3
"""passes over memory with which an update of several steps begins and ends: it divides the sum and makes it zero"""
COPY_BYTES_PER_SECOND = 5e9
"""of a gradient that is copied, or added to another, on the slowest of the devices that have been measured"""


def exchange_optimizer(micro_batches: int) -> dict[str, Any]:
    """The `optimizer` field of a member's plan."""
    return {"name": EXCHANGE, "state_tensors": 0, "accumulate": micro_batches}


def hand_over_seconds(size: int, device: DeviceFigures, gradients: Shelf) -> float:
    """Seconds of the cores that handing a gradient of `size` bytes over to the shelf takes."""
    written = size * device.write.compute_seconds_per_byte if gradients == "disk" else 0.0
    return HAND_OVER_SECONDS + size / COPY_BYTES_PER_SECOND + written


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
    """Seconds of the optimizer's arithmetic for all trained tensors, once, whatever number of steps the profile is of."""
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


# --- one model ---------------------------------------------------------------------------------------------------------


def check_one_model(profiles: Mapping[str, Profile]) -> None:
    """Raise InputError unless the members' profiles, by name, are of one model that can be trained by a fleet."""
    for name, profile in profiles.items():
        if profile.model.is_bare_graph:
            raise InputError(
                f"member {name}: its profile is of a bare graph ({profile.model.name}), which says how long operators take"
                " and not what they compute; profile a model on every device"
            )
        if not trained_tensors(profile):
            raise InputError(
                f"member {name}: nothing of {profile.model.name} is trained, so that there are no gradients to add;"
                f" profile it with {spelled('lora_rank')}"
            )
        refuse_statistics(profile, "a fleet")
    check_equal(
        _each(profiles, _facts),
        lambda one, other: "" if isinstance(other, list) else f" ({_shown(one)} and {_shown(other)})",
    )


def check_equal(facts: Mapping[str, Mapping[str, Any]], told: Callable[[Any, Any], str], exception: str = "") -> None:
    """Raise InputError unless all members' `facts`, by member and by what they are about, are those of the first.

    `told` says two values that differ, with a space before them, or nothing; `exception` what may differ.
    """
    (one, first), *others = facts.items()
    for name, own in others:
        for what, value in own.items():
            if value != first[what]:
                raise InputError(
                    f"members {one} and {name} differ in {what}{told(first[what], value)}: the devices of a fleet train one"
                    f" model together; profile the same model on both, with the same options{exception}"
                )


def differences(profiles: Mapping[str, Profile]) -> list[str]:
    """In words, in what the profiles do not agree of all that decides how operators round."""
    result = []
    devices = {name: profile.device for name, profile in profiles.items()}
    for what, values in (
        ("kind of device", {name: device.kind for name, device in devices.items()}),
        ("threads", {name: device.threads for name, device in devices.items()}),
        ("version of torch", {name: device.torch_version for name, device in devices.items()}),
    ):
        if len(set(values.values())) > 1:
            result.append(f"{what}: " + ", ".join(f"{name} {_shown(value)}" for name, value in values.items()))
    (one, programs), *others = _each(profiles, lambda profile: _untimed(profile.programs)).items()
    unlike = [name for name, own in others if own != programs]
    if unlike:
        result.append(
            f"how operators compute (what they round, and their scratch memory): {', '.join(unlike)} not as {one}"
        )
    return result


def _each(profiles: Mapping[str, Profile], make: Callable[[Profile], T]) -> dict[str, T]:
    """What `make` makes of each member's profile; of one that many members have, once."""
    made = {id(profile): make(profile) for profile in {id(one): one for one in profiles.values()}.values()}
    return {name: made[id(profile)] for name, profile in profiles.items()}


def _facts(profile: Profile) -> dict[str, Any]:
    """What has to be the same for all members; lists are too long to be shown."""
    model = profile.model
    return {
        "model": model.name,
        "weights": model.store_fingerprint,
        "batch": profile.batch,
        "seq": profile.seq,
        "lora": model.lora,
        "dtype": profile.compute_dtype,
        "tensors": [[tensor.name, tensor.kind, tensor.shape, tensor.dtype] for tensor in profile.tensors],
        "layers": [layer.model_dump() for layer in profile.layers],
        "programs": [
            [program.name, [[op.target, op.phase, op.inputs, op.outputs] for op in program.operators]]
            for program in profile.programs
        ],
    }


def _untimed(programs: Sequence[Program]) -> list[Any]:
    return [
        [
            [value.model_dump() for value in program.values],
            [op.model_dump(exclude={"seconds", "workspace_bytes", "flops"}) for op in program.operators],
        ]
        for program in programs
    ]


def _shown(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
