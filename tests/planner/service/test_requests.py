"""The service's requests have what the commands have: every option as a field, checked alike, handed on as it is."""

from __future__ import annotations

import gzip
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.main import get_command

from tightfit.planner.service.http.routes_page import FORMS, _files
from tightfit.planner.service.jobs.orders import JobOrder
from tightfit.planner.service.jobs.work.run import _command
from tightfit.planner.service.wire.forms import forms
from tightfit.planner.service.wire.requests import ComparisonRequest, PlanRequest, ProfileRequest, RunRequest
from tightfit.planner.service.wire.schema import DIGEST
from tightfit.profiles.schema import ANSWER_PLANES, OPTIMIZER_STATES
from tightfit.profiles.steps.step import DTYPES
from tightfit.runtime.cli.compare import compare
from tightfit.runtime.cli.main import app
from tightfit.runtime.cli.options import read as read_options
from tightfit.runtime.cli.plan import plan
from tightfit.runtime.cli.profile import profile
from tightfit.runtime.cli.run import run
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.session.options import TrainingOptions

OF_THE_COMMAND = {
    *(
        "context",
        "output",
        "as_json",
        "debug",
        "server",
        "certificate",
        "html",
        "picture",
        "stages",
        "tokens",
        "held",
        "after",
    ),
}
"""parameters about a command's own files and messages"""
OF_THE_SERVICE = {
    "resume": "POST /v1/runs/{id}/resume",
    "overwrite": "each run has a folder of its own",
    "cgroup": "whoever started the service decides what enforces caps",
    "what_if": "every plan's explanation has it",
    "rehearse": "the service plans; whoever starts runs rehearses",
    "wait": "a service measures in the order that it is asked, beside what it does itself",
    "smaller": "a comparison plans several budgets at once",
    "memory": "of a profile: the service's machine measures with what it has; plans and comparisons have the field",
}
"""parameters that a request does not have, and why"""
CALLED = {"policy": "policies", "device": "devices", "model": "path"}
"""a parameter's name in a request, where it is another one"""


@pytest.mark.parametrize(
    ("command", "request_"),
    [(profile, ProfileRequest), (plan, PlanRequest), (compare, ComparisonRequest), (run, RunRequest)],
)
def test_every_option_of_a_command_is_a_field_of_its_request(command: Any, request_: Any) -> None:
    fields = set(request_.model_fields)
    options = set(inspect.signature(command).parameters) - OF_THE_COMMAND - set(OF_THE_SERVICE)
    missing = {name for name in options if name not in fields and CALLED.get(name) not in fields}
    assert missing == set()


@pytest.mark.parametrize(
    ("form", "name", "known"),
    [("step", "optimizer", OPTIMIZER_STATES), ("profile", "loss", ANSWER_PLANES), ("profile", "dtype", DTYPES)],
)
def test_choices_are_those_that_there_are(form: str, name: str, known: Any) -> None:
    choices = next(one for one in forms()[form] if one["name"] == name)["choices"]
    assert choices == list(known)


@pytest.mark.parametrize(
    ("request_", "field", "value", "taken"),
    [
        (ProfileRequest, "seq", 0, 1 << 20),
        (ProfileRequest, "batch", (1 << 16) + 1, 1),
        (ProfileRequest, "accumulate", (1 << 16) + 1, 1 << 16),
        (ProfileRequest, "lora_alpha", 0, 1e9),
        (ProfileRequest, "lora_alpha", float("inf"), 0.5),
        (ProfileRequest, "lora_dropout", 1, 0),
        (ProfileRequest, "lora_layers", "0-", "0-3,8"),
        (ProfileRequest, "lora_targets", "", "attention"),
        (ProfileRequest, "rank_pattern", {"q_proj": 0}, {"q_proj": 1}),
        (
            ProfileRequest,
            "rank_pattern",
            dict.fromkeys(map(str, range(257)), 1),
            dict.fromkeys(map(str, range(256)), 1),
        ),
        (ProfileRequest, "alpha_pattern", {"q_proj": 0}, {"q_proj": 0.1}),
        (ProfileRequest, "modules_to_save", ["", "lm_head"], ["embed_tokens", "lm_head"]),
        (ProfileRequest, "modules_to_save", ["a", "b", "c"], None),
        (ProfileRequest, "adapter", "a" * 4097, "a" * 4096),
        (ProfileRequest, "base", "2bit", "16bit"),
        (ProfileRequest, "beta", 0, 1e12),
        (PlanRequest, "time_limit", 0, 86400),
        (PlanRequest, "time_limit", 86401, 0.1),
        (PlanRequest, "gap", 1, 0),
        (PlanRequest, "max_grad_norm", 0, 1e12),
        (PlanRequest, "optimizer", "adagrad", "lion"),
    ],
)
def test_limits_of_a_request(request_: Any, field: str, value: Any, taken: Any) -> None:
    needed = {"path": "model"} if request_ is ProfileRequest else {"profile": DIGEST, "memory": 1 << 30}
    assert getattr(request_(**needed, **{field: taken}), field) == taken
    with pytest.raises(ValidationError) as caught:
        request_(**needed, **{field: value})
    assert caught.value.errors()[0]["loc"][0] == field


ALL: dict[str, Any] = {
    "plan": DIGEST,
    "data": "train.csv",
    "epochs": 1.5,
    "lr": 0.001,
    "schedule": "cosine",
    "warmup_ratio": 0.1,
    "min_lr_ratio": 0.2,
    "weight_decay": 0.01,
    "eps2": 0.01,
    "beta2_decay": -0.5,
    "clip_threshold": 2.0,
    "seed": 7,
    "checkpoint_every": 3,
    "eval_every": "0.5 epochs",
    "keep_best": True,
    "early_stopping": 2,
    "packing": True,
    "eval_data": "held-out.csv",
    "columns": {"prompt": "question", "completion": "the answer"},
    "truncate": True,
    "adapter": "earlier/adapter",
}
"""a value for every field but for those that exclude each other"""


@pytest.mark.parametrize("request_", [ALL, {"plan": DIGEST, "data": "random", "steps": 4, "warmup_steps": 2}])
def test_a_run_is_started_with_what_its_request_says(request_: dict[str, Any], tmp_path: Path) -> None:
    """The words of the command line that the service makes, read by the command line itself."""
    asked = RunRequest(**request_).model_dump()
    order = JobOrder(
        kind="run",
        request=asked,
        objects="",
        command=["tightfit"],
        memory_bytes=None,
    )
    words = _command(order, tmp_path / "plan.json", tmp_path / "out")
    assert words[:2] == ["tightfit", "run"]
    command: Any = get_command(app)
    read = command.commands["run"].make_context("run", words[2:]).params
    assert read_options(TrainingOptions, read) == TrainingOptions.of(asked)
    assert set(asked) - {"plan", "data"} <= {CALLED.get(name, name) for name in read}
    assert (read["data"], read["eval_data"]) == (asked["data"], asked["eval_data"])
    assert (read["adapter"] and str(read["adapter"])) == asked["adapter"]
    assert (read["resume"], read["overwrite"]) == (False, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("lr", -1.0),
        ("lr", 1e39),
        ("lr", float("nan")),
        ("warmup_ratio", 1.5),
        ("min_lr_ratio", -0.1),
        ("seed", 10**12 + 1),
        ("schedule", "sometimes"),
        ("early_stopping", 0),
        ("checkpoint_every", "often"),
    ],
)
def test_what_a_run_refuses_its_request_refuses(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        TrainingOptions(**{"eval_every": 1, name: value})
    with pytest.raises(ValidationError) as caught:
        RunRequest(plan=DIGEST, data="random", **{name: value})
    assert caught.value.errors()[0]["loc"][0] == name


@pytest.mark.parametrize("column", ["a,b", "a=b", ""])
def test_columns_that_the_command_line_cannot_name_are_refused(column: str) -> None:
    with pytest.raises(ValidationError, match="columns"):
        RunRequest(plan=DIGEST, data="data.csv", steps=1, columns={"prompt": column})


def test_the_page_s_forms_are_made_of_the_requests() -> None:
    told = json.loads(gzip.decompress(_files()[FORMS]))
    assert told == forms()
    fields = {form: {one["name"]: one for one in fields} for form, fields in told.items()}
    assert set(fields["run"]) == set(RunRequest.model_fields)
    assert set(fields["profile"]) == set(ProfileRequest.model_fields) - {"header"}  # is read from a file
    run = fields["run"]
    assert run["schedule"] == {
        "name": "schedule",
        "title": "Schedule",
        "description": "Course of the learning rate: constant, linear or cosine.",
        "kind": "choice",
        "default": "constant",
        "choices": ["constant", "linear", "cosine"],
    }
    assert (run["steps"]["kind"], run["steps"]["least"]) == ("whole", 1)
    assert (run["warmup_ratio"]["kind"], run["warmup_ratio"]["most"]) == ("number", 1)
    assert (run["eval_every"]["kind"], run["packing"]["kind"]) == ("text", "switch")
    assert (run["columns"]["kind"], run["columns"]["of"]) == ("map", "text")
    assert fields["step"]["max_grad_norm"]["above"] == 0
    assert fields["profile"]["rank_pattern"]["of"] == "whole"
    assert fields["profile"]["alpha_pattern"]["of"] == "number"
    assert fields["profile"]["modules_to_save"]["kind"] == "list"
    assert fields["profile"]["lora_layers"]["title"] == "LoRA in layers"
