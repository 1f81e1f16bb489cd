"""Reads uploaded profiles, descriptions of models and lists of samples in a worker process, within limits on their
unpacked size and on the graph that they describe.

Each limit is checked before the memory that it limits is used: the size while unpacking, the number of JSON objects and
lists by counting brackets, depth and counts on the parsed JSON. The process's memory limit covers what gets through.
"""

from __future__ import annotations

import codecs
import json
from functools import partial
from pathlib import Path
from typing import Any

from tightfit.planner.problem.step_graph import step_graph
from tightfit.planner.service.jobs.orders import EventWriter, JobOrder
from tightfit.planner.service.jobs.store import Row, file_row, upload_row
from tightfit.planner.service.jobs.work.keeping import keep_profile
from tightfit.planner.service.wire.bundles import canonical_request, parse_request
from tightfit.planner.service.wire.errors import ServiceError, invalid
from tightfit.planner.service.wire.objects import ObjectStore, unpacked
from tightfit.planner.service.wire.schema import DEEPEST
from tightfit.profiles.io import parse_profile
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.strict_json import JsonError, from_json, is_deeper

MOST_CONTAINERS = 3_000_000
"""objects and lists of JSON in one upload"""


def do(order: JobOrder, events: EventWriter) -> Row:
    """Keep what is in the file that the order names."""
    request, objects = order.request, ObjectStore(Path(order.objects))
    with Path(request["path"]).open("rb") as file:
        content = b"".join(unpacked(file, request["encoding"], request["bytes"]))
    _check_containers(content)
    if request["kind"] == "list":
        content, name = _as_lines(content, request["name"])
        row = upload_row(objects.put(content), name)
    elif request["kind"] == "description":
        described = parse_request(content)
        written = objects.put(canonical_request(described))
        row = file_row("description", written.digest, written, name=described.name, summary={})
    else:
        profile = checked_profile(content, steps=request["steps"], tensors=request["tensors"])
        row = keep_profile(objects, profile, origin="example" if request["kind"] == "example" else "uploaded")
    return {"result": {request["kind"]: row["id"]}, "files": [row]}


def _as_lines(content: bytes, name: str) -> tuple[bytes, str]:
    """Samples that are one JSON list as JSON lines, and the name of such a file; others as they are."""
    if not content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return content, name
    try:
        samples = from_json(content)
    except JsonError as error:
        raise ServiceError(422, "invalid_request", f"{name}: not JSON, or cut off ({error})", "body") from error
    # What no text or number can be stays as it is written: who reads the line refuses it.
    return "".join(f"{json.dumps(sample)}\n" for sample in samples).encode(), f"{name[: -len('.json')]}.jsonl"


def _check_containers(content: bytes) -> None:
    containers = content.count(b"{") + content.count(b"[")
    if containers > MOST_CONTAINERS:
        message = f"the upload has {containers} objects and lists; this service reads at most {MOST_CONTAINERS}"
        raise ServiceError(413, "too_large", message, "body")


def checked_profile(content: bytes, *, steps: int, tensors: int) -> Profile:
    """The profile that was uploaded. Raises ServiceError for one that is none, contradicts itself or is too large."""
    try:
        profile = parse_profile(content, "the upload", check=partial(check_size, steps=steps, tensors=tensors))
        step_graph(profile)
    except InputError as error:
        raise ServiceError(422, "invalid_request", str(error), "body") from error
    return profile


def check_size(data: Any, *, steps: int, tensors: int) -> None:
    """Raises ServiceError for JSON that is too deep, or whose graph is too large.

    Layers share programs, so a small file can describe a large graph: counted are the operators and tensors that the
    planner unrolls it to. JSON that does not have a profile's form passes here and is refused where it is read as a
    profile.
    """
    if is_deeper(data, DEEPEST):
        raise invalid("", f"the upload has objects and lists more than {DEEPEST} deep in each other")
    layers, programs = _records(data, "layers"), _records(data, "programs")
    if len(layers) > steps:
        raise invalid("layers", f"the profile has {len(layers)} layers; this service plans at most {steps} operators")
    programs_of_layers = [str(layer.get("program")) for layer in layers]
    for field, word, limit, outside_layers in (
        ("operators", "operators", steps, _length(data, "operators")),
        ("values", "tensors", tensors, _length(data, "tensors")),
    ):
        counts = {str(program.get("name")): _length(program, field) for program in programs}
        unrolled = sum(counts.get(name, 0) for name in programs_of_layers)
        total = outside_layers + max(unrolled, sum(_length(program, field) for program in programs))
        if total > limit:
            raise invalid("layers", f"the profile unrolls to {total} {word}; this service plans at most {limit}")


def _records(data: Any, field: str) -> list[dict[str, Any]]:
    records = data.get(field) if isinstance(data, dict) else None
    return [record for record in records if isinstance(record, dict)] if isinstance(records, list) else []


def _length(data: Any, field: str) -> int:
    records = data.get(field) if isinstance(data, dict) else None
    return len(records) if isinstance(records, list) else 0
