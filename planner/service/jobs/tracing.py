"""The job that traces a model for a device which has too little memory for that: from a description, without weights."""

from __future__ import annotations

from pathlib import Path

from tightfit.planner.service.jobs.orders import EventWriter, JobOrder
from tightfit.planner.service.jobs.store import Row, file_row
from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.planner.service.wire.traces import parse_request
from tightfit.profiles.sources.prepared import PreparedModel, prepared_json
from tightfit.profiles.steps.tracing_process import trace_requested


def trace(order: JobOrder, events: EventWriter) -> Row:
    """Trace the step of a model that the order names; what is made of it is a `tightfit.profiles.sources.prepared.PreparedModel`."""
    request = parse_request(order.content(order.request["description"]))
    step = trace_requested(
        request, lambda stage, done, total: events.progress(stage=f"tracing, {stage}", done=done, total=total)
    )
    prepared = PreparedModel(request=request, step=step, weights="elsewhere")
    written = ObjectStore(Path(order.objects)).put(prepared_json(prepared).encode())
    summary = {
        "model": step.model.name,
        "batch": step.batch,
        "seq": step.seq,
        "layers": len(step.layers),
        "tensors": len(step.tensors),
    }
    file = file_row("prepared", written.digest, written, name=step.model.name, summary=summary)
    return {"result": {"trace": file["id"], "summary": summary}, "files": [file]}
