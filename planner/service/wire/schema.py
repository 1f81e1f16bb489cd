"""The answers of the HTTP API, and what requests and answers have in common. Sizes are bytes, times seconds, moments
seconds since 1970 (UTC).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tightfit.planner.service.wire.errors import Code
from tightfit.profiles.schema import PROFILE_VERSION
from tightfit.runtime.common.strict_json import is_deeper

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled", "interrupted"]
FINISHED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled", "interrupted"})

DEEPEST = 64
"""levels of objects and lists nested in one another that may be sent: Python could neither walk nor write much deeper
JSON
"""
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
    "label": "SmolLM2-135M in 600.0 MiB",
    "title": "the phone's budget",
    "note": None,
    "request": {"profile": DIGEST, "memory": 629145600, "policy": "solver", "time_limit": 30.0},
    "progress": None,
    "result": {"plan": DIGEST, "summary": {"status": "optimal", "step_seconds": 2.65, "peak_bytes": 628097024}},
    "error": None,
}
DESCRIPTION = {
    "name": "SmolLM2-135M",
    "config": {"model_type": "llama", "hidden_size": 576},
    "options": {"seq": 64, "lora_rank": 8},
}
"""some of a `tightfit.profiles.sources.bundle.BundleRequest`"""
KEPT = {"id": DIGEST, "created": 1790000000.0, "bytes": 131072, "title": None, "note": "measured while idle"}
STORED_PLAN = KEPT | {
    "label": "SmolLM2-135M in 600.0 MiB",
    "summary": {"status": "optimal", "step_seconds": 2.65},
    "name": "SmolLM2-135M, solver",
    "profile": DIGEST,
}
CPU = {
    "name": "cpu",
    "label": "the service's machine",
    "kind": "cpu",
    "threads": 2,
    "memory_bytes": 25769803776,
    "local": True,
    "spare_bytes": 6442450944,
    "spare_why": "7.1 GiB are available, less 0.9 GiB that stay free",
}
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$", examples=[DIGEST])]
JobId = Annotated[str, Field(pattern="^job-[0-9a-f]{16}$", examples=[JOB])]


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


class Named(ResponseBody):
    """What is kept, and what it is called."""

    label: str = Field(description="what it is, in a few words: of a run model, data and budget")
    title: str | None = Field(None, description="what a person calls it")
    note: str | None = Field(None, description="what a person says of it")


class ServiceJob(Named):
    """Work that takes a while. Follow `/v1/jobs/{id}/events`, or ask again."""

    model_config = example_of(**PLAN_JOB)

    id: JobId
    kind: str = Field(examples=["plan"])
    state: JobState
    created: float
    started: float | None = None
    finished: float | None = None
    attempts: int
    request: dict[str, Any]
    progress: dict[str, Any] | None = Field(
        None,
        description=(
            "solving: stage, incumbent, bound, gap, seconds; running: step, loss, resident_bytes, peak_bytes, and as"
            " `clock` when the stage began, what the first evaluation took, and how many cores other programs use;"
            " answering: text"
        ),
    )
    result: dict[str, Any] | None = Field(
        None,
        description=(
            "profile: {profile}; bundle: {bundle, summary}; plan: {plan, summary}; comparison: {cells}; answer-plan:"
            " {choices}; run: {report}; preview: {samples, refused, counted, refused_count, cut, whole, longest, seq,"
            " padding_share, epoch_steps, evaluation_batches, longer, can_pack}, where `longer` says how many samples"
            " are longer than common lengths, and a sample has its line, pieces {text, trained}, tokens and how many of"
            " them are cut; answer: {text, tokens, seconds, first_seconds, end, peak_bytes, budget_bytes}; merge:"
            " {merged: {format, adapted, seconds, note, bytes}}"
        ),
    )
    error: Error | None = None


SetAside = Annotated[
    list[str],
    Field(description="what is stored and could not be read: files of the folder set-aside/ of the service's data"),
]


class StoredFile(Named):
    """What the service keeps besides jobs. The id is of its content, of a plan of what it was made of."""

    model_config = example_of(**STORED_PLAN)

    id: Digest
    name: str = Field(description="of a model, or of a file of samples")
    created: float
    bytes: int = Field(description="of the file")
    summary: dict[str, Any]
    origin: Literal["made", "uploaded", "example"] | None = Field(
        None,
        description=(
            "of a profile. made: measured on this machine, so that its plans can be run; example: came with the service"
        ),
    )
    profile: Digest | None = Field(None, description="of a plan: what it was made from")


class Listed(ResponseBody):
    """Some of what there is, newest first."""

    model_config = example_of(items=[STORED_PLAN], next="1790000000.0_" + DIGEST)

    items: list[StoredFile | ServiceJob]
    next: str | None = Field(None, description="`after` of the request for those that follow; null: there are no more")
    set_aside: SetAside = []


class DeviceAnswer(ResponseBody):
    name: str
    label: str
    kind: str
    threads: int
    memory_bytes: int = Field(description="all that it has")
    local: bool = Field(description="whether it is this machine's: runs go there; others can be planned for")
    spare_bytes: int | None = Field(
        None, description="what a run there may take now, a margin left free; null: of another machine, or nothing"
    )
    spare_why: str | None = Field(None, description="where that figure comes from, or why there is none, in words")


class DeviceList(ResponseBody):
    model_config = example_of(devices=[CPU])

    devices: list[DeviceAnswer]


class RunMetrics(ResponseBody):
    """Every step so far, and where it evaluates between its steps every evaluation; the one before the first step has
    step 0.
    """

    model_config = example_of(
        budget_bytes=367001600,
        places_per_step=1024,
        evaluations=[{"step": 1, "eval_loss": 3.1, "eval_seconds": 4.2, "best": True}],
        steps=[{"step": 1, "loss": 3.2, "seconds": 2.89, "resident_bytes": 363000000, "peak_bytes": 363646976}],
    )

    budget_bytes: int | None = Field(description="null: the plan is gone, and the run has not come to its end")
    places_per_step: int | None = Field(
        None, description="tokens for which a step's rows have room, padding included; null: not a language model's"
    )
    evaluations: list[dict[str, float | bool]] = Field(
        [], description="step, epoch, time, eval_loss, eval_accuracy where the data are questions, eval_seconds, best"
    )
    steps: list[dict[str, float]] = Field(
        description=(
            "step, loss, lr, epoch, time, seconds, resident_bytes, peak_bytes, and of a language model tokens, padding"
            " left out"
        )
    )


class Health(ResponseBody):
    model_config = example_of(status="ok", version="0.1.0", profile_version=PROFILE_VERSION, schema_version=1)

    status: Literal["ok"]
    version: str
    profile_version: int = Field(description="of profiles and traced steps: devices that ask for them have to read it")
    schema_version: int
    set_aside: SetAside = []
