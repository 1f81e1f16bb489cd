"""Corrections of a profile's figures that were learned by rehearsing its plans: seconds and bytes of a real run.

A profile is measured operator by operator. In a run the same operators may take longer or hold more: transfers beside
other operators, holes in the heap, the writing of a checkpoint. `tightfit.runtime.session.rehearsal` carries a plan out
for a few steps and writes what it measures into a `LearnedFigures`: a factor for each kind of operator and each
channel, by which plans are compared, and bytes. The cache keeps it for the profile whose figures it corrects; a profile
that was measured anew begins without.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import Field

from tightfit.profiles.schema import Channel, FrozenRecord, Operator, Profile, Tensor
from tightfit.runtime.common.cache import cache_place, keep, kept

LEARNED_VERSION = 2
KINDS = (
    ("aten.mm.", "matrix products"),
    ("aten.addmm.", "matrix products"),
    ("aten.bmm.", "matrix products"),
    ("tightfit.projection", "matrix products"),
    ("tightfit.lora_", "matrix products"),
    ("tightfit.dropout_", "matrix products"),
    ("tightfit.dora_norm", "norms of weights"),
    ("aten.convolution", "convolutions"),
    ("tightfit.attention", "attention"),
    ("tightfit.tile_attention", "attention"),
    ("tightfit.head_", "loss head"),
    ("tightfit.table_head", "loss head"),
    ("tightfit.embed_rows", "embedding"),
    ("tightfit.table_rows", "embedding"),
)
"""(prefix of an operator's name, its kind); all other operators are elementwise."""
UNPACKING, UPDATES, PERTURBING = "unpacking weights", "optimizer updates", "perturbing trainables"
SECONDS_OF_TENSORS = {
    "unpack_seconds": UNPACKING,
    "update_seconds": UPDATES,
    "accumulate_seconds": UPDATES,
    "clipped_seconds": UPDATES,
    "perturb_seconds": PERTURBING,
}
"""figure of a tensor -> kind of operator whose seconds it has"""
SPREAD_BYTES = 320 << 10
"""By how much the peaks of runs of one plan differ: of twelve of SmolLM2-135M's shape in 110 MiB the highest was 208
KiB above the lowest, of eight of Qwen2.5-0.5B's in 200 MiB 300 KiB.
"""
SPREAD = 0.01
"""The same of modules, as a share of what they hold: three runs of efficientnet_b0 in 202 MiB held 201.7 to 203.8, by
`make bench-truth`; why was not looked into."""


def kind_of(operator: str) -> str:
    """The kind of an operator with this name, of those that a rehearsal tells apart."""
    return next((kind for prefix, kind in KINDS if operator.startswith(prefix)), "elementwise")


class Rehearsal(FrozenRecord):
    """What a plan took and held when it was carried out for a few steps."""

    seconds: float | None = Field(description="of a step; None: its cap ended the rehearsal")
    held_bytes: int = Field(description="peak of all processes of the run")
    busy_cores: float = Field(description="cores that other programs took meanwhile")


class LearnedFigures(FrozenRecord):
    """Corrections of a profile's figures."""

    kinds: dict[str, float] = Field(
        {}, description="kind of operator (`kind_of`), unpacking and updates among them -> factor of its seconds"
    )
    read: float = Field(1.0, description="factor of the seconds of reading")
    write: float = Field(1.0, description="factor of the seconds of writing")
    added_bytes: int | None = Field(
        None, description="what a run holds beyond the profile's floor; None: no run has shown it"
    )


def spread_bytes(kind: str, peak_bytes: int) -> int:
    """By how many bytes the peaks of runs of one plan differ, for a model of this `kind` and a plan with this peak."""
    return SPREAD_BYTES if kind == "decoder" else max(SPREAD_BYTES, int(SPREAD * peak_bytes))


def figures_id(profile: Profile) -> str:
    """sha256 of the figures of a profile, under which the cache keeps what was learned about it."""
    parts = [profile.device, *profile.tensors, *profile.programs]
    text = json.dumps([part.model_dump(mode="json") for part in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def learned_path(identity: str) -> Path:
    return cache_place("learned", LEARNED_VERSION, identity)


def load_learned(identity: str) -> LearnedFigures:
    """What is known about the figures of this identity (`figures_id`); nothing if no rehearsal was made, or if what is
    kept cannot be read.
    """
    return kept(learned_path(identity), LearnedFigures.model_validate_json) or LearnedFigures()


def save_learned(identity: str, learned: LearnedFigures) -> None:
    """Raises InputError or RunError where the cache cannot be written."""
    keep(learned_path(identity), learned.model_dump_json())


def corrected(profile: Profile, learned: LearnedFigures) -> Profile:
    """The profile with its figures as a run has shown them."""
    if learned == LearnedFigures():
        return profile
    floor, added = profile.device.floor, learned.added_bytes or 0
    floor_bytes = {"resident_bytes": floor.resident_bytes + added}
    if floor.inference_resident_bytes is not None:
        floor_bytes["inference_resident_bytes"] = floor.inference_resident_bytes + added
    device = profile.device.model_copy(
        update={
            "floor": floor.model_copy(update=floor_bytes),
            "read": _channel(profile.device.read, learned.read),
            "write": _channel(profile.device.write, learned.write),
        }
    )
    programs = [
        program.model_copy(update={"operators": [_operator(one, learned.kinds) for one in program.operators]})
        for program in profile.programs
    ]
    tensors = [_tensor(tensor, learned.kinds) for tensor in profile.tensors]
    return profile.model_copy(update={"device": device, "tensors": tensors, "programs": programs})


def _operator(operator: Operator, kinds: dict[str, float]) -> Operator:
    factor = kinds.get(kind_of(operator.target), 1.0)
    return operator.model_copy(update={"seconds": operator.seconds * factor})


def _tensor(tensor: Tensor, kinds: dict[str, float]) -> Tensor:
    return tensor.model_copy(
        update={name: getattr(tensor, name) * kinds.get(kind, 1.0) for name, kind in SECONDS_OF_TENSORS.items()}
    )


def _channel(channel: Channel, factor: float) -> Channel:
    return channel.model_copy(
        update={
            "latency_seconds": channel.latency_seconds * factor,
            "bytes_per_second": channel.bytes_per_second / factor,
        }
    )
