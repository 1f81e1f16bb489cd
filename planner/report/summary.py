"""Summaries of profiles and plans as strict JSON, for `--json` and the service's answers; imports nothing heavy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tightfit.profiles.measuring.marks import marks
from tightfit.profiles.models.decoder_config import long_positions

if TYPE_CHECKING:
    from tightfit.planner.schema import Phase, Plan
    from tightfit.profiles.schema import Profile, Tensor

PLAN_FIELDS = (
    "status",
    "policy",
    "budget_bytes",
    "floor_bytes",
    "peak_bytes",
    "expected_seconds",
    "expected_from",
    "busy_machine",
    "step_seconds",
    "bound_seconds",
    "gap",
    "any_schedule_bound_seconds",
    "any_schedule_gap",
    "solve_seconds",
    "deterministic",
    "ended_by",
    "minimum_budget_bytes",
    "minimum_bound_bytes",
    "minimum_budget_reason",
    "arena_bytes",
    "workspace_bytes",
    "accumulate",
    "max_grad_norm",
    "fingerprint",
    "profile_fingerprint",
)
PHASE_FIELDS = (
    "seconds",
    "peak_bytes",
    "compute_seconds",
    "recompute_seconds",
    "unpack_seconds",
    "stall_seconds",
    "read_bytes",
    "write_bytes",
)


def profile_summary(profile: Profile) -> dict[str, Any]:
    """The profile in figures: bytes by kind of tensor, seconds of compute, floor and disk."""
    from tightfit.planner.problem.step_graph import state_bytes, state_roles
    from tightfit.planner.schema import tile_tokens

    programs = {program.name: program for program in profile.programs}
    weights = _weights(profile)
    trained = [tensor for tensor in profile.tensors if tensor.kind == "trainable"]
    seconds = {"forward": 0.0, "inference": 0.0, "backward": 0.0}
    for layer in profile.layers:
        for operator in programs[layer.program].operators:
            seconds[operator.phase] += operator.seconds
    return {
        "fingerprint": profile.fingerprint,
        "model": profile.model.name,
        "batch": profile.batch,
        "seq": profile.seq,
        "tile": tile_tokens(profile),
        "accumulate": profile.accumulate,
        "compute_dtype": profile.compute_dtype,
        "layers": len(profile.layers),
        "programs": len(profile.programs),
        "weight_bytes": sum(weight.bytes for weight in weights),
        "packed_bytes": sum(weight.packed_bytes for weight in weights),
        "lora": profile.model.lora,
        "preference": profile.model.preference.model_dump() if profile.model.preference else None,
        "trainable_bytes": sum(tensor.bytes for tensor in trained),
        "state_bytes": sum(state_bytes(role, tensor) for tensor in trained for role in state_roles(profile.optimizer)),
        "forward_seconds": seconds["forward"],
        "backward_seconds": seconds["backward"],
        "floor_bytes": max(profile.device.floor.start_peak_bytes, profile.device.floor.held_bytes),
        "read_bytes_per_second": profile.device.read.bytes_per_second,
        "write_bytes_per_second": profile.device.write.bytes_per_second,
        "device": profile.device.name,
        "measured": profile.device.measured,
        "busy_cores": profile.device.busy_cores,
        "quota_cores": profile.device.quota_cores,
        "compared": profile.model.compared,
        "base": profile.model.rounding,
        "positions": long_positions(profile.model.config, profile.seq or 0),
        "adapter_base": profile.model.config.get("adapter_base", profile.model.source),
        "marks": marks(profile.device),
    }


def _weights(profile: Profile) -> list[Tensor]:
    """The weights, each once: the slices ``w[a:b]`` of one that rows are gathered from as well lie in the whole."""
    weights = {tensor.name: tensor for tensor in profile.tensors if tensor.kind == "weight"}
    return [tensor for name, tensor in weights.items() if "[" not in name or name.partition("[")[0] not in weights]


def plan_summary(plan: Plan) -> dict[str, Any]:
    """The plan without its schedule: decisions counted, phases in figures."""
    summary: dict[str, Any] = {name: getattr(plan, name) for name in PLAN_FIELDS}
    summary["optimizer"] = plan.optimizer.get("name", "adamw")
    summary["rehearsal"] = plan.rehearsal and plan.rehearsal.model_dump(mode="json")
    summary["marks"] = marks(plan.device)
    summary["decisions"] = dict(Counter(plan.decisions.values()).most_common())
    summary["train"], summary["evaluate"] = _phase(plan.train), _phase(plan.evaluate)
    summary["update"] = _phase(plan.update)
    summary["cycle"] = [_phase(step) for step in plan.cycle]
    return summary


def adapter_words(lora: Mapping[str, Any]) -> str:
    """What a profile or plan says of its adapter, in a few words."""
    dropout, saved = lora.get("lora_dropout"), lora.get("modules_to_save")
    method = "DoRA" if lora.get("use_dora") else "LoRA"
    words = f"{method} rank {lora['rank']}" + (f" with dropout {dropout:g}" if dropout else "")
    words += ", on experts too" if lora.get("target_parameters") else ""
    return words + (f", {' and '.join(saved)} in full" if saved else "")


def describe(plan: Plan) -> str:
    """What is trained, in a line: shapes, number type, LoRA rank, what updates where it is not AdamW alone."""
    from tightfit.profiles.schema import MOBILLM

    if plan.model.is_bare_graph:
        return f"a bare graph of {len(plan.programs[0].operators)} operators; budgets are on the bytes that are live"
    shape = f"batch {plan.batch}" + (f", sequence {plan.seq}" if plan.seq else "")
    adapted = adapter_words(plan.model.lora) if plan.model.lora and "rank" in plan.model.lora else "all parameters"
    if plan.policy == MOBILLM:
        adapted = "nothing trained here"
    updates = update_words(plan)
    return f"{adapted}, {shape}, {plan.compute_dtype}{f', {updates}' if updates else ''}"


def update_words(plan: Plan) -> str:
    """What updates, where it is not AdamW, and how far gradients are clipped, if they are; in a few words, or none."""
    from tightfit.profiles.schema import OPTIMIZER_STATES

    name, limit = plan.optimizer.get("name", "adamw"), plan.max_grad_norm
    words = [str(name)] if name in OPTIMIZER_STATES and name != "adamw" else []
    return ", ".join(words if limit is None else [*words, f"gradients clipped to a norm of {limit:g}"])


def unfinished_update(steps: int, accumulate: int) -> str | None:
    """Why a run of so many steps is refused where an update takes `accumulate`; None where it is not."""
    surplus = steps % accumulate
    if not surplus:
        return None
    nearest = steps - surplus or accumulate
    return f"an update takes {accumulate} steps, as profiled; give a multiple, for example {nearest}"


def _phase(phase: Phase | None) -> dict[str, Any] | None:
    if phase is None:
        return None
    figures: dict[str, Any] = {name: getattr(phase, name) for name in PHASE_FIELDS}
    return figures | {
        "instructions": len(phase.instructions),
        "peak": {"text": phase.peak.text, "tensors": phase.peak.tensors},
    }
