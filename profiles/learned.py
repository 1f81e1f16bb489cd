"""Corrections of a profile's figures that were learned by rehearsing its plans: seconds and bytes of a real run.

A profile is measured operator by operator. In a run the same operators may take longer or hold more: transfers beside other
operators, holes in the heap, the writing of a checkpoint. `tightfit.runtime.session.rehearsal` carries a plan out for a few steps and
writes what it measures into a `LearnedFigures`. The cache keeps it for the profile whose figures it corrects; a profile that was measured
anew begins without.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from tightfit.profiles.schema import Channel, FrozenRecord, Operator, Profile, Program, Tensor
from tightfit.runtime.common.files import cache_directory, write_whole

LEARNED_VERSION = 1
SPREAD_BYTES = 320 << 10
"""By how much the peaks of runs of one plan differ: of twelve of SmolLM2-135M's shape in 110 MiB the highest was 208 KiB above the
lowest, of eight of Qwen2.5-0.5B's in 200 MiB 300 KiB."""
SPREAD = 0.01
"""The same of modules, as a share of what they hold: three runs of efficientnet_b0 in 202 MiB held 201.7 to 203.8, by
`make bench-truth`; why was not looked into."""
ABOVE = 0.01
"""Share of a peak by which a prediction may be above what was held before it is lowered."""
MOST_KEPT = 12
"""rehearsals that are remembered"""


class Rehearsal(FrozenRecord):
    """A plan that was carried out, beside its predictions. Seconds are those of a step."""

    budget_bytes: int
    policy: str
    predicted_seconds: float
    seconds: float
    predicted_bytes: int
    held_bytes: int = Field(description="peak of all processes of the run")
    busy_cores: float = Field(description="cores that other programs took meanwhile")
    judged: bool = Field(description="False: other programs took so much that the seconds say nothing of the plan")


class KeptRehearsal(Rehearsal):
    """A rehearsal as the cache keeps it."""

    unlearned_bytes: int = Field(
        0, description="what of `predicted_bytes` the profile alone says, without what was learned"
    )


class LearnedFigures(FrozenRecord):
    """Corrections of a profile's figures."""

    version: int = LEARNED_VERSION
    operators: dict[str, list[tuple[float, int] | None]] = Field(
        {}, description="program -> for each operator its mean seconds in runs and the number of runs; None: not seen"
    )
    unpack: float = Field(1.0, description="factor of the seconds of unpacking")
    updates: dict[str, float] = Field({}, description="optimizer -> factor of the seconds of its updates")
    read: Channel | None = None
    write: Channel | None = None
    added_bytes: int = Field(0, description="what a run holds beyond the profile's floor")
    rehearsals: list[KeptRehearsal] = []


def spread_bytes(kind: str, peak_bytes: int) -> int:
    """By how many bytes the peaks of runs of one plan differ, for a model of this `kind` and a plan with this peak."""
    return SPREAD_BYTES if kind == "decoder" else max(SPREAD_BYTES, int(SPREAD * peak_bytes))


def figures_id(profile: Profile) -> str:
    """sha256 of the figures of a profile, under which the cache keeps what was learned about it."""
    parts = [profile.device, *profile.tensors, *profile.programs]
    text = json.dumps([part.model_dump(mode="json") for part in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def learned_path(identity: str) -> Path:
    return cache_directory() / "learned" / f"{identity[:32]}.json"


def load_learned(identity: str) -> LearnedFigures:
    """What is known about the figures of this identity (`figures_id`); nothing if no rehearsal was made, or if what is kept cannot
    be read.
    """
    try:
        learned = LearnedFigures.model_validate_json(learned_path(identity).read_bytes())
    except (OSError, ValidationError):
        return LearnedFigures()
    return learned if learned.version == LEARNED_VERSION else LearnedFigures()


def save_learned(identity: str, learned: LearnedFigures) -> None:
    """Raises InputError or RunError where the cache cannot be written."""
    path = learned_path(identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    newest = learned.model_copy(update={"rehearsals": learned.rehearsals[-MOST_KEPT:]})
    write_whole(path, newest.model_dump_json())


def corrected(profile: Profile, learned: LearnedFigures) -> Profile:
    """The profile with learned figures in place of those that were measured operator by operator."""
    if learned == LearnedFigures():
        return profile
    floor = profile.device.floor
    floor_bytes = {"resident_bytes": floor.resident_bytes + learned.added_bytes}
    if floor.inference_resident_bytes is not None:
        floor_bytes["inference_resident_bytes"] = floor.inference_resident_bytes + learned.added_bytes
    device = profile.device.model_copy(
        update={
            "floor": floor.model_copy(update=floor_bytes),
            "read": learned.read or profile.device.read,
            "write": learned.write or profile.device.write,
        }
    )
    update_factor = learned.updates.get(update_kind(profile), 1.0)
    return profile.model_copy(
        update={
            "device": device,
            "tensors": [_tensor(tensor, learned.unpack, update_factor) for tensor in profile.tensors],
            "programs": [_program(program, learned.operators.get(program.name, ())) for program in profile.programs],
        }
    )


def update_kind(profile: Profile) -> str:
    """The key of `LearnedFigures.updates` for the profile's optimizer."""
    clipped = " clipped" if profile.max_grad_norm is not None else ""
    return f"{profile.optimizer.get('name', 'adamw')}{clipped}"


def _tensor(tensor: Tensor, unpack: float, update: float) -> Tensor:
    if tensor.kind == "weight" and unpack != 1.0:
        return tensor.model_copy(update={"unpack_seconds": tensor.unpack_seconds * unpack})
    if tensor.kind == "trainable" and update != 1.0:
        names = ("update_seconds", "accumulate_seconds", "clipped_seconds")
        return tensor.model_copy(update={name: getattr(tensor, name) * update for name in names})
    return tensor


def _program(program: Program, figures: Sequence[tuple[float, int] | None]) -> Program:
    if not figures:
        return program
    pairs = zip(program.operators, figures, strict=True)
    return program.model_copy(update={"operators": [_operator(operator, figure) for operator, figure in pairs]})


def _operator(operator: Operator, figure: tuple[float, int] | None) -> Operator:
    return operator if figure is None else operator.model_copy(update={"seconds": figure[0]})
