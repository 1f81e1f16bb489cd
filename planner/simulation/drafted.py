"""Plans and their steps before the simulator has put its figures in."""

from __future__ import annotations

from typing import Any

from tightfit.planner.schema import Peak, Phase, Plan
from tightfit.profiles.schema import Profile


def drafted_phase(listed: list[list[Any]]) -> Phase:
    """A step of these instructions."""
    return Phase(instructions=listed, seconds=0.0, peak_bytes=0, peak=Peak(instruction=0, text="", tensors={}))


def drafted(
    profile: Profile,
    ran: Profile,
    *,
    policy: str,
    budget_bytes: int,
    decisions: dict[str, str],
    resident: dict[str, int],
    train: list[Phase],
    evaluate: Phase | None = None,
    arena_bytes: int = 0,
) -> Plan:
    """A plan with the steps `train`. `ran`: what of the profile they run."""
    return Plan(
        fingerprint="",
        profile_fingerprint=profile.fingerprint,
        policy=policy,
        status="feasible",
        budget_bytes=budget_bytes,
        floor_bytes=ran.device.floor.held_bytes,
        peak_bytes=0,
        step_seconds=0.0,
        bound_seconds=0.0,
        any_schedule_bound_seconds=0.0,
        gap=0.0,
        any_schedule_gap=0.0,
        solve_seconds=0.0,
        model=profile.model,
        batch=profile.batch,
        seq=profile.seq,
        compute_dtype=profile.compute_dtype,
        optimizer=ran.optimizer,
        device=ran.device,
        tensors=profile.tensors,
        programs=ran.programs,
        layers=ran.layers,
        loss=profile.loss,
        token_losses=profile.token_losses,
        decisions=decisions,
        resident=resident,
        arena_bytes=arena_bytes,
        workspace_bytes=0,
        train=train[0],
        cycle=train[1:],
        evaluate=evaluate,
    )
