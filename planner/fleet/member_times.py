"""What a micro-batch takes on a member of a fleet, by its plan and by where its gradients go."""

from __future__ import annotations

from tightfit.planner.fleet.pieces import trained_tensors
from tightfit.planner.fleet.schema import Shelf
from tightfit.planner.schema import Plan
from tightfit.profiles.schema import Profile


def micro_batch_seconds(plan: Plan, gradients: Shelf, *, first: bool) -> float:
    """Predicted seconds of one micro-batch: those of the plan's step, or where gradients go to disk, of all that the disk
    then carries, if that is more. The first of a chain adds its gradients up there, and reads what it adds to.
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
