"""What the lean process is told beside the plan."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from planner.schema import Plan
from runtime import adapter
from runtime.admission import conditions
from runtime.optimizer import OPTIMIZERS


def settings_of(
    plan: Plan,
    directory: Path,
    store: Path | None,
    *,
    seed: int,
    resume: bool,
    lr: float,
    weight_decay: float,
    checkpoint_every: int,
    keep_checkpoints: int,
    schedule: str = "constant",
    warmup_steps: int = 0,
    steps: int | None = None,
    data: str | None = None,
    evaluation: str | None = None,
    requests: int | None = None,
    profile_step: bool = False,
) -> dict[str, Any]:
    """Of a run in `directory`: through `steps` batches of the file `data` in its folder, or as `requests` ask."""
    optimizer = asdict(
        OPTIMIZERS[plan.optimizer.get("name", "adamw")](
            lr=lr,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup_steps=warmup_steps,
            total_steps=0 if schedule == "constant" or steps is None else steps,
        )
    )
    return {
        "store": str(store) if store else None,
        "data": str(directory / "data" / data) if data else None,
        "evaluation": str(directory / "data" / evaluation) if evaluation else None,
        "requests": requests,
        "out": str(directory),
        "steps": steps,
        "seed": seed,
        "resume": resume,
        "checkpoint_every": checkpoint_every,
        "keep_checkpoints": keep_checkpoints,
        "optimizer": optimizer,
        "base_model": plan.model.source,
        "state_dict": plan.model.config.get("state_dict"),
        "adapter_body": plan.model.config.get("adapter_body", adapter.BODY),
        "expected_seconds": plan.step_seconds,
        "profile_step": profile_step,
        "conditions": conditions(plan, optimizer, seed),
    }
