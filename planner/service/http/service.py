"""What the routes work with, opened over a data folder."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tightfit.planner.service.http.uploads import Uploads
from tightfit.planner.service.http.views import Views
from tightfit.planner.service.jobs.store import JobStore
from tightfit.planner.service.jobs.supervisor import Supervisor
from tightfit.planner.service.wire.events import Events
from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.planner.service.wire.redaction import Redaction
from tightfit.planner.service.wire.settings import Settings
from tightfit.runtime.common.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the routes work with (``request.app.state.service``)."""

    settings: Settings
    store: JobStore
    objects: ObjectStore
    events: Events
    redaction: Redaction
    supervisor: Supervisor
    uploads: Uploads
    views: Views


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[Service]:
    """The data folder, open for this service alone, with what was left unfinished there put back into the queue.

    Raises InputError where another service has it, or where it cannot be read, and StorageError where its disk is full.
    """
    redaction = Redaction(settings.folders)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_lock(settings.data_dir))
        objects = ObjectStore(settings.data_dir / "objects")
        store = JobStore(settings.data_dir / "service.sqlite", objects)
        stack.callback(store.close)
        events = Events(redaction.job)
        supervisor = Supervisor(settings, store, objects, events)
        supervisor.recover()
        yield Service(
            settings=settings,
            store=store,
            objects=objects,
            events=events,
            redaction=redaction,
            supervisor=supervisor,
            uploads=Uploads(settings, store, objects, supervisor.processes),
            views=Views(settings, store, objects, supervisor.processes),
        )


def _lock(folder: Path) -> IO[bytes]:
    """Lock the data folder for this service, as long as the returned file is open."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (folder / "lock").open("wb")
    except OSError as error:
        raise InputError(f"--data-dir {folder}: {error.strerror}; name a folder that can be written") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InputError(f"--data-dir {folder}: another service is using it; end it, or name another folder") from error
    return file
