"""What the service keeps, by the name under which it is listed: files that were made or uploaded, and jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tightfit.planner.service.http.parts import PARTS, Part, whole_file
from tightfit.planner.service.http.service import Service
from tightfit.planner.service.jobs.kinds import KINDS, run_of
from tightfit.planner.service.jobs.store import listed
from tightfit.planner.service.wire.schema import Listed, ServiceJob, StoredFile

Names = Mapping[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Things:
    """A list of what is kept. What looks for one item raises ServiceError 404 where it is not there."""

    kind: str | None = None
    """of files or jobs; None: jobs of all kinds"""
    queries: tuple[str, ...] = ()
    """query fields of requests for it that other lists do not have"""
    parts: Mapping[str, Part] = field(default_factory=dict)
    """what can be downloaded or looked at of an item"""

    def page(self, service: Service, **query: Any) -> Listed:
        """Those that the query asks for, the newest first."""
        raise NotImplementedError

    def get(self, service: Service, identity: str) -> StoredFile | ServiceJob:
        raise NotImplementedError

    def name(self, service: Service, identity: str, names: Names) -> StoredFile | ServiceJob:
        """Give an item another `title` or `note`."""
        raise NotImplementedError

    def delete(self, service: Service, identity: str, **query: Any) -> None:
        """Raises ServiceError 409 where a job that has not ended needs it."""
        raise NotImplementedError


class Files(Things):
    kind: str

    def page(self, service: Service, *, profile: str | None = None, **query: Any) -> Listed:
        rows = service.store.files(self.kind, origin=profile, **query)
        aside = service.store.set_aside(self.kind)
        return Listed(items=[listed(row) for row in rows.items], next=rows.next, set_aside=aside)

    def get(self, service: Service, identity: str) -> StoredFile:
        return listed(service.store.needed(self.kind, identity))

    def name(self, service: Service, identity: str, names: Names) -> StoredFile:
        return listed(service.store.name_file(self.kind, identity, names))

    def delete(self, service: Service, identity: str, **query: Any) -> None:
        service.supervisor.delete_file(self.kind, identity, **query)


class Jobs(Things):
    def page(self, service: Service, **query: Any) -> Listed:
        page = service.store.jobs(**{"kind": self.kind} | query)
        jobs = [service.events.shown(job) for job in page.items]
        return Listed(items=jobs, next=page.next, set_aside=service.store.set_aside("job"))

    def get(self, service: Service, identity: str) -> ServiceJob:
        job = service.store.job(identity) if self.kind is None else run_of(service.store, identity)
        return service.events.shown(job)

    def name(self, service: Service, identity: str, names: Names) -> ServiceJob:
        self.get(service, identity)
        job = service.store.name_job(identity, names)
        service.events.changed(job)
        return service.events.shown(job)

    def delete(self, service: Service, identity: str, **query: Any) -> None:
        self.get(service, identity)
        service.supervisor.delete_job(identity)


QUERIES = {"profiles": ("with_plans",), "plans": ("profile", "asked")}
THINGS: Mapping[str, Things] = {
    **{
        kind.address: Files(
            kind=name,
            queries=QUERIES.get(kind.address, ()),
            parts={"file": partial(whole_file, name), **PARTS.get(kind.address, {})},
        )
        for name, kind in KINDS.items()
        if kind.kept
    },
    "uploads": Files(kind="upload", parts=PARTS["uploads"]),
    "jobs": Jobs(queries=("kind", "state")),
    "runs": Jobs(kind="run", queries=("state",), parts=PARTS["runs"]),
}
"""name of a list -> what is kept there"""
