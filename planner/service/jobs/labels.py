"""What jobs and stored files are called where nobody has given them a title: by what they are of, not by when they were
made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from tightfit.planner.search_options import SOLVER
from tightfit.planner.service.wire.inputs import uploaded
from tightfit.runtime.common.units import format_size

Row = Mapping[str, Any]
Stored = Callable[[str, str], Row | None]
"""(kind, id) -> row of a stored file"""
RANDOM = "random"
NAME = "_name_or_path"
"""field in which transformers writes where a config's model comes from"""
LONGEST = 200
"""letters of a model's name"""
MODEL = "a model"
"""one of which nothing is known any more"""


def job_label(kind: str, request: Row, stored: Stored) -> str:
    """Model, data and budget of a job, as far as it has them; `stored` finds what the request names. Holds no path but
    its last part.
    """
    plan = _stored(stored, "plan", request.get("plan"))
    profile = _stored(stored, "profile", request.get("profile") if plan is None else plan["origin"])
    model = (request.get("model") or _source(request)) if profile is None else profile["name"]
    if kind == "profile":
        return ", ".join([model, *_shape(request)])
    memory = request.get("memory") if plan is None else json.loads(plan["summary"]).get("budget_bytes")
    return _sentence(
        model,
        data=_data(request.get("data"), stored),
        # One byte is no budget that anybody has: it asks for the smallest one.
        memory=[size for size in (memory if isinstance(memory, list) else [memory]) if size is not None and size > 1],
        policy=request.get("policy"),
    )


def file_label(file: Row) -> str:
    """What a file's row says that it is of."""
    summary, name = json.loads(file["summary"]), file["name"]
    if file["kind"] == "profile":
        lora = summary.get("lora")
        rank = lora.get("rank") if isinstance(lora, dict) else None  # an uploaded profile may say anything
        return ", ".join([name, *([] if rank is None else [f"LoRA rank {rank}"]), *_shape(summary)])
    if file["kind"] == "plan":
        policy = summary.get("policy")
        return _sentence(name.removesuffix(f", {policy}"), memory=[summary["budget_bytes"]], policy=policy)
    return str(name)


def _sentence(model: str, *, data: str | None = None, memory: Sequence[int] = (), policy: str | None = SOLVER) -> str:
    """Such as "SmolLM2-135M on reviews.jsonl in 350.0 MiB"; the policy is named where it is a fixed rule."""
    words = f"{model} on {data}" if data else model
    if memory:
        words += f" in {format_size(min(memory))}"
    if len(set(memory)) > 1:
        words += f" to {format_size(max(memory))}"
    return words if policy in {None, SOLVER} else f"{words}, {policy}"


def _shape(figures: Row) -> list[str]:
    """What a step takes at once, in words."""
    named = (("batch", figures.get("batch")), ("sequence", figures.get("seq")))
    return [f"{name} {number}" for name, number in named if number is not None]


def _source(request: Row) -> str:
    """The model of a request for a profile: the last part of a path or hub id, or the kind of model that a config
    describes.
    """
    if request.get("source"):
        return PurePath(request["source"]).name or MODEL
    return config_name(request["config"]) if "config" in request else MODEL


def config_name(config: Row) -> str:
    """What a config says that its model is called, or the kind of model that it describes."""
    path = PurePath(_text(config.get(NAME)) or "").name
    name = "".join(letter for letter in path if letter.isprintable())[:LONGEST].strip()
    described = _text(config.get("model_type"))
    return name or (MODEL if described is None else f"{described} of a config")


def _data(data: str | None, stored: Stored) -> str | None:
    """What a run learns from: the name of an upload, a file or a folder."""
    if data is None or data == RANDOM:
        return data and f"{data} data"
    upload = _stored(stored, "upload", uploaded(data))
    return PurePath(data).name if upload is None else str(upload["name"])


def _stored(stored: Stored, kind: str, identity: str | None) -> Row | None:
    return None if identity is None else stored(kind, identity)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
