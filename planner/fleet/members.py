"""The devices of a fleet as they are described, what is refused of them, and what plans say of each.

The members of a fleet train one model together: how exactly their profiles have to agree is the kind's, and stands
here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex, TypeVar

from tightfit.planner.fleet.schema import LARGEST_STEPS, NAME, Link
from tightfit.planner.problem.gradients import refuse_preference, refuse_statistics
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import checked_budget
from tightfit.profiles.models.side_shape import CONFIG_KEY
from tightfit.profiles.options import MOST_ACCUMULATED
from tightfit.profiles.schema import Profile, Program, Tensor
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.units import format_size

T = TypeVar("T")
NOT_ADDED = {
    "rank_pattern": "rank_pattern",
    "use_dora": "dora",
    "modules_to_save": "modules_to_save",
    "target_parameters": "lora_experts",
}
"""settings of an adapter that rounds cannot add up, and the option that makes each"""


@dataclass(frozen=True, kw_only=True)
class MemberSpec:
    """A device that may take part: its profile of the model, its budget, and its connection to the others."""

    name: str
    profile: Profile
    budget_bytes: int
    link: Link

    def __post_init__(self) -> None:
        refuse_preference(self.profile, "a fleet")


def checked_members(members: Sequence[MemberSpec]) -> list[MemberSpec]:
    """The members with budgets as whole numbers of bytes. Raises InputError for names and budgets that cannot be
    used.
    """
    if not members:
        raise InputError("a fleet of no members; name at least one device, with its profile, budget and link")
    names: set[str] = set()
    for spec in members:
        if not NAME.fullmatch(spec.name):
            raise InputError(
                f"a member called {spec.name!r}: files are named after it; use up to 64 letters, digits, '-', '_'"
                " and '.'"
            )
        if spec.name in names:
            raise InputError(f"two members are called {spec.name}; give every member a name of its own")
        names.add(spec.name)
    return [replace(spec, budget_bytes=checked_budget(spec.budget_bytes)) for spec in members]


def checked_count(micro_batches: object) -> int:
    """The number of micro-batches of a step. Raises InputError for what is no such number."""
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, SupportsIndex):
        raise InputError(f"{micro_batches!r} micro-batches are no number of them; give a whole number from 1")
    count = operator.index(micro_batches)
    if not 1 <= count <= MOST_ACCUMULATED:
        raise InputError(f"{count} micro-batches cannot make a step; give a number from 1 to {MOST_ACCUMULATED}")
    return count


def checked_steps(steps: int, accumulate: int) -> int:
    """The local steps of a round, in whole updates. Raises InputError for what is no such number."""
    if not 1 <= steps <= LARGEST_STEPS:
        raise InputError(f"{steps} steps cannot make a round; give a whole number from 1 to {LARGEST_STEPS}")
    if steps % accumulate:
        raise InputError(
            f"{steps} steps of a round: an update takes {accumulate} steps, as profiled; give a multiple of that"
        )
    return steps


# --- what plans say of a member ---------------------------------------------------------------------------------------


def lacking(needed: int, allowed: int) -> str:
    """What a device needs and has; in bytes where rounding would hide the difference."""
    one, other = format_size(needed), format_size(allowed)
    if one == other:
        one, other = f"{needed} bytes", f"{allowed}"
    return f"needs {one} and may take {other}"


def trained_tensors(source: Profile | Plan) -> list[Tensor]:
    """The tensors that are trained, in the profile's order, which all members share."""
    return [tensor for tensor in source.tensors if tensor.kind == "trainable"]


def rank_of(source: Profile | Plan) -> int:
    """The rank of the adapter that is trained."""
    assert source.model.lora is not None
    return int(source.model.lora["rank"])


def shared(profiles: Sequence[Profile], make: Callable[[Profile], T]) -> list[T]:
    """What `make` makes of each profile; equal ones share it."""
    made: list[tuple[Profile, T]] = []
    result: list[T] = []
    for profile in profiles:
        found = next((one for known, one in made if known is profile or known == profile), None)
        if found is None:
            found = make(profile)
            made.append((profile, found))
        result.append(found)
    return result


# --- one model --------------------------------------------------------------------------------------------------------


def check_one_model(profiles: Mapping[str, Profile]) -> None:
    """Raise InputError unless the members' profiles, by name, are of one model that can be trained by a fleet."""
    for name, profile in profiles.items():
        if profile.model.is_bare_graph:
            raise InputError(
                f"member {name}: its profile is of a bare graph ({profile.model.name}), which says how long operators"
                " take and not what they compute; profile a model on every device"
            )
        if not trained_tensors(profile):
            raise InputError(
                f"member {name}: nothing of {profile.model.name} is trained, so that there are no gradients to add;"
                f" profile it with {spelled('lora_rank')}"
            )
        refuse_statistics(profile, "a fleet")
    _check_equal(_each(profiles, _whole_facts))


def check_alike(profiles: Mapping[str, Profile]) -> None:
    """Raise InputError unless the members' profiles, by name, train an adapter of one model; ranks may differ."""
    for name, profile in profiles.items():
        if not profile.model.lora or not trained_tensors(profile):
            raise InputError(
                f"member {name}: its profile of {profile.model.name} trains no adapter, and adapters are what federated"
                f" rounds add up; profile with {spelled('lora_rank')}"
            )
        check_plain(name, profile)
    _check_equal(
        _each(profiles, _adapter_facts),
        f" ({spelled('lora_rank')} alone may differ, with {spelled('lora_alpha')} in proportion)",
    )


def check_side(device: MemberSpec, server: MemberSpec) -> None:
    """Raise InputError unless a server's profile is of a side network beside the model of the device's."""
    if CONFIG_KEY in device.profile.model.config:
        raise InputError(
            f"member {device.name!r}: its profile is of a side network, which the server trains; give the device's"
            " profile of the model, and describe the device first"
        )
    profiles = {spec.name: spec.profile for spec in (device, server)}
    _check_equal(_each(profiles, _side_facts), f" but for {spelled('side_rank')}")


def check_plain(name: str, profile: Profile) -> None:
    """Raise InputError for an adapter of member `name` that rounds cannot add up: what is trained has to be LoRA pairs,
    all of one rank.
    """
    for setting, option in NOT_ADDED.items():
        if (profile.model.lora or {}).get(setting):
            raise InputError(
                f"member {name}: its adapter was profiled with {spelled(option)}, and rounds add up LoRA pairs of one"
                f" rank and nothing else; profile without {spelled(option)}"
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


def _check_equal(facts: Mapping[str, Mapping[str, Any]], exception: str = "") -> None:
    """Raise InputError unless all members' `facts`, by member and by what they are about, are those of the first;
    `exception` says what may differ. Lists are too long to be shown.
    """
    (one, first), *others = facts.items()
    for name, own in others:
        for what, value in own.items():
            if value != first[what]:
                hidden = isinstance(value, list) or isinstance(first[what], list)
                shown = "" if hidden else f" ({_shown(first[what])} and {_shown(value)})"
                raise InputError(
                    f"members {one} and {name} differ in {what}{shown}: the devices of a fleet train one"
                    f" model together; profile the same model on both, with the same options{exception}"
                )


def _each(profiles: Mapping[str, Profile], make: Callable[[Profile], T]) -> dict[str, T]:
    """What `make` makes of each member's profile; of one that many members have, once."""
    made = {id(profile): make(profile) for profile in {id(one): one for one in profiles.values()}.values()}
    return {name: made[id(profile)] for name, profile in profiles.items()}


def _facts(profile: Profile) -> dict[str, Any]:
    """What has to be the same in every fleet."""
    return {
        "model": profile.model.name,
        "weights": profile.model.store_fingerprint,
        "batch": profile.batch,
        "seq": profile.seq,
    }


def _whole_facts(profile: Profile) -> dict[str, Any]:
    """What has to be the same for members that compute parts of one step."""
    return _facts(profile) | {
        "lora": profile.model.lora,
        "dtype": profile.compute_dtype,
        "tensors": [[tensor.name, tensor.kind, tensor.shape, tensor.dtype] for tensor in profile.tensors],
        "layers": [layer.model_dump() for layer in profile.layers],
        "programs": [
            [program.name, [[op.target, op.phase, op.inputs, op.outputs] for op in program.operators]]
            for program in profile.programs
        ],
    }


def _side_facts(profile: Profile) -> dict[str, Any]:
    config = {key: value for key, value in profile.model.config.items() if key != CONFIG_KEY}
    return _facts(profile) | {"dtype": profile.compute_dtype, "config": sorted(config.items())}


def _adapter_facts(profile: Profile) -> dict[str, Any]:
    """What has to be the same for adapters that are added up."""
    lora = profile.model.lora
    assert lora is not None
    named = ("rank", "alpha", "alpha_pattern")
    scale = lora["alpha"] / (math.sqrt(lora["rank"]) if lora.get("use_rslora") else lora["rank"])
    return _facts(profile) | {
        "steps of an update": profile.accumulate,
        "the adapter's scale": scale,
        "alphas by pattern": [lora["rank"], lora["alpha_pattern"]] if lora.get("alpha_pattern") else None,
        "the adapter's other settings": sorted(item for item in lora.items() if item[0] not in named),
        "the trained tensors": [tensor.name for tensor in trained_tensors(profile)],
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
