"""The job that shows data as a run would read them, with the tokenizer of a model that was measured here."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

from tightfit.planner.service.jobs.orders import EventWriter, JobOrder
from tightfit.planner.service.jobs.store import Row
from tightfit.planner.service.jobs.work.inputs import placed, profile_of
from tightfit.planner.service.wire.redaction import with_paths
from tightfit.profiles.sources.lookup import vocabulary
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.data.preview import preview as read
from tightfit.runtime.session.options import DataOptions
from tightfit.runtime.session.settings import packs


def do(order: JobOrder, events: EventWriter) -> Row:
    """Read the beginning of the data; what was wrong with single lines is part of the result."""
    request, options = order.request, DataOptions.of(order.request)
    profile = profile_of(order)
    if profile.model.kind != "decoder":
        raise InputError(
            f"{profile.model.name} is no language model: it learns from batches of its own, not from samples"
        )
    source = with_paths(profile.model, order.paths).source
    with tempfile.TemporaryDirectory(dir=Path(order.objects) / "tmp", prefix="preview-") as folder:
        shown = read(
            placed(order, request["data"], Path(folder)),
            vocabulary(source),
            profile,
            Path(folder),
            columns=options.columns,
            too_long="truncate" if options.truncate else "refuse",
            packing=packs(profile, options),
            progress=lambda done: events.progress(stage="reading", done=done),
        )
    can_pack = packs(profile, options.but(packing=True))
    return {"result": asdict(shown) | {"can_pack": can_pack}, "files": []}
