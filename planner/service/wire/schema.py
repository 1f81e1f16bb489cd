"""The requests and answers of the HTTP API. Sizes are bytes, times seconds, moments seconds since 1970 (UTC)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, cast, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, create_model, model_validator
from pydantic.fields import FieldInfo

from tightfit.planner.fleet.options import FleetOptions
from tightfit.planner.fleet.schema import NAME
from tightfit.planner.search_options import SOLVER, PlanOptions
from tightfit.planner.service.wire.errors import Code
from tightfit.profiles.option_fields import OVER_HTTP, Options, extras, options_of, types_of
from tightfit.profiles.options import LONGEST_PATH, MOST_ACCUMULATED, ProfileOptions
from tightfit.profiles.schema import PROFILE_VERSION
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.strict_json import is_deeper
from tightfit.runtime.common.units import LARGEST, parse_rate, parse_seconds, parse_size
from tightfit.runtime.session.options import RunOptions

JobKind = Literal["profile", "trace", "plan", "comparison", "fleet", "run"]
JobState = Literal["queued", "running", "succeeded", "failed", "cancelled", "interrupted"]
FINISHED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled", "interrupted"})

DEEPEST = 64
"""levels of objects and lists nested in one another that may be sent: Python could neither walk nor write much deeper JSON"""
OWN_DEVICE = "own"
"""in a comparison: the device that the profile was made for"""
DIGEST = "3f1c0e9d" * 8
JOB = "job-0123456789abcdef"


def example_of(**example: Any) -> ConfigDict:
    """An answer's configuration, with an example of it."""
    return ConfigDict(json_schema_extra={"examples": [example]})


PLAN_JOB = {
    "id": JOB,
    "kind": "plan",
    "state": "succeeded",
    "created": 1790000000.0,
    "started": 1790000000.1,
    "finished": 1790000004.2,
    "attempts": 1,
    "request": {"profile": DIGEST, "memory": 629145600, "policy": "solver", "time_limit": 30.0},
    "progress": None,
    "result": {"plan": DIGEST, "summary": {"status": "optimal", "step_seconds": 2.65, "peak_bytes": 628097024}},
    "error": None,
}
DESCRIPTION = {
    "source": {
        "name": "SmolLM2-135M",
        "path": "SmolLM2-135M",
        "config": {"model_type": "llama", "hidden_size": 576},
        "tensors": {"model.norm.weight": {"shape": [576], "format": "float32"}},
    },
    "options": {"seq": 64, "lora_rank": 8},
}
"""some of a `tightfit.profiles.sources.described.TracingRequest`"""
KEPT = {"id": DIGEST, "created": 1790000000.0, "bytes": 131072}
STORED_PROFILE = KEPT | {
    "summary": {"layers": 32, "policies": ["solver", "mebp"]},
    "name": "SmolLM2-135M",
    "origin": "made",
}
STORED_FLEET = KEPT | {
    "summary": {
        "model": "SmolLM2-135M",
        "micro_batches": 16,
        "makespan_seconds": 12.3,
        "members": [{"name": "laptop", "micro_batches": 10, "plan_fingerprint": DIGEST}],
        "plans": {"laptop": DIGEST},
    }
}
STORED_PLAN = KEPT | {"summary": {"status": "optimal", "step_seconds": 2.65}, "profile": DIGEST}
CPU = {
    "name": "cpu",
    "label": "the service's machine",
    "kind": "cpu",
    "threads": 2,
    "local": True,
    "running": JOB,
    "waiting": 0,
}
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$", examples=[DIGEST])]
JobId = Annotated[str, Field(pattern="^job-[0-9a-f]{16}$", examples=[JOB])]


def _read(parse: Callable[[str], float], allowed: Callable[[float], bool], words: str) -> BeforeValidator:
    """Reads a number, or a text by `parse`. Refuses a number that is not `allowed`, and true and false, which Python counts as
    numbers: `words` say what they are not, and what to send.
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
Rate = Annotated[
    float,
    _read(parse_rate, lambda rate: 0 < rate <= LARGEST, "rate; write bytes per second above 0, or 100Mbit/s"),
    _sent_as(
        "number",
        description="bytes per second, or a rate such as 100Mbit/s or 12.5MB/s",
        examples=["100Mbit/s", 12500000],
    ),
]
Latency = Annotated[
    float,
    _read(parse_seconds, lambda seconds: 0 <= seconds <= LARGEST, "time; write seconds from 0 on, or 2ms"),
    _sent_as("number", description="seconds, or a time such as 2ms, one way", examples=["2ms", 0.002]),
]


class RequestBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, data: object) -> object:
        if is_deeper(data, DEEPEST):
            raise ValueError(f"objects and lists more than {DEEPEST} deep in each other; send them flatter")
        return data


class ResponseBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _with_options(record: type[Options], *leaving_out: str, base: type[RequestBody] = RequestBody) -> Any:
    """A request with the fields of `base` and, after them, the options of a record; without those of the names given here."""
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

    @model_validator(mode="after")
    def one_source(self) -> Self:
        if sum(value is not None for value in (self.path, self.hub, self.config)) != 1:
            raise ValueError("give exactly one of path, hub and config")
        return self


class ProfileRequest(_with_options(ProfileOptions, base=ModelRequest)):  # type: ignore[misc]
    """Make a profile on this machine. Exactly one of `path`, `hub` and `config` names the model."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"path": "SmolLM2-135M-Instruct.Q4_1.gguf", "seq": 64, "batch": 16}],
        }
    )


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
        description="own: the profile's; others are listed at /v1/devices, their times are estimated from FLOPs and bytes",
    )


class FleetMember(RequestBody):
    """A device of a fleet: `link` is its connection to the network both ways, or `up` and `down` are."""

    name: str = Field(pattern=f"^{NAME.pattern}$", description="files are named after it", examples=["laptop"])
    profile: Digest
    memory: Memory
    link: Rate | None = None
    up: Rate | None = None
    down: Rate | None = None
    latency: Latency = 0.0

    @model_validator(mode="after")
    def one_connection(self) -> FleetMember:
        if (self.link is None) == (self.up is None and self.down is None) or (self.up is None) != (self.down is None):
            raise ValueError("give either link, or up and down")
        return self

    def both_ways(self) -> dict[str, Any]:
        """The member with its link given both ways, as a worker gets it: bytes, bytes per second, seconds."""
        fields = self.model_dump(exclude={"link"})
        return fields if self.link is None else fields | {"up": self.link, "down": self.link}


class FleetRequest(_with_options(FleetOptions)):  # type: ignore[misc]
    """Plan one training step of several devices together: who computes how many micro-batches, or which layers, each by what plan."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "micro_batches": 16,
                    "members": [
                        {"name": "laptop", "profile": DIGEST, "memory": "320MiB", "link": "100Mbit/s"},
                        {"name": "phone", "profile": DIGEST, "memory": "250MiB", "up": "20Mbit/s", "down": "80Mbit/s"},
                    ],
                }
            ]
        }
    )

    micro_batches: int = Field(ge=1, le=MOST_ACCUMULATED, description="of a step, all devices together")
    members: list[FleetMember] = Field(min_length=1, max_length=32)


class RunRequest(_with_options(RunOptions)):  # type: ignore[misc]
    """Train on this machine as planned."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"plan": DIGEST, "data": "random", "steps": 20}]})

    plan: Digest
    data: str = Field(
        min_length=1,
        max_length=LONGEST_PATH,
        description="random, or a file or folder of samples under an allowed root",
    )


class FieldError(ResponseBody):
    field: str = Field(description="where in the request, as in body.memory", examples=["body.memory"])
    message: str


class Error(ResponseBody):
    """Why a request was refused or a job failed."""

    code: Code
    message: str = Field(examples=["'350M' is not a size; write plain bytes (367001600), 350MB or 350MiB"])
    fields: list[FieldError] = []


class ErrorAnswer(ResponseBody):
    error: Error


class ServiceJob(ResponseBody):
    """Work that takes a while. Follow `/v1/jobs/{id}/events`, or ask again."""

    model_config = example_of(**PLAN_JOB)

    id: JobId
    kind: JobKind
    state: JobState
    created: float
    started: float | None = None
    finished: float | None = None
    attempts: int
    request: dict[str, Any]
    progress: dict[str, Any] | None = Field(
        None,
        description="solving: stage, incumbent, bound, gap, seconds; running: step, loss, resident_bytes, peak_bytes",
    )
    result: dict[str, Any] | None = Field(
        None,
        description="profile: {profile}; trace: {trace, summary}; plan: {plan, summary}; comparison: {cells}; fleet: {fleet, plans, why, summary}, where `plans`"
        " are the stored plans by member; run: {report}",
    )
    error: Error | None = None


SetAside = Annotated[
    list[str],
    Field(description="what is stored and could not be read: files of the folder set-aside/ of the service's data"),
]


class JobList(ResponseBody):
    model_config = example_of(jobs=[PLAN_JOB])

    jobs: list[ServiceJob]
    set_aside: SetAside = []


class StoredFile(ResponseBody):
    """A profile, plan or fleet that the service keeps. The id is of what it was made of."""

    id: Digest
    created: float
    bytes: int = Field(description="of the JSON file")
    summary: dict[str, Any]


class StoredProfile(StoredFile):
    model_config = example_of(**STORED_PROFILE)

    name: str
    origin: Literal["made", "uploaded"] = Field(
        description="made: measured on this machine, so that its plans can be run"
    )


class StoredPlan(StoredFile):
    model_config = example_of(**STORED_PLAN)

    profile: Digest | None = Field(None, description="what it was made from")


class StoredFleet(StoredFile):
    """The plan of a fleet; `summary` is all of it but its timeline. Its members' plans are stored ones."""

    model_config = example_of(**STORED_FLEET)


class FleetList(ResponseBody):
    model_config = example_of(fleets=[STORED_FLEET])

    fleets: list[StoredFleet]
    set_aside: SetAside = []


class ProfileList(ResponseBody):
    model_config = example_of(profiles=[STORED_PROFILE])

    profiles: list[StoredProfile]
    set_aside: SetAside = []


class PlanList(ResponseBody):
    model_config = example_of(plans=[STORED_PLAN])

    plans: list[StoredPlan]
    set_aside: SetAside = []


class DeviceAnswer(ResponseBody):
    name: str
    label: str
    kind: str
    threads: int
    local: bool = Field(description="whether it is this machine's: runs go there; others can be planned for")
    running: JobId | None = None
    waiting: int = Field(description="runs and measurements queued for it")


class DeviceList(ResponseBody):
    model_config = example_of(devices=[CPU])

    devices: list[DeviceAnswer]


class RunMetrics(ResponseBody):
    """Every step so far, and where it evaluates between its steps every evaluation; the one before the first step has step 0."""

    model_config = example_of(
        budget_bytes=367001600,
        places_per_step=1024,
        evaluations=[{"step": 1, "eval_loss": 3.1, "eval_seconds": 4.2, "best": True}],
        steps=[{"step": 1, "loss": 3.2, "seconds": 2.89, "resident_bytes": 363000000, "peak_bytes": 363646976}],
    )

    budget_bytes: int
    places_per_step: int | None = Field(
        None, description="tokens for which a step's rows have room, padding included; null: not a language model's"
    )
    evaluations: list[dict[str, float | bool]] = Field(
        [], description="step, epoch, time, eval_loss, eval_accuracy where the data are questions, eval_seconds, best"
    )
    steps: list[dict[str, float]] = Field(
        description="step, loss, lr, epoch, time, seconds, resident_bytes, peak_bytes, and of a language model tokens, padding left out; where the plan has shorter steps also places, padding included, and expected, the seconds planned for that length"
    )


class Health(ResponseBody):
    model_config = example_of(status="ok", version="0.1.0", profile_version=PROFILE_VERSION, schema_version=1)

    status: Literal["ok"]
    version: str
    profile_version: int = Field(description="of profiles and traced steps: devices that ask for them have to read it")
    schema_version: int
    set_aside: SetAside = []
