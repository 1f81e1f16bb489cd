"""The requests of the HTTP API. Sizes are bytes, times seconds.

Apart from the answers, since a client, which is to be small, sends dictionaries and holds no such models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, cast, get_args, get_origin

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic.fields import FieldInfo

from tightfit.planner.generation.choice import ChoiceProblem
from tightfit.planner.search_options import SOLVER, TIME_LIMIT, PlanOptions, Seconds
from tightfit.planner.service.wire.schema import DIGEST, JOB, OWN_DEVICE, Digest, JobId, RequestBody
from tightfit.profiles.option_fields import OVER_HTTP, Options, extras, options_of, types_of
from tightfit.profiles.options import LONGEST_PATH, ProfileOptions
from tightfit.profiles.sources.file_header import FileHeader
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.units import LARGEST, parse_size
from tightfit.runtime.session.options import DataOptions, RunOptions

LONGEST_PROMPT = 1 << 15
"""letters of a prompt, or of one message"""

MOST_PROBLEMS = 64
"""problems of one request: numbers of tokens in which a prompt may pass, each twice the one before"""
IN_MEMORY = {"allowed": True, "held_bytes": 2359296, "token_seconds": 0.0004, "group_seconds": 0.0021}
CHOICE: dict[str, Any] = {
    "kinds": [
        {
            "number": 96,
            "head": False,
            "packed_bytes": 2359296,
            "packed": IN_MEMORY,
            "unpacked": IN_MEMORY | {"allowed": False, "held_bytes": 16777216},
            "streamed": IN_MEMORY | {"held_bytes": 0, "token_seconds": 0.0006},
        }
    ],
    "room_bytes": 104857600,
    "prompt_passes": 1,
    "groups": 2,
    "token_passes": 256,
    "token_seconds": 0.02,
    "group_seconds": 0.05,
    "read_seconds_per_byte": 1e-9,
}
"""a `tightfit.planner.generation.choice.ChoiceProblem`"""


def _read(parse: Callable[[str], float], allowed: Callable[[float], bool], words: str) -> BeforeValidator:
    """Reads a number, or a text by `parse`. Refuses a number that is not `allowed`, and true and false, which Python
    counts as numbers: `words` say what they are not, and what to send.
    """

    def read(value: object) -> object:
        if isinstance(value, str):
            try:
                return parse(value)
            except InputError as error:
                raise ValueError(str(error)) from error
        if isinstance(value, bool) or (isinstance(value, int | float) and not allowed(value)):
            raise ValueError(f"{json.dumps(value)} is no {words}")
        return value

    return BeforeValidator(read)


def _sent_as(kind: str, **described: Any) -> WithJsonSchema:
    """How the API's description has a number that may be given as text."""
    return WithJsonSchema({"anyOf": [{"type": kind}, {"type": "string"}], **described})


Memory = Annotated[
    int,
    _read(parse_size, lambda size: 0 < size <= LARGEST, "budget; write bytes above 0, or a size such as 600MiB"),
    _sent_as(
        "integer",
        description="budget of the whole run, its supervisor included: bytes, or a size such as 600MiB or 600MB",
        examples=["600MiB", 629145600],
    ),
]


def _with_options(record: type[Options], *leaving_out: str, base: type[RequestBody] = RequestBody) -> Any:
    """A request with the fields of `base` and, after them, the options of a record; without those of the names given
    here.
    """
    fields = {name: _field(name, field) for name, field in options_of(record).items() if name not in leaving_out}
    return create_model(f"{base.__name__}With{record.__name__}", __base__=base, **cast("Any", fields))


def _field(name: str, option: FieldInfo) -> tuple[Any, Any]:
    """The type of an option, and what else is said of it, as a field of a request: what no JSON can be is left out."""
    kinds = get_args(option.annotation) if get_origin(option.annotation) in (Union, UnionType) else (option.annotation,)
    sent: Any = Union.__getitem__(tuple(kind for kind in kinds if types_of(kind) not in ((Path,), (Iterable[Any],))))
    described = Field(
        title=option.title or name.replace("_", " ").capitalize(),
        description=extras(option)[OVER_HTTP],
        json_schema_extra=None,
    )
    annotated: Any = Annotated
    return annotated[(sent, *option.metadata, described)], option.default


class StepRequest(_with_options(PlanOptions, "policy")):  # type: ignore[misc]
    """What plans and comparisons are asked of a step."""

    time_limit: Annotated[Seconds, *_field("time_limit", PlanOptions.model_fields["time_limit"])[0].__metadata__] = (
        TIME_LIMIT
    )


class ModelRequest(RequestBody):
    path: str | None = Field(
        None,
        max_length=LONGEST_PATH,
        description="a Hugging Face folder, GGUF file or config.json under an allowed root",
    )
    hub: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}$",
        description="a hub id; refused unless the service was started with --hub",
    )
    config: dict[str, Any] | None = Field(
        None, description="a config.json as it is, of any dense decoder of transformers; the weights are random then"
    )

    header: FileHeader | None = Field(
        None,
        description=(
            "what the header of a GGUF or safetensors file says, for whoever keeps the file: as a config, with the"
            " file's precision"
        ),
    )

    @model_validator(mode="after")
    def one_source(self) -> Self:
        if sum(value is not None for value in (self.path, self.hub, self.config, self.header)) != 1:
            raise ValueError("give exactly one of path, hub, config and header")
        return self


class ProfileRequest(_with_options(ProfileOptions, base=ModelRequest)):  # type: ignore[misc]
    """Make a profile on this machine. Exactly one of `path`, `hub`, `config` and `header` names the model."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"path": "SmolLM2-135M-Instruct.Q4_1.gguf", "seq": 64, "batch": 16}],
        }
    )


class TracingRequest(RequestBody):
    """Trace a model from its description: its name and configuration, which were uploaded."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"description": DIGEST}]})

    description: Digest = Field(description="`id` of what `/v1/uploads/description` has answered")


class PlanRequest(StepRequest):
    model_config = ConfigDict(json_schema_extra={"examples": [{"profile": DIGEST, "memory": "600MiB"}]})

    profile: Digest
    memory: Memory
    policy: str = Field(SOLVER, max_length=64, description="solver, or a fixed rule", examples=["solver", "mebp"])


class ComparisonRequest(StepRequest):
    """Every policy at every budget on every device."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"profile": DIGEST, "memory": ["400MiB", "1GiB"], "policies": ["solver", "mebp"]}]
        }
    )

    profile: Digest
    memory: list[Memory] = Field(min_length=1, max_length=64)
    policies: list[str] = Field([SOLVER], min_length=1, max_length=32)
    devices: list[str] = Field(
        [OWN_DEVICE],
        min_length=1,
        max_length=8,
        description=(
            "own: the profile's; others are listed at /v1/devices, their times are estimated from FLOPs and bytes"
        ),
    )


class AnswerPlanRequest(RequestBody):
    """What of a model's weights is to stay in memory between the tokens of answers: a problem for each number of tokens
    in which a prompt may pass. It holds sizes and seconds alone.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [{"problems": [CHOICE]}]})

    problems: list[ChoiceProblem] = Field(min_length=1, max_length=MOST_PROBLEMS)


class NameRequest(RequestBody):
    """What a person calls something that is kept, and says of it. What is left out stays as it is, null takes it
    away.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [{"title": "reviews, third try", "note": None}]})

    title: (
        Annotated[
            str,
            StringConstraints(strip_whitespace=True, min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$"),
        ]
        | None
    ) = Field(None, description="one line")
    note: Annotated[str, StringConstraints(max_length=10_000)] | None = Field(None, description="any text")


class PreviewRequest(_with_options(DataOptions)):  # type: ignore[misc]
    """Read data as a run of a plan of the profile would."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"profile": DIGEST, "data": f"upload:{DIGEST}", "truncate": True}]}
    )

    profile: Digest
    data: str = Field(
        min_length=1,
        max_length=LONGEST_PATH,
        description="a file or folder of samples under an allowed root, or upload: and the id of an upload",
    )


class PromptMessage(RequestBody):
    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=LONGEST_PROMPT)


class AnswerRequest(RequestBody):
    """Ask a model that was measured here, by itself or with the adapter that a run has left. The likeliest tokens are
    taken.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"profile": DIGEST, "run": JOB, "prompt": "How was the film?", "max_tokens": 64}]
        }
    )

    profile: Digest
    run: JobId | None = Field(None, description="whose adapter is applied; null: the model by itself")
    prompt: (
        Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT)]
        | Annotated[list[PromptMessage], Field(min_length=1, max_length=64)]
    ) = Field(description="a text, or the messages of a conversation so far")
    max_tokens: int = Field(256, ge=1, le=4096, description="most tokens of the answer")
    template: bool = Field(True, description="put a text into the model's chat template, if it has one")
    memory: Memory | None = Field(None, description="budget of all processes; null: what the machine can spare")


class MergeRequest(RequestBody):
    """Add a run's adapter to its model."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"run": JOB, "format": "gguf"}]})

    run: JobId
    format: Literal["gguf", "safetensors"] = Field(
        "gguf", description="gguf: a file for llama.cpp; safetensors: a tar file of a Hugging Face folder"
    )


class RunRequest(_with_options(RunOptions)):  # type: ignore[misc]
    """Train on this machine as planned."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"plan": DIGEST, "data": "random", "steps": 20}]})

    plan: Digest
    data: str = Field(
        min_length=1,
        max_length=LONGEST_PATH,
        description="random, a file or folder of samples under an allowed root, or upload: and the id of an upload",
    )
