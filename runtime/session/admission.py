"""Checks whether a plan may run here: its invariants, the machine, the installed PyTorch, the weights."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tightfit.planner.report.summary import unfinished_update
from tightfit.planner.schema import Plan
from tightfit.profiles.measuring.cpu_load import our_cores
from tightfit.profiles.models.side_shape import CONFIG_KEY
from tightfit.profiles.schema import EXCHANGE, MOBILLM, MODULE_OPERATORS, PROFILE_VERSION, Profile
from tightfit.runtime.common.errors import InfeasibleError, InputError
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.processor import BFLOAT16_PRODUCTS
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.common.units import format_size
from tightfit.runtime.engine.fleet.seat import Seat
from tightfit.runtime.engine.start import cuda_stubs, page_out
from tightfit.runtime.engine.start.lean_torch import installed_version
from tightfit.runtime.engine.training.checkpoint import OPERATORS
from tightfit.runtime.engine.training.job import passes_messages
from tightfit.runtime.engine.weights.layout import packed_bytes, read_header
from tightfit.runtime.session.options import TrainingOptions


def check_kind(plan: object) -> None:
    """Raise InputError if `plan` is not a Plan but, for example, the name of its file."""
    if not isinstance(plan, Plan):
        raise InputError(
            f"{reprlib.repr(plan)} is no plan; give what `tightfit.plan` returns, or `tightfit.load_plan` for a file's"
            " name"
        )


def check_seat(plan: Plan, seat: Seat | None) -> None:
    """Raise InputError for a member's plan of a fleet that is run alone, and for another plan in a fleet."""
    exchanges = plan.optimizer.get("name") == EXCHANGE
    passes = passes_messages(plan.programs)
    if passes and seat is None and (plan.optimizer.get("name") == MOBILLM or CONFIG_KEY in plan.model.config):
        raise InputError(
            f"this plan is one part of {MOBILLM}, a device's or a server's, and the other one has to run beside it;"
            f" plan both with `tightfit fleet plan --kind {MOBILLM}` and run the fleet: `tightfit fleet run`"
        )
    if passes and seat is None:
        raise InputError(
            "this is the plan of one member of a pipeline, which computes some of the layers; run the fleet: `tightfit"
            " fleet run`"
        )
    if exchanges and seat is None:
        raise InputError(
            "this is the plan of one member of a fleet, which makes no update by itself; run the fleet: `tightfit fleet"
            " run`"
        )
    if seat is not None and passes != seat.in_turn:
        planned, needed = (
            ("a pipeline", "a fleet that exchanges gradients") if passes else ("another fleet", "a pipeline")
        )
        raise InputError(
            f"member {seat.members[seat.rank]!r} has a plan that was made for {planned}, not for {needed}; plan the"
            " fleet again"
        )
    if seat is not None and not exchanges and not seat.in_turn:
        raise InputError(
            f"member {seat.members[seat.rank]!r} has a plan that was not made for a fleet; plan the fleet again"
        )


def check_steps(plan: Plan, steps: int) -> None:
    """Raise InputError if so many steps would end in the middle of an update."""
    if unfinished := unfinished_update(steps, plan.accumulate):
        raise InputError(f"{spelled('steps')} {steps}: {unfinished}")


def check_fleet_options(options: TrainingOptions) -> None:
    """Raise InputError for an option that the members of a fleet cannot follow."""
    for name in ("eval_every", "keep_best", "early_stopping"):
        if getattr(options, name):
            raise InputError(
                f"{name} {getattr(options, name)}: the members of a fleet evaluate before and after; leave it out"
            )


def check_machine(plan: Plan | Profile) -> None:
    """Raise InputError for a plan, or a profile, of a bare graph, with estimated times, or for another device, thread
    count or PyTorch.
    """
    if plan.model.is_bare_graph:
        raise InputError(
            f"the plan is of a bare graph ({plan.model.name}), which says how long operators take and not what they"
            " compute; it can be planned, compared and simulated, run a plan of a model that `tightfit profile`"
            " measured"
        )
    device = plan.device
    if device.kind != "cpu":
        raise InputError(
            f"the plan is for a {device.kind} device ({device.name}); this runtime executes plans for cpu, profile this"
            " machine"
        )
    if not device.measured:
        raise InputError(
            f"the plan's times and floor are estimated for {device.name}, not measured on this machine; profile without"
            f" {spelled('device')} here and plan again"
        )
    cores = our_cores()
    if device.threads > cores:
        raise InputError(
            f"the plan uses {device.threads} threads and this process may use {cores}; profile and plan on this machine"
        )
    if device.floor.tables_on_disk and not page_out.library(cache_directory()):
        raise InputError(
            f"the plan counts on a file in {cache_directory()} that holds what PyTorch's start leaves, and none can be"
            " made there (a folder on a disk that takes files is needed, and a C compiler); profile and plan again"
        )
    if device.floor.cuda_stubs and not cuda_stubs.folder(cache_directory()):
        raise InputError(
            f"the plan counts on stubs in {cache_directory()} that are loaded in the place of PyTorch's CUDA libraries,"
            " and none can be made there (a folder is needed that takes files and lets libraries be loaded); profile"
            " and plan again"
        )
    if device.torch_version and device.torch_version != (present_torch := installed_version()):
        raise InputError(
            f"the plan was made with torch {device.torch_version} and torch {present_torch} is installed; profile and"
            " plan again"
        )


def check_evaluation(plan: Plan) -> None:
    """Raise InputError for a module of which an evaluation would not be what it computes in eval mode."""
    if plan.model.other_evaluation:
        raise InputError(
            f"an evaluation of {plan.model.name} would not be what it computes after module.eval(), and is refused:"
            f" {plan.model.other_evaluation}. Train without evaluations, and evaluate the trained module with PyTorch"
        )


def check_schedule(plan: Plan) -> None:
    """Raise InfeasibleError for a plan without a schedule, and simulate the schedule, which raises if it breaks an
    invariant.
    """
    if not plan.fits or plan.train is None:
        raise InfeasibleError(
            f"the plan has no schedule: it is {plan.status} at {format_size(plan.budget_bytes)}"
            + (
                f"; the smallest budget is {format_size(plan.minimum_budget_bytes)}"
                if plan.minimum_budget_bytes
                else ""
            ),
            plan.minimum_budget_bytes,
        )
    from tightfit.planner.simulation.simulate import simulate

    simulate(plan)


def find_store(plan: Plan, stages: Progress | None) -> Path | None:
    """Path of the plan's weight store; for a model without weights it is made now, with random ones.

    Raises InputError if the store is missing or damaged, or holds other weights than the plan was made for.
    """
    if plan.model.store is None:
        from tightfit.profiles.sources.lookup import resolve
        from tightfit.profiles.sources.storing import stored_weights

        model = plan.model
        source = resolve(model.source, base=model.base, embeddings=model.embeddings)
        path = stored_weights(
            source,
            cache_directory() / "stores",
            lambda _, done, total: stages("packing random weights", done, total) if stages else None,
        )
    else:
        path = Path(plan.model.store)
    store = read_header(path)
    if plan.model.store_fingerprint and (fingerprint := store.fingerprint) != plan.model.store_fingerprint:
        raise InputError(
            f"{path} holds other weights than the plan was made for (fingerprint {fingerprint[:12]}, planned"
            f" {plan.model.store_fingerprint[:12]}); profile and plan again"
        )
    for tensor in plan.tensors:
        if tensor.kind == "weight" and (packed := packed_bytes(store.entries, tensor.name)) != tensor.packed_bytes:
            raise InputError(
                f"{path}: {tensor.name} is packed in {packed} bytes and the plan expects {tensor.packed_bytes}; the"
                " plan is for another model, profile and plan again"
            )
    return path


def conditions(plan: Plan, optimizer: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Everything that must be the same for a resumed run to continue bit for bit; budget and schedule may differ."""
    programs = [
        {
            "values": [v.model_dump() for v in p.values],
            "operators": [o.model_dump(exclude={"seconds", "workspace_bytes", "flops"}) for o in p.operators],
        }
        for p in plan.programs
    ]
    graph = [
        programs,
        [layer.model_dump() for layer in plan.layers],
        [[t.name, t.kind, t.shape, t.dtype] for t in plan.tensors],
    ]
    return {
        "model": plan.model.name,
        "weights": plan.model.store_fingerprint,
        "batch": plan.batch,
        "seq": plan.seq,
        "lora": plan.model.lora,
        "loss of pairs": plan.model.preference.model_dump() if plan.model.preference else None,
        "optimizer": dict(optimizer),
        "seed": seed,
        "steps of an update": plan.accumulate if plan.accumulate > 1 else None,
        "largest norm of gradients": plan.max_grad_norm,
        "threads": plan.device.threads,
        "torch": installed_version(),
        "products of bfloat16": BFLOAT16_PRODUCTS,
        "layers without a backward": [phase.skipped for phase in plan.steps] if plan.cycle else None,
        # The first difference is reported. The operators' version stands before the graph, which may differ along with
        # it and whose hash would tell a reader nothing.
        OPERATORS: f"{PROFILE_VERSION}.{MODULE_OPERATORS}" if plan.model.kind == "module" else PROFILE_VERSION,
        "graph": hashlib.sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest(),
    }
