"""The job that makes a bundle of a model for a device which has too little memory to trace it: from its configuration,
without weights.
"""

from __future__ import annotations

from pathlib import Path

from tightfit.planner.service.jobs.orders import EventWriter, JobOrder
from tightfit.planner.service.jobs.store import Row, file_row
from tightfit.planner.service.wire.bundles import parse_request
from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.profiles.steps.tracing_process import make_bundle


def do(order: JobOrder, events: EventWriter) -> Row:
    """Make a bundle of the model that the order names."""
    request = parse_request(order.content(order.request["description"]))
    made = make_bundle(
        request, lambda stage, done, total: events.progress(stage=f"tracing, {stage}", done=done, total=total)
    )
    written = ObjectStore(Path(order.objects)).put(made.json().encode())
    step = made.step
    summary = {
        "model": request.name,
        "batch": step.batch,
        "seq": step.seq,
        "layers": len(step.layers),
        "tensors": len(step.tensors),
        "answers": made.answers.refused is None,
    }
    file = file_row("bundle", written.digest, written, name=request.name, summary=summary)
    return {"result": {"bundle": file["id"], "summary": summary}, "files": [file]}
