"""Makes the settings in a job's header, and the order with which the training process is started."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tightfit.planner.problem.device_forward import sent_tensors
from tightfit.planner.schema import Phase, Plan
from tightfit.profiles.models.side_shape import CONFIG_KEY
from tightfit.profiles.schema import EXCHANGE, MOBILLM, POSITIONS, Profile
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.run_folder import writing_to
from tightfit.runtime.engine.fleet.seat import Seat
from tightfit.runtime.engine.kernels.optimizer import OPTIMIZERS
from tightfit.runtime.engine.start import cuda_stubs, page_out
from tightfit.runtime.engine.start.process import child_environment
from tightfit.runtime.engine.training import adapter
from tightfit.runtime.engine.training.checkpoint import PACKING
from tightfit.runtime.engine.training.job import RECEIVE, Job
from tightfit.runtime.session.admission import conditions
from tightfit.runtime.session.beforehand import optimizer_settings
from tightfit.runtime.session.given_adapter import GivenAdapter
from tightfit.runtime.session.options import DataOptions, TrainingOptions
from tightfit.runtime.supervision.training_process import RunOrder


def settings_of(
    plan: Plan,
    directory: Path,
    store: Path | None,
    options: TrainingOptions,
    *,
    resume: bool,
    data: str | None = None,
    evaluation: str | None = None,
    requests: int | None = None,
    traced_steps: Sequence[int] = (),
    seat: Seat | None = None,
    adapter_given: GivenAdapter | None = None,
    epoch_steps: float | None = None,
) -> dict[str, Any]:
    """The settings of a run in `directory`, for the job's header. `seat`: the member of a fleet that runs;
    `adapter_given`: the adapter that training starts from; `epoch_steps`: the steps of an epoch, None where the data
    have no end.

    A run takes `options.steps` steps over the file `data` in the folder's ``data``, and evaluates on `evaluation`
    there; a Session has neither, but a descriptor `requests` from which the training process reads. `traced_steps`:
    numbers, from 1 for the first of this start, of the steps whose instructions are timed one by one
    (`tightfit.runtime.engine.training.step_trace`).
    """
    name = "adamw" if seat else plan.optimizer.get("name", "adamw")
    optimizer = asdict(
        OPTIMIZERS[name](
            lr=options.lr,
            weight_decay=options.weight_decay,
            schedule=options.schedule,
            warmup_steps=options.warmup_steps,
            total_steps=0 if options.schedule == "constant" or options.steps is None else options.steps,
            min_lr_ratio=options.min_lr_ratio,
            **optimizer_settings(name, options),
        )
    )
    return {
        "store": str(store) if store else None,
        "data": str(directory / "data" / data) if data else None,
        "evaluation": str(directory / "data" / evaluation) if evaluation else None,
        "packing": bool(data) and packs(plan, options),
        "requests": requests,
        "out": str(directory),
        "steps": options.steps,
        "epoch_steps": epoch_steps,
        "eval_every": options.eval_every,
        "keep_best": options.keep_best,
        "early_stopping": options.early_stopping,
        "seed": options.seed,
        "resume": resume,
        "checkpoint_every": options.checkpoint_every,
        "keep_checkpoints": options.keep_checkpoints,
        "optimizer": optimizer,
        "base_model": plan.model.config.get("adapter_base", plan.model.source),
        "state_dict": plan.model.config.get("state_dict"),
        "side": side_config(plan),
        "adapter_body": plan.model.config.get("adapter_body", adapter.BODY),
        "expected_seconds": plan.expected_seconds,
        "expected_evaluation_seconds": plan.evaluate.seconds if plan.evaluate else 0.0,
        "preference": plan.model.preference.model_dump() if plan.model.preference else None,
        "traced_steps": list(traced_steps),
        "fleet": asdict(seat) if seat else None,
        "adapter": [str(adapter_given.directory), adapter_given.checksum] if adapter_given else None,
        "conditions": (
            conditions(plan, optimizer, options.seed)
            | {"adapter": adapter_given.fingerprint if adapter_given else None}
            | {PACKING: _asks_for_packing(plan, options)}
        ),
    }


def packs(plan: Plan | Profile, options: DataOptions) -> bool:
    """Whether samples share the rows of batches."""
    return options.packing and any(t.kind == "batch" and t.name == POSITIONS for t in plan.tensors)


def _asks_for_packing(plan: Plan, options: DataOptions) -> bool:
    """Whether packing was asked for and the model allows it: the same for all members of a fleet, even those that read
    no positions.
    """
    return options.packing and plan.model.kind == "decoder" and plan.model.rows_apart is None


def receives_batches(plan: Plan) -> bool:
    """Whether a plan trains a side network, whose batches a device sends."""
    return CONFIG_KEY in plan.model.config


def side_config(plan: Plan) -> dict[str, Any] | None:
    """What is written beside the tensors of a side network, so that they can be used again; None: the plan trains
    none.
    """
    shape = plan.model.config.get(CONFIG_KEY)
    if shape is None:
        return None
    return {
        "what": f"a side network beside {plan.model.name}, trained by {MOBILLM}: no adapter of that model",
        "base_model_name_or_path": plan.model.source,
        "base_model_weights": plan.model.store_fingerprint,
        **shape,
        "dtype": plan.compute_dtype,
        "message_bits": sent_tensors(plan, RECEIVE)[1],
    }


def order_of(
    plan: Plan,
    job: Job,
    directory: Path,
    lock: int,
    *,
    cgroup: bool,
    finished: dict[str, Any] | None = None,
    fleet: dict[str, Any] | None = None,
    evaluates: bool = False,
    packing: dict[str, Any] | None = None,
) -> RunOrder:
    """Write the job into `directory` and return the order to start its training process, which with `evaluates` takes
    no step.

    `lock` is the descriptor that locks `directory`; `fleet` what the report says of the fleet that the run is part of
    (`tightfit.runtime.session.fleet.figures_of`), and `packing` of rows (`packing_note`). Raises RunError if the disk
    refuses.
    """
    floor = plan.device.floor
    unused_files = {} if floor.tables_on_disk else {page_out.VARIABLE: ""}
    unused_files |= {} if floor.cuda_stubs else {cuda_stubs.VARIABLE: ""}
    planned = {**planned_figures(plan), "fleet": fleet, "packing": packing}
    if evaluates and plan.evaluate:
        planned["peak_bytes"] = plan.evaluate.peak_bytes
    order = RunOrder(
        directory=str(directory),
        lock=lock,
        environment=child_environment(plan.device.threads) | unused_files,
        planned=planned,
        cgroup=cgroup,
        steps=job.header["steps"],
        epoch_steps=job.header["epoch_steps"],
        finished=finished,
        evaluates=evaluates,
    )
    with writing_to(directory):
        job.write(order.job)
    return order


def packing_note(plan: Plan, settings: dict[str, Any], options: DataOptions) -> dict[str, Any] | None:
    """For the report: whether samples share rows and, if the model does not allow it, why; None where the data are no
    samples. Warns where samples were to share rows and each is padded.
    """
    if plan.seq is None or not settings["data"]:
        return None
    if options.packing and plan.model.rows_apart:
        warnings.warn(
            f"{spelled('packing')}: samples of {plan.model.name} cannot share rows, since {plan.model.rows_apart}; each"
            f" is padded to {plan.seq} tokens",
            UserWarning,
            stacklevel=2,
        )
    return {"on": settings["packing"], "refused": plan.model.rows_apart}


def planned_figures(plan: Plan) -> dict[str, Any]:
    """The plan's figures with which the report compares the run, in the form of JSON: bytes and seconds."""
    return {
        "budget_bytes": plan.budget_bytes,
        "floor_bytes": plan.floor_bytes,
        "peak_bytes": plan.peak_bytes,
        "supervisor_bytes": plan.device.floor.supervisor_bytes,
        "expected_seconds": plan.expected_seconds,
        "expected_by": plan.expected_from + (" beside other programs" if plan.busy_machine else ""),
        "busy_machine": plan.busy_machine,
        "threads": plan.device.threads,
        "places_per_step": plan.places_per_step,
        "sorts": _sorts(plan),
        "train": _phase(plan.steps, plan.device.floor.supervisor_bytes),
        "evaluate": _phase([plan.evaluate] if plan.evaluate else [], plan.device.floor.supervisor_bytes),
        "update": _phase([plan.update] if plan.update else [], plan.device.floor.supervisor_bytes),
        "update_seconds": plan.update.seconds if plan.update else None,
        "max_grad_norm": plan.max_grad_norm,
        "policy": plan.policy,
        "plan_fingerprint": plan.fingerprint,
        "ignored_state": plan.model.ignored_state,
        "base": {"source": plan.model.source, "rounding": plan.model.rounding},
    }


def _sorts(plan: Plan) -> list[int]:
    """For each step of a cycle the number of its sort: steps of one sort do the same work, so that their seconds can be
    compared.

    In a cycle of several schedules each is a sort. If several steps make an update, the last one, which alone changes
    the trainables, is a sort of its own. The micro-batches of a fleet's member all do the same work.
    """
    if plan.optimizer.get("name") == EXCHANGE:
        return [0]
    return list(range(len(plan.steps))) if plan.accumulate == 1 else [0] * (plan.accumulate - 1) + [1]


def _phase(steps: Sequence[Phase], supervisor_bytes: int) -> dict[str, Any]:
    """Predicted figures of schedules that run in turn: the largest peak of the training process alone, means of the
    others.
    """
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
