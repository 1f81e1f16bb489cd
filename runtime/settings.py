"""What the lean process is told beside the plan, and what its parent is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from planner.schema import Plan
from profiles import cold, cuda_stubs
from runtime import adapter
from runtime.admission import conditions
from runtime.checkpoint import writing_to
from runtime.job import Job
from runtime.lean_process import Order
from runtime.optimizer import OPTIMIZERS
from runtime.process import child_environment
from runtime.report import planned_figures


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


def order_of(
    plan: Plan, job: Job, directory: Path, lock: int, *, cgroup: bool, finished: dict[str, Any] | None = None
) -> Order:
    """What the training process of `job` is started with; the job is written into `directory`, which `lock` keeps others out of."""
    floor = plan.device.floor
    uncounted = {} if floor.tables_on_disk else {cold.VARIABLE: ""}
    uncounted |= {} if floor.cuda_stubs else {cuda_stubs.VARIABLE: ""}
    order = Order(
        directory=str(directory),
        lock=lock,
        environment=child_environment(plan.device.threads) | uncounted,
        planned=planned_figures(plan),
        cgroup=cgroup,
        finished=finished,
    )
    with writing_to(directory):
        job.write(order.job)
    return order
