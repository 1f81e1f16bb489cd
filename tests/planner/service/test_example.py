"""An empty service begins with an example, once, and has it planned."""

from __future__ import annotations

import time

import pytest
from served import PATIENCE, service

from tightfit.planner.service.http.example import BUDGETS, EXAMPLE, example_profile
from tightfit.profiles.io import parse_profile
from tightfit.profiles.schema import PROFILE_VERSION
from tightfit.runtime.common.strict_json import from_json

RENEWED = "run `make example` where nothing else runs, and commit planner/service/wire/example.json.gz"


def test_the_example_is_of_this_version_and_names_no_machine():
    version = from_json(example_profile())["version"]
    assert version == PROFILE_VERSION, (
        f"the example has profile version {version}, and PROFILE_VERSION is {PROFILE_VERSION}: {RENEWED}"
    )
    profile = parse_profile(example_profile(), f"the example ({RENEWED})")
    assert profile.model.source == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "/" not in profile.model.store
    assert profile.device.busy_cores < 0.1, f"other programs ran while it was measured: {RENEWED}"
    assert EXAMPLE.stat().st_size < 40_000


def profiles(http):
    return http.get("/v1/profiles").json()["items"]


def ended(http, kind):
    until = time.monotonic() + PATIENCE
    while True:
        jobs = http.get("/v1/jobs", params={"kind": kind}).json()["items"]
        if all(job["state"] not in {"queued", "running"} for job in jobs):
            return jobs
        assert time.monotonic() < until, jobs
        time.sleep(0.1)


@pytest.mark.slow
def test_an_empty_service_begins_with_the_example_planned(tmp_path):
    with service(tmp_path, example=True) as http:
        (example,) = profiles(http)
        assert (example["origin"], example["name"]) == ("example", "SmolLM2-135M-Instruct.Q4_1")
        (job,) = ended(http, "comparison")
        assert job["state"] == "succeeded", job
        cells = job["result"]["cells"]
        assert [cell["summary"]["status"] for cell in cells] == ["feasible"] * (len(BUDGETS) - 1) + ["optimal"]
        steps = [cell["summary"]["step_seconds"] for cell in cells]
        assert steps == sorted(steps, reverse=True)
        ends = {end["request"]["policy"]: end for end in ended(http, "plan")}
        needed = {name: end["result"]["summary"]["minimum_budget_bytes"] for name, end in ends.items()}
        assert 0 < needed["solver"] < 150 << 20 < needed["keep-all"] <= cells[-1]["budget_bytes"]
        # The same questions, as the page asks them, are answered by what is there.
        asked = {"profile": example["id"], "memory": list(BUDGETS)}
        assert http.post("/v1/comparisons", json=asked).json()["id"] == job["id"]
        asked = {"profile": example["id"], "memory": 1, "policy": "keep-all", "time_limit": 2}
        assert http.post("/v1/plans", json=asked).json()["id"] == ends["keep-all"]["id"]
        # It was measured elsewhere: what to do instead is said where it is looked at and where it is to be run.
        plan = cells[-1]["plan"]
        refusal = http.get(f"/v1/plans/{plan}/view").json()["not_runnable"]
        assert refusal.startswith(
            "this plan is of the example, which was measured on another machine; put SmolLM2-135M"
        )
        answer = http.post("/v1/runs", json={"plan": plan, "data": "random", "steps": 1})
        assert (answer.status_code, answer.json()["error"]["message"]) == (422, refusal)
    with service(tmp_path, example=True) as http:
        assert [profile["id"] for profile in profiles(http)] == [example["id"]]


@pytest.mark.slow
def test_who_has_a_profile_gets_no_example_and_who_deletes_it_not_again(tmp_path):
    with service(tmp_path) as http:
        assert profiles(http) == []
    with service(tmp_path, example=True) as http:
        (example,) = profiles(http)
        for kind in ("comparison", "plan"):
            ended(http, kind)
        assert http.delete(f"/v1/profiles/{example['id']}?with_plans=true").status_code == 204
    with service(tmp_path, example=True) as http:
        assert profiles(http) == []

    with service(tmp_path / "used") as http:
        headers = {"Content-Type": "application/json"}
        sent = http.post("/v1/uploads/profile", content=example_profile(), headers=headers)
        assert sent.status_code == 201
        (uploaded,) = profiles(http)
        assert (uploaded["id"], uploaded["origin"]) == (example["id"], "uploaded")
    with service(tmp_path / "used", example=True) as http:
        assert [profile["origin"] for profile in profiles(http)] == ["uploaded"]
        assert http.get("/v1/jobs").json()["items"] == []


@pytest.mark.parametrize("content", [b"{}", b"no json"])
def test_a_service_without_a_readable_example_starts_all_the_same(tmp_path, monkeypatch, content):
    monkeypatch.setattr("tightfit.planner.service.http.example.example_profile", lambda: content)
    with service(tmp_path, example=True) as http:
        assert profiles(http) == []
        assert http.get("/healthz").json()["status"] == "ok"
