"""What the lean process is told beside the plan, and what its parent is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tightfit.planner.schema import Phase, Plan
from tightfit.runtime.common.run_folder import writing_to
from tightfit.runtime.engine.kernels.optimizer import OPTIMIZERS
from tightfit.runtime.engine.start import cuda_stubs, page_out
from tightfit.runtime.engine.start.process import child_environment
from tightfit.runtime.engine.training import adapter
from tightfit.runtime.engine.training.job import Job
from tightfit.runtime.session.admission import conditions
from tightfit.runtime.supervision.training_process import RunOrder


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
) -> RunOrder:
    """What the training process of `job` is started with; the job is written into `directory`, which `lock` keeps others out of."""
    floor = plan.device.floor
    uncounted = {} if floor.tables_on_disk else {page_out.VARIABLE: ""}
    uncounted |= {} if floor.cuda_stubs else {cuda_stubs.VARIABLE: ""}
    order = RunOrder(
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


def planned_figures(plan: Plan) -> dict[str, Any]:
    """What a plan says that its run is held against, as JSON."""
    return {
        "budget_bytes": plan.budget_bytes,
        "floor_bytes": plan.floor_bytes,
        "peak_bytes": plan.peak_bytes,
        "supervisor_bytes": plan.device.floor.supervisor_bytes,
        "step_seconds": plan.step_seconds,
        "places_per_step": plan.batch * plan.seq if plan.seq else None,
        "sorts": _sorts(plan),
        "train": _phase(plan.steps, plan.device.floor.supervisor_bytes),
        "evaluate": _phase([plan.evaluate] if plan.evaluate else [], plan.device.floor.supervisor_bytes),
        "policy": plan.policy,
        "plan_fingerprint": plan.fingerprint,
    }


def _sorts(plan: Plan) -> list[int]:
    """Which sort each step is of, over a cycle or the steps of an update, of which only the last one moves trained tensors."""
    return list(range(len(plan.steps))) if plan.accumulate == 1 else [0] * (plan.accumulate - 1) + [1]


def _phase(steps: Sequence[Phase], supervisor_bytes: int) -> dict[str, Any]:
    """Of the schedules that run in turn: the largest predicted peak of the training process by itself, and means of the rest."""
    if not steps:
        return {}

    def mean(name: str) -> float:
        return sum(float(getattr(step, name)) for step in steps) / len(steps)

    names = ("compute_seconds", "recompute_seconds", "unpack_seconds", "stall_seconds")
    return {
        "peak_bytes": max(step.peak_bytes for step in steps) - supervisor_bytes,
        "predicted_seconds": {name.removesuffix("_seconds"): mean(name) for name in names},
        "instructions": round(sum(len(step.instructions) for step in steps) / len(steps)),
        "read_bytes": round(mean("read_bytes")),
        "write_bytes": round(mean("write_bytes")),
    }
