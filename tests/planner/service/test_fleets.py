"""The service's fleets over real HTTP: planned, kept, told, drawn, and refused field by field."""

from __future__ import annotations

import json

import pytest
from changed_operators import with_operators
from served import Served
from synthetic import small_chain
from tiny_plans import decoder_profile

from tightfit.planner.fleet.plan import MemberSpec, plan_fleet
from tightfit.planner.fleet.schema import FleetPlan, Link, PipelinePlan
from tightfit.planner.report.fleet_text import activity_sheet, chain_sheet, fleet_sentences
from tightfit.planner.report.summary import fleet_summary
from tightfit.planner.schema import Plan
from tightfit.planner.service.client import connect
from tightfit.profiles.io import save_profile
from tightfit.runtime.cli import main
from tightfit.runtime.common.units import MIB

UNKNOWN = "0" * 64
LINK = Link(up_bytes_per_second=1e6, down_bytes_per_second=2e6, latency_seconds=0.0005)
MICRO_BATCHES = 6
BUDGET = 32 * MIB
"""has room for the exchange of gradients beside a plan"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    service = Served(tmp_path_factory.mktemp("fleets") / "data").start()
    yield service
    assert service.stop() == 0
    assert not [line for line in service.lines() if line["level"] == "error"]


@pytest.fixture(scope="module")
def profile():
    return small_chain(3, layers=3)


@pytest.fixture(scope="module")
def uploaded(served, profile):
    return served.upload(profile)


@pytest.fixture(scope="module")
def here(profile):
    """The members and their fleet, planned without the service."""
    members = [MemberSpec(name=name, profile=profile, budget_bytes=BUDGET, link=LINK) for name in ("laptop", "phone")]
    return members, *plan_fleet(members, MICRO_BATCHES)


@pytest.fixture(scope="module")
def body(uploaded):
    link = {"up": 1e6, "down": "2MB/s", "latency": "500us"}
    members = [{"name": name, "profile": uploaded, "memory": BUDGET, **link} for name in ("laptop", "phone")]
    return {"micro_batches": MICRO_BATCHES, "members": members}


@pytest.fixture(scope="module")
def job(served, body):
    found = served.wait(served.ask("/v1/fleets", **body))
    assert found["state"] == "succeeded", found
    return found


def without_clock(fleet):
    return fleet.model_dump(exclude={"solve_seconds", "fingerprint"})


def test_a_fleet_is_the_library_s(served, job, here):
    _, fleet, plans = here
    result = job["result"]
    file = served.http.get(f"/v1/fleets/{result['fleet']}/file")
    told = FleetPlan.model_validate_json(file.content)
    assert without_clock(told) == without_clock(fleet)
    assert result["summary"] == json.loads(json.dumps(fleet_summary(told)))
    assert sorted(result["plans"]) == sorted(plans) == ["laptop", "phone"]
    for member in told.chain:
        plan = Plan.model_validate_json(served.http.get(f"/v1/plans/{result['plans'][member.name]}/file").content)
        assert plan.fingerprint == member.plan_fingerprint == plans[member.name].fingerprint
    kept = served.http.get(f"/v1/fleets/{result['fleet']}").json()
    assert (kept["id"], kept["summary"]) == (result["fleet"], result["summary"] | {"plans": result["plans"]})
    assert kept in served.http.get("/v1/fleets").json()["fleets"]


def test_the_same_question_has_its_answer_already(served, job, body):
    """However bytes, rates and times are written."""
    first, second = body["members"]
    link = {"up": "1MB/s", "down": "16Mbit/s", "latency": 0.0005}
    again = served.http.post(
        "/v1/fleets", json=body | {"members": [first, second | link | {"memory": str(second["memory"])}], "bits": 0}
    )
    assert (again.status_code, again.json()["id"]) == (200, job["id"])
    assert job["request"]["members"][0] == {
        "name": "laptop",
        "profile": first["profile"],
        "device": "own",
        "memory": first["memory"],
        "up": 1e6,
        "down": 2e6,
        "latency": 0.0005,
    }


def test_a_fleet_to_look_at(served, job):
    identity = job["result"]["fleet"]
    fleet = FleetPlan.model_validate_json(served.http.get(f"/v1/fleets/{identity}/file").content)
    view = served.http.get(f"/v1/fleets/{identity}/view").json()
    assert view["sentences"] == fleet_sentences(fleet)
    assert view["chain"]["rows"] == chain_sheet(fleet).rows
    assert view["activity"]["rows"] == activity_sheet(fleet).rows
    lanes = {lane["name"] for lane in view["lanes"]["lanes"]}
    assert lanes == {span.lane for span in fleet.timeline}
    assert view["plans"] == {member.plan: job["result"]["plans"][member.name] for member in fleet.chain}


def test_what_a_member_does_is_no_plan_of_a_whole_step(served, job):
    own = set(job["result"]["plans"].values())
    for asked in ("whole=true", "whole=true&asked=true"):
        assert own.isdisjoint(plan["id"] for plan in served.http.get(f"/v1/plans?{asked}&limit=500").json()["plans"])
    assert own <= {plan["id"] for plan in served.http.get("/v1/plans?limit=500").json()["plans"]}
    for plan in own:  # like devices have one and the same
        part = served.http.get(f"/v1/plans/{plan}").json()["summary"]["part_of"]
        assert part == {"fleet": job["result"]["fleet"], "members": ["laptop", "phone"], "layers": None}


@pytest.mark.slow
def test_a_pipeline_is_planned_over_http(served, body, tmp_path):
    model = served.upload(with_operators(decoder_profile(tmp_path), lambda _: {"seconds": 1e-3}))
    members = [{**member, "profile": model, "memory": "400MiB"} for member in body["members"]]
    found = served.wait(served.ask("/v1/fleets", **body | {"members": members}, kind="pipeline"))
    assert found["state"] == "succeeded", found["error"]
    identity = found["result"]["fleet"]
    fleet = PipelinePlan.model_validate_json(served.http.get(f"/v1/fleets/{identity}/file").content)
    assert sorted(found["result"]["plans"]) == sorted(member.name for member in fleet.chain)
    for member in fleet.chain:
        summary = served.http.get(f"/v1/plans/{found['result']['plans'][member.name]}").json()["summary"]
        assert summary["part_of"]["layers"] == [member.first_layer + 1, member.last_layer]
    view = served.http.get(f"/v1/fleets/{identity}/view").json()
    assert {lane["name"] for lane in view["lanes"]["lanes"]} == {span.lane for span in fleet.timeline}


def test_a_member_s_plan_is_not_run_alone(served, job):
    for plan in job["result"]["plans"].values():
        assert "is a member's of a fleet" in served.http.get(f"/v1/plans/{plan}/view").json()["not_runnable"]
        answer = served.http.post("/v1/runs", json={"plan": plan, "data": "random", "steps": MICRO_BATCHES})
        assert answer.status_code == 422
        assert answer.json()["error"]["fields"][0]["field"] == "body.plan"
        assert "is a member's of a fleet" in answer.json()["error"]["message"]


def test_the_client_does_the_same_work(served, here):
    members, fleet, plans = here
    told = []
    with connect(served.url) as service:
        found, made, why = service.fleet(members, MICRO_BATCHES, progress=told.append)
    assert why == "data parallel: the model cannot be cut"
    assert without_clock(found) == without_clock(fleet)
    assert {name: plan.fingerprint for name, plan in made.items()} == {
        name: plan.fingerprint for name, plan in plans.items()
    }


def test_the_command_line_can_let_a_service_plan(served, profile, job, tmp_path, capfd):
    save_profile(profile, tmp_path / "profile.json")
    member = f'profile = "profile.json"\nmemory = {BUDGET}\nup = "1MB/s"\ndown = "2MB/s"\nlatency = "500us"\n'
    text = "".join(f'[[member]]\nname = "{name}"\n{member}' for name in ("laptop", "phone"))
    (tmp_path / "fleet.toml").write_text(f"micro_batches = {MICRO_BATCHES}\n{text}")
    words = [
        "fleet",
        "plan",
        str(tmp_path / "fleet.toml"),
        "-o",
        str(tmp_path / "out"),
        "--server",
        served.url,
        "--json",
    ]
    with pytest.raises(SystemExit) as ended:
        main.main(words)
    assert ended.value.code == 0
    told = json.loads(capfd.readouterr().out)
    file = served.http.get(f"/v1/fleets/{job['result']['fleet']}/file")
    assert told["fingerprint"] == file.json()["fingerprint"]  # the same request, so the same job
    from tightfit.planner.fleet.io import load_fleet, load_member_plan

    fleet = load_fleet(told["fleet"], FleetPlan)
    assert fleet.fingerprint == told["fingerprint"]
    for member in fleet.chain:
        assert load_member_plan(told["fleet"], fleet, member.name).fingerprint == member.plan_fingerprint


def test_what_the_planner_refuses_fails_the_job_with_its_words(served, body):
    small = [member | {"memory": 4096} for member in body["members"]]
    failed = served.wait(served.ask("/v1/fleets", **body | {"members": small}))
    assert (failed["state"], failed["error"]["code"]) == ("failed", "infeasible")
    assert "can hold a micro-batch" in failed["error"]["message"]


@pytest.mark.parametrize(
    ("whole", "member", "field", "words"),
    [
        ({"micro_batches": 0}, {}, "body.micro_batches", "greater than or equal to 1"),
        ({"time_limit": 4000}, {}, "body.time_limit", "this service allows at most 300 s"),
        ({"members": []}, {}, "body.members", "at least 1 item"),
        ({"batches": 1}, {}, "body.batches", "Extra inputs"),
        ({}, {"name": "a/b"}, "body.members.1.name", "should match pattern"),
        ({}, {"name": "phone\n"}, "body.members.1.name", "should match pattern"),
        ({}, {"name": "laptop"}, "body.members.1.name", "another member is called 'laptop'"),
        ({}, {"memory": "10MiX"}, "body.members.1.memory", "'10MiX' is not a size"),
        ({}, {"memory": 0}, "body.members.1.memory", "0 is no budget"),
        ({}, {"up": "1Mb/s"}, "body.members.1.up", "'1Mb/s' is not a rate"),
        ({}, {"up": 0}, "body.members.1.up", "0 is no rate"),
        ({}, {"down": 1e30}, "body.members.1.down", "1e+30 is no rate"),
        ({}, {"latency": "2"}, "body.members.1.latency", "'2' is not a time"),
        ({}, {"latency": -1}, "body.members.1.latency", "-1 is no time"),
        ({}, {"link": "1MB/s"}, "body.members.1", "give either link, or up and down"),
        ({}, {"up": None}, "body.members.1", "give either link, or up and down"),
        ({}, {"up": None, "down": None}, "body.members.1", "give either link, or up and down"),
        ({}, {"up": None, "down": None, "link": "fast"}, "body.members.1.link", "'fast' is not a rate"),
        ({}, {"speed": 1}, "body.members.1.speed", "Extra inputs"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(served, body, whole, member, field, words):
    first, second = body["members"]
    answer = served.http.post("/v1/fleets", json=body | {"members": [first, second | member]} | whole)
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert [one["field"] for one in error["fields"]] == [field]
    assert words in error["message"]


@pytest.mark.parametrize(("member", "field"), [("up", "up"), ("latency", "latency")])
def test_a_flag_is_no_number(served, body, member, field):
    """Python counts true as 1."""
    first, second = body["members"]
    answer = served.http.post("/v1/fleets", json=body | {"members": [first, second | {member: True}]})
    assert answer.status_code == 422
    assert answer.json()["error"]["fields"][0]["field"].startswith(f"body.members.1.{field}")
    assert "true is no" in answer.json()["error"]["message"]


def test_what_is_not_there(served, body):
    first, second = body["members"]
    answer = served.http.post("/v1/fleets", json=body | {"members": [first, second | {"profile": UNKNOWN}]})
    assert answer.status_code == 404
    assert answer.json()["error"]["fields"][0]["field"] == "body.members.1.profile"
    for path in ("", "/file", "/view"):
        assert served.http.get(f"/v1/fleets/{UNKNOWN}{path}").status_code == 404
