"""Optimizers other than AdamW: the profile of a step with one of them, which has other states and other seconds of
updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tightfit.planner.problem.clipping import SCALE_PASSES, SUM_PASSES, UPDATE_PASSES, clipped, update_passes
from tightfit.profiles.learned import LearnedFigures, corrected, figures_id, load_learned
from tightfit.profiles.schema import EXCHANGE, MOBILLM, OPTIMIZER_STATES, Profile, Tensor
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.engine.training.job import passes_messages

DEFAULT = "adamw"
ADAFACTOR_BYTES = 2560 << 10
"""what a process that updates by Adafactor holds beyond one that does by AdamW: its operators' code, room for a window.
With it the predicted peak of `tests/helpers/mixed_parameters.py` is as far above the measured one as with AdamW.
"""


def chosen(
    profile: Profile, optimizer: str | None, max_grad_norm: float | None, learned: LearnedFigures | None = None
) -> Profile:
    """The profile of the same step with the optimizer of this name, and with gradients clipped to this norm; None: with
    AdamW, and not clipped. Its figures are corrected by what was learned, by default what rehearsals of this profile
    have taught on this machine. Raises InputError for a name or a norm that is none, or that the profile cannot have.
    """
    adjusted = profile if optimizer is None else with_optimizer(profile, optimizer)
    adjusted = adjusted if max_grad_norm is None else clipped(adjusted, max_grad_norm)
    if learned is None and not profile.model.is_bare_graph and profile.device.measured:
        learned = load_learned(figures_id(profile))
    return adjusted if learned is None else corrected(adjusted, learned)


def with_optimizer(profile: Profile, name: str) -> Profile:
    """The profile of the same step with another optimizer. Adafactor's updates are measured in a profile; the seconds
    of others are AdamW's, scaled by the bytes that they touch.

    Raises InputError for a name that is no optimizer's, or one that the profile cannot have.
    """
    if name not in OPTIMIZER_STATES:
        raise InputError(f"no optimizer is called {name!r}; choose one of {', '.join(OPTIMIZER_STATES)}")
    if name == profile.optimizer.get("name"):
        return profile
    of_a_fleet = profile.optimizer.get("name") in {EXCHANGE, MOBILLM} or passes_messages(profile.programs)
    if profile.model.is_bare_graph or of_a_fleet:
        reason = "members of fleets train with AdamW" if of_a_fleet else "a bare graph has no updates"
        raise InputError(f"{spelled('optimizer')} {name}: {reason}; leave it out")
    if name == "adafactor" and (tables := profile.model.tables):
        raise InputError(
            f"{spelled('optimizer')} {name}: {' and '.join(tables)} is trained in slices, and its step needs means over"
            f" the whole of it; choose another optimizer, or profile without {spelled('modules_to_save')}"
        )
    steps = profile.accumulate
    states = len(OPTIMIZER_STATES[name]) + (steps > 1)
    settings = {"name": name, "state_tensors": states, **({"accumulate": steps} if steps > 1 else {})}
    tensors = [_scaled(tensor, name, steps) if tensor.kind == "trainable" else tensor for tensor in profile.tensors]
    floor = profile.device.floor
    if name == "adafactor":
        floor = floor.model_copy(update={"resident_bytes": floor.resident_bytes + ADAFACTOR_BYTES})
    device = profile.device.model_copy(update={"floor": floor})
    return profile.model_copy(update={"optimizer": settings, "tensors": tensors, "device": device})


def refuse_other_optimizers(optimizer: Mapping[str, Any], policy: str, reason: str) -> None:
    """Raises InputError where a profile's `optimizer` is not AdamW and the rule `policy` has one of its own."""
    name = optimizer.get("name", DEFAULT)
    if name != DEFAULT:
        raise InputError(f"{spelled('optimizer')} {name}: {policy} {reason}; leave it out, or choose another policy")


def _scaled(tensor: Tensor, name: str, steps: int) -> Tensor:
    passes = update_passes({"name": name})
    added = 0 if steps == 1 else SUM_PASSES + 3 / steps
    if name == "adafactor" and (measured := tensor.adafactor_seconds):
        pass_seconds = tensor.update_seconds / (added + UPDATE_PASSES / steps)
        seconds = {
            "update_seconds": added * pass_seconds + measured / steps,
            "clipped_seconds": measured + SCALE_PASSES * pass_seconds,
        }
        return tensor.model_copy(update=seconds)
    share = (added + passes / steps) / (added + UPDATE_PASSES / steps)
    return tensor.model_copy(
        update={
            "update_seconds": tensor.update_seconds * share,
            # What clipping adds is the same; where it was not measured, it follows from the seconds above.
            "clipped_seconds": tensor.clipped_seconds * (passes + SCALE_PASSES) / (UPDATE_PASSES + SCALE_PASSES),
        }
    )
