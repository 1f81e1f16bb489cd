"""Puts data that were uploaded where a job can read them: under their own name, by which their kind is known."""

from __future__ import annotations

from pathlib import Path

from tightfit.planner.service.jobs.orders import JobOrder
from tightfit.planner.service.wire.errors import failing_disk
from tightfit.planner.service.wire.inputs import uploaded
from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.runtime.common.errors import InputError


def placed(order: JobOrder, data: str, folder: Path) -> str:
    """The path of data that a request names, which is that of a copy in `folder` if they were uploaded.

    Raises InputError where they are gone, UnreadableError where they are damaged, and StorageError where the disk is
    full.
    """
    identity = uploaded(data)
    if identity is None:
        return data
    if identity not in order.digests:
        raise InputError(f"the uploaded data {identity} are gone since this was asked for; upload them again")
    path = folder / identity[:16] / order.names[identity]
    with failing_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for chunk in ObjectStore(Path(order.objects)).unpack(order.digests[identity]):
                file.write(chunk)
    return str(path)
