"""Makes what is shown of plans, in a process that does nothing else: of a graph of 10,000 operators that takes a
second.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

from tightfit.planner.io import parse_plan
from tightfit.planner.report.step_columns import step_columns
from tightfit.planner.report.view import difference, plan_view
from tightfit.planner.schema import Plan
from tightfit.planner.service.jobs.orders import EventWriter, JobOrder
from tightfit.planner.service.jobs.store import Row
from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.runtime.common.strict_json import to_json

LEVEL = 4
"""of gzip: as small as is fast"""


def do(order: JobOrder, events: EventWriter) -> Row:
    """Write what the order asks for to the file that it names, as JSON packed with gzip."""
    make = SHOWN[order.request["what"]]
    try:
        shown = make(order)
    except MemoryError:
        _read.cache_clear()  # plans that others have looked at may have taken the room
        shown = make(order)
    Path(order.request["path"]).write_bytes(gzip.compress(to_json(shown).encode(), LEVEL, mtime=0))
    return {"result": {}}


def _plan(order: JobOrder) -> Row:
    (identity,) = order.request["ids"]
    request = order.request
    explanation = request["summary"]["explanation"]
    return plan_view(_parsed(order, identity), identity, explanation, not_runnable=request["not_runnable"])


def _timeline(order: JobOrder) -> Row:
    (identity,) = order.request["ids"]
    return step_columns(_parsed(order, identity))


def _changes(order: JobOrder) -> Row:
    return difference(*(_parsed(order, identity) for identity in order.request["ids"]))


def _parsed(order: JobOrder, identity: str) -> Plan:
    return _read(order.objects, order.digests[identity])


@lru_cache(maxsize=4)
def _read(objects: str, digest: str) -> Plan:
    """A stored plan. Of a large one this takes longer than all that is made of it, and plans that are compared are
    looked at before.
    """
    return parse_plan(ObjectStore(Path(objects)).read(digest), "the stored plan")


SHOWN: Mapping[str, Callable[[JobOrder], Row]] = {
    "plan": _plan,
    "timeline": _timeline,
    "changes": _changes,
}
"""what is asked for -> what makes it"""
