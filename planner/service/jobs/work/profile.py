"""The job that measures a model on this machine, alone on its device."""

from __future__ import annotations

import fcntl
from pathlib import Path

from tightfit.planner.report.summary import profile_summary
from tightfit.planner.service.jobs.cache import STORES, CacheFolder
from tightfit.planner.service.jobs.labels import config_name
from tightfit.planner.service.jobs.orders import EventWriter, JobOrder
from tightfit.planner.service.jobs.store import Row
from tightfit.planner.service.jobs.work.keeping import keep_profile
from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.planner.service.wire.redaction import PATHS
from tightfit.profiles.api import profile as measure
from tightfit.profiles.sources.lookup import resolve
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.engine.weights.layout import store_path


def do(order: JobOrder, events: EventWriter) -> Row:
    """Measure a model and store its profile; returns the profile's id, and the files that it and its runs need."""
    assert order.lock is not None
    cache = CacheFolder(cache_directory())
    request = dict(order.request)
    shown = {name: order.redaction().text(value) if name in PATHS else value for name, value in request.items()}
    with Path(order.lock).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if "config" in request:
            request["source"] = str(cache.keep_config(request.pop("config")))
        source_name = request.pop("source")
        measured = measure(
            source_name,
            **request,
            progress=lambda stage, done, total: events.progress(stage=stage, done=done, total=total),
        )
    # A model without weights has a store as soon as one of its plans runs.
    source = resolve(source_name, base=measured.model.base, embeddings=measured.model.embeddings)
    store = measured.model.store or str(store_path(cache.folder / STORES, source.name, source.fingerprint))
    cached = [name for name in map(cache.name, (store, measured.model.source)) if name is not None]
    if "config" in order.request:
        measured = measured.model_copy(
            update={"model": measured.model.model_copy(update={"name": config_name(order.request["config"])})}
        )
    model, paths = order.redaction().model(measured.model)
    redacted = measured.model_copy(update={"model": model})
    file = keep_profile(
        ObjectStore(Path(order.objects)), redacted, origin="made", cached=cached, paths=paths, request=shown
    )
    return {
        "result": {"profile": file["id"], "summary": profile_summary(redacted)},
        "files": [file, *cache.rows(cached)],
    }
