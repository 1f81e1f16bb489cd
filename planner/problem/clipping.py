"""Gradients that are clipped by the norm of all of them: the profile of such a step, and the seconds of its parts.

No trainable can be updated before every gradient is known. So each step adds its gradients to sums, which are one more
state of the optimizer, and after the last step of an update a schedule of its own updates all trainables from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tightfit.planner.search_options import PlanOptions
from tightfit.profiles.schema import EXCHANGE, MOBILLM, OPTIMIZER_STATES, Profile, Tensor
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.engine.training.job import passes_messages

UPDATE_PASSES, SUM_PASSES, COPY_PASSES, NORM_PASSES, SCALE_PASSES = 7, 3, 2, 2, 2
"""how often each goes over a tensor: an update by AdamW; adding to, copying into, squaring and scaling down a sum"""
STATELESS_PASSES = 3
"""passes of an update without states, which reads gradient and parameter and writes the parameter; each state adds
two
"""
ADAFACTOR_PASSES = 24
"""the time of an update by Adafactor in passes, where it was not measured: it goes over gradient and parameter in small
windows
"""

CLIPPING_BYTES = 256 << 10
"""what a process that clips holds beyond one that does not: the code of adding and squaring, and room for the
squares
"""


def clipped(profile: Profile, max_grad_norm: float) -> Profile:
    """The profile of the same step with gradients clipped to the norm `max_grad_norm` of all of them together.

    Raises InputError for a number that is not above 0, and for a profile whose gradients are not all known in one
    process.
    """
    PlanOptions(max_grad_norm=max_grad_norm)  # raises InputError for a number that is no norm
    reason = None
    if profile.model.is_bare_graph:
        reason = "a bare graph has no gradients by name"
    elif profile.optimizer.get("name") in {EXCHANGE, MOBILLM} or passes_messages(profile.programs):
        reason = "a member of a fleet does not know the gradients of the others"
    if reason is not None:
        raise InputError(f"{spelled('max_grad_norm')} {max_grad_norm}: {reason}; leave it out")
    states = len(OPTIMIZER_STATES[profile.optimizer.get("name", "adamw")]) + 1
    optimizer = {**profile.optimizer, "state_tensors": states, "max_grad_norm": float(max_grad_norm)}
    floor = profile.device.floor
    floor = floor.model_copy(update={"resident_bytes": floor.resident_bytes + CLIPPING_BYTES})
    device = profile.device.model_copy(update={"floor": floor})
    return profile.model_copy(update={"optimizer": optimizer, "device": device})


def refuse_clipping(profile: Profile, policy: str) -> None:
    """Raises InputError where `profile` clips gradients, and the rule `policy` never knows all of them."""
    if profile.max_grad_norm is not None:
        raise InputError(
            f"{spelled('max_grad_norm')} {profile.max_grad_norm:g} needs the gradients of all that is trained, which"
            f" {policy} never has; leave it out, or choose another policy"
        )


def accumulate_seconds(tensor: Tensor, optimizer: Mapping[str, Any]) -> float:
    """Seconds to add a trainable's gradient to its sum, where gradients are clipped: the mean over the steps of an
    update, of which the last also squares the sum.

    Where it was not measured, by the bytes that it touches.
    """
    steps = int(optimizer.get("accumulate", 1))
    passes = (COPY_PASSES if steps == 1 else SUM_PASSES) + NORM_PASSES / steps
    return tensor.accumulate_seconds or passes * _pass_seconds(tensor, optimizer)


def clipped_seconds(tensor: Tensor, optimizer: Mapping[str, Any]) -> float:
    """Seconds of one update of a trainable from its sum, scaled down; where it was not measured, by the bytes that it
    touches.
    """
    return tensor.clipped_seconds or (update_passes(optimizer) + SCALE_PASSES) * _pass_seconds(tensor, optimizer)


def update_passes(optimizer: Mapping[str, Any]) -> int:
    """How often an update goes over the bytes of a trainable."""
    if optimizer.get("name") == "adafactor":
        return ADAFACTOR_PASSES
    return STATELESS_PASSES + 2 * len(OPTIMIZER_STATES.get(optimizer.get("name", ""), OPTIMIZER_STATES["adamw"]))


def _pass_seconds(tensor: Tensor, optimizer: Mapping[str, Any]) -> float:
    """Seconds of one pass over a trainable's bytes, by the seconds per step of its update in the backward; where
    several steps make one, each adds to the sum, and the last divides it by their number and zeroes it.
    """
    steps, passes = int(optimizer.get("accumulate", 1)), update_passes(optimizer)
    return tensor.update_seconds / (passes if steps == 1 else SUM_PASSES + (passes + 3) / steps)
