"""What jobs read of what is stored: a profile, a run's adapter, data that were uploaded."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

from tightfit.planner.service.jobs.orders import JobOrder
from tightfit.planner.service.wire.errors import failing_disk
from tightfit.planner.service.wire.inputs import uploaded
from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.profiles.io import parse_profile
from tightfit.profiles.schema import Profile
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


def profile_of(order: JobOrder) -> Profile:
    """The profile that the order's request names."""
    identity = order.request["profile"]
    return parse_profile(order.content(identity), f"the stored profile {identity}")


def adapter_of(order: JobOrder, folder: Path) -> Path:
    """The adapter of the run that the order names, unpacked in `folder`."""
    with tarfile.open(fileobj=io.BytesIO(order.content(order.request["run"]))) as archive:
        extract(archive, folder)
    return folder / "adapter"


def extract(archive: tarfile.TarFile, folder: Path) -> None:
    """Unpack an archive that a service has written. Python before 3.11.4, as Debian 12 has it, knows no filters."""
    filters: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    archive.extractall(folder, **filters)  # noqa: S202
