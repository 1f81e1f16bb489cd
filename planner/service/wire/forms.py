"""What the page's forms are made of: the fields of the requests that they send, as the API's description has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from tightfit.planner.service.wire.requests import ProfileRequest, RunRequest, StepRequest

REQUESTS: dict[str, type[BaseModel]] = {
    "profile": ProfileRequest,
    "step": StepRequest,
    "run": RunRequest,
}
"""form -> the request that it sends, or the part of it that the form asks for"""
KINDS = {"boolean": "switch", "integer": "whole", "number": "number", "array": "list", "object": "map"}
"""type in a JSON schema -> kind of a field; any other is text"""


def forms() -> dict[str, list[dict[str, Any]]]:
    """The fields of each form, in order: `name`, `title`, `description`, `kind` and `default`; with `choices`, the only
    values there are; with `least`, `most` and `above`, the limits of a number; with `of`, the kind of a map's values.
    """
    return {
        form: [
            _field(name, described)
            for name, described in request.model_json_schema()["properties"].items()
            if "$ref" not in json.dumps(described)  # what is read from a file, and not entered
        ]
        for form, request in REQUESTS.items()
    }


def _field(name: str, described: Mapping[str, Any]) -> dict[str, Any]:
    types = [schema for schema in described.get("anyOf", [described]) if schema.get("type") != "null"]
    # What may be a number or a text is entered as text.
    typed: Mapping[str, Any] = types[0] if len(types) == 1 else {"type": "string"}
    field: dict[str, Any] = {
        "name": name,
        "title": _title(name, described["title"]),
        "description": described.get("description", ""),
        "kind": "choice" if "enum" in typed else KINDS.get(typed["type"], "text"),
        "default": described.get("default"),
    }
    if "enum" in typed:
        field["choices"] = typed["enum"]
    for key, limit in (("minimum", "least"), ("maximum", "most"), ("exclusiveMinimum", "above")):
        if key in typed:
            field[limit] = typed[key]
    if field["kind"] == "map":
        values: Any = typed.get("additionalProperties") or next(iter(typed["patternProperties"].values()))
        # Values that may be anything are described by `true`.
        field["of"] = "text" if values is True else KINDS.get(values["type"], "text")
    return field


def _title(name: str, title: str) -> str:
    """A field's name for people: the one that was given to it, or its own name in words."""
    own = name.replace("_", " ")
    return own.capitalize() if title == own.title() else title
