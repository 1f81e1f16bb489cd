"""The service over real HTTP: every door once, its refusals, its limits and what it keeps."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import re
import threading
from pathlib import Path

import httpx
import pytest
from damage import CONFIG
from places import ROOT
from served import Served
from synthetic import decoder_like, small_chain

from tightfit.planner.plan import plan as solve_here
from tightfit.planner.plan import planner_of
from tightfit.planner.report.explanation import account
from tightfit.planner.report.marginal_value import explained
from tightfit.planner.schema import Plan
from tightfit.planner.search_options import NEIGHBOUR_BYTES
from tightfit.planner.service.client import Client, connect
from tightfit.planner.service.jobs.tables import SCHEMA
from tightfit.planner.service.wire.schema import JOB
from tightfit.planner.service.wire.settings import Settings
from tightfit.planner.simulation.simulate import simulate
from tightfit.profiles.io import canonical_json, load_profile
from tightfit.profiles.schema import adamw
from tightfit.runtime.cli import main
from tightfit.runtime.common.errors import InputError, RunError

UNKNOWN = "0" * 64


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    (folder / "root").mkdir()
    (folder / "root" / "data.jsonl").write_text('{"text": "a"}\n')
    (folder / "root" / "led").mkdir()
    (folder / "root" / "led" / "model.gguf").symlink_to("/etc/passwd")
    service = Served(folder / "data", "--root", str(folder / "root")).start()
    yield service
    assert service.stop() == 0
    assert not [line for line in service.lines() if line["level"] == "error"]


@pytest.fixture(scope="module")
def profile():
    return small_chain(3, layers=3)


@pytest.fixture(scope="module")
def uploaded(served, profile):
    return served.upload(profile)


def test_a_rule_that_sums_no_gradients_is_refused_with_its_reason(served, profile):
    policy = "lcsb"
    summing = served.upload(profile.model_copy(update={"optimizer": adamw(4)}))
    for path, body in (
        ("plans", {"memory": "1GB", "policy": policy}),
        ("comparisons", {"memory": ["1GB"], "policies": [policy]}),
    ):
        message = refused(served.http.post(f"/v1/{path}", json={"profile": summing} | body), 422, "invalid_request")
        assert f"{policy} moves trained tensors after every step, and this profile sums the gradients of 4" in message


@pytest.fixture(scope="module")
def minimum(profile):
    return solve_here(profile, 1).minimum_budget_bytes


def endless(served, number):
    """A comparison that takes minutes, another for each number."""
    budgets = [f"{1000 + 8 * step + number}MiB" for step in range(40)]
    return served.ask("/v1/comparisons", profile=served.upload(decoder_like(24)), memory=budgets)


@pytest.fixture
def release(served):
    """Both workers are busy until this is called: of what is asked for before, and listened to, nothing is missed."""
    jobs = [endless(served, number)["id"] for number in range(2)]

    def end():
        while jobs:
            served.http.post(f"/v1/jobs/{jobs.pop()}/cancel")

    yield end
    end()


def refused(answer, status, code, field=None):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    if field is not None:
        assert [one["field"] for one in error["fields"]] == [field]
    return error["message"]


def test_a_profile_is_kept_once(served, profile, uploaded):
    again = served.http.post("/v1/uploads/profile", json=json.loads(profile.model_dump_json()))
    assert (again.status_code, again.json()["id"]) == (200, uploaded)
    assert again.json()["summary"]["layers"] == len(profile.layers)
    assert uploaded in [one["id"] for one in served.http.get("/v1/profiles").json()["items"]]
    file = served.http.get(f"/v1/profiles/{uploaded}/file")
    assert file.text == canonical_json(profile)
    plain = served.http.get(f"/v1/profiles/{uploaded}/file", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.text == file.text


def test_a_plan_is_the_library_s(served, profile, uploaded, minimum):
    asked = {"profile": uploaded, "memory": minimum + 4096}
    job = served.ask("/v1/plans", **asked)
    with served.http.stream("GET", f"/v1/jobs/{job['id']}/events") as stream:
        events = list(stream.iter_lines())
    job = served.wait(job)
    assert job["state"] == "succeeded", job
    last = json.loads(events[-2].removeprefix("data: "))
    assert (events[0], last["state"]) == ("event: job", "succeeded")
    here = solve_here(profile, minimum + 4096)
    told = job["result"]["summary"]
    assert (told["step_seconds"], told["peak_bytes"], told["fingerprint"]) == (
        here.step_seconds, here.peak_bytes, here.fingerprint,
    )  # fmt: skip
    plan = job["result"]["plan"]
    file = Plan.model_validate_json(served.http.get(f"/v1/plans/{plan}/file").content)
    assert simulate(file).peak_bytes == here.peak_bytes
    # The same question, however it is put, has its answer already.
    again = served.http.post("/v1/plans", json=asked | {"memory": str(minimum + 4096)})
    assert (again.status_code, again.json()["id"]) == (200, job["id"])
    assert served.http.get(f"/v1/plans/{plan}").json()["profile"] == uploaded
    assert plan in [one["id"] for one in served.http.get(f"/v1/plans?profile={uploaded}").json()["items"]]


def test_a_budget_that_is_too_small_is_a_result(served, uploaded, minimum):
    result = served.result("/v1/plans", profile=uploaded, memory=1)
    told = result["summary"]
    assert (told["status"], told["minimum_budget_bytes"]) == ("infeasible", minimum)
    assert told["minimum_budget_reason"]
    view = served.http.get(f"/v1/plans/{result['plan']}/view").json()
    assert view["plan"] == result["plan"]
    assert (view["fits"], view["layers"]) == (False, [])
    assert "has no schedule (infeasible)" in view["not_runnable"]
    assert any("smallest" in sentence for sentence in view["gist"])
    run = served.http.post("/v1/runs", json={"plan": result["plan"], "data": "random", "steps": 1})
    assert "has no schedule (infeasible)" in refused(run, 422, "invalid_request", "body.plan")


def test_a_policy_of_another_gradient_is_planned_where_it_is_named(served, uploaded):
    assert "mezo" not in served.http.get(f"/v1/profiles/{uploaded}").json()["summary"]["policies"]
    plan = served.result("/v1/plans", profile=uploaded, memory="1GiB", policy="mezo")
    assert plan["summary"]["policy"] == "mezo"
    assert served.http.get(f"/v1/plans/{plan['plan']}/view").json()["fits"]


@pytest.mark.slow
def test_a_comparison_keeps_every_cell_s_plan(served, uploaded, minimum, release):
    budgets = [minimum, minimum * 2]
    job = served.ask("/v1/comparisons", profile=uploaded, memory=budgets, policies=["solver", "keep-all"])
    with connect(served.url) as service:
        heard = service.events(job["id"])
        events = [next(heard)]
        release()
        events += heard
    told = [data["cell"] for name, data in events if name == "progress" and "cell" in data]
    cells = served.wait(job)["result"]["cells"]
    # Each plan is told of as it is made, largest budgets first.
    assert [(cell["budget_bytes"], cell["policy"]) for cell in told] == [
        (budget, policy) for budget in reversed(budgets) for policy in ("solver", "keep-all")
    ]
    assert [(cell["budget_bytes"], cell["policy"]) for cell in cells] == [
        (budget, policy) for budget in budgets for policy in ("solver", "keep-all")
    ]
    assert served.http.get(f"/v1/jobs/{job['id']}").json()["result"]["cells"] == cells
    first, last = cells[0]["plan"], cells[2]["plan"]
    view = served.http.get(f"/v1/plans/{first}/view").json()
    assert view["peak"]["bytes"] == view["summary"]["peak_bytes"]
    assert sum(part["bytes"] for part in view["peak"]["parts"]) == view["peak"]["bytes"]
    assert len(view["layers"]) == 3
    decided = sum(size for layer in view["layers"] for group in layer["decisions"].values() for size in group.values())
    assert decided > 0
    changes = served.http.get(f"/v1/plans/{first}/changes/{last}").json()
    assert changes["changes"]
    assert sum(group["bytes"] for group in changes["groups"]) == sum(row["bytes"] for row in changes["changes"])
    assert served.http.get(f"/v1/plans/{first}/changes/{first}").json()["changes"] == []


@pytest.mark.parametrize(
    ("path", "body", "field", "words"),
    [
        ("plans", {"memory": "10MiX"}, "body.memory", "'10MiX' is not a size"),
        ("plans", {"memory": True}, "body.memory", "true is no budget"),
        ("plans", {"memory": 0}, "body.memory", "0 is no budget"),
        ("plans", {"memory": "1GB", "policy": "best"}, "body.policy", "no policy is called 'best'"),
        ("plans", {"memory": "1GB", "time_limit": 4000}, "body.time_limit", "this service allows at most 300 s"),
        ("plans", {"memory": "1GB", "time_limit": 0}, "body.time_limit", "greater than 0"),
        ("plans", {"memory": "1GB", "gap": 1}, "body.gap", "less than 1"),
        ("comparisons", {"memory": ["1GB"], "gap": -0.1}, "body.gap", "greater than or equal to 0"),
        ("plans", {"memory": "1GB", "speed": 1}, "body.speed", "Extra inputs"),
        ("plans", {}, "body.memory", "Field required"),
        ("comparisons", {"memory": ["1GB", "x"]}, "body.memory.1", "'x' is not a size"),
        ("comparisons", {"memory": ["1GB"], "policies": ["solver", "y"]}, "body.policies.1", "no policy is called 'y'"),
        ("comparisons", {"memory": ["1GB"], "devices": ["own", "/etc/passwd"]}, "body.devices.1", "no device is called"),
        ("profiles", {"path": "../data.log"}, "body.path", "is no file or folder under a folder that is open"),
        ("profiles", {"path": "led"}, "body.path", "'led' holds the link 'model.gguf', which leads out"),
        ("profiles", {"hub": "a/b"}, "body.hub", "downloads nothing"),
        ("profiles", {"config": {"a": 1}}, "body.config", "no 'model_type'"),
        ("profiles", {"config": CONFIG | {"hidden_size": 10**12}}, "body.config", "'hidden_size' is 1000000000000; at most"),
        ("profiles", {"config": CONFIG | {"initializer_range": "x"}}, "body.config", "'initializer_range' must be a positive number"),
        ("profiles", {"path": "a", "device": "/etc/passwd"}, "body.device", "no device is called '/etc/passwd'"),
        ("profiles", {"path": "a", "adapter": "../a"}, "body.adapter", "is no file or folder"),
        ("profiles", {"path": "a", "bundle": "/etc"}, "body.bundle", "is no file or folder"),
        ("comparisons", {"memory": ["1GB"], "optimizer": "adagrad"}, "body.optimizer", "'lion'"),
        ("comparisons", {"memory": ["1GB"], "max_grad_norm": 0}, "body.max_grad_norm", "greater than 0"),
        ("profiles", {"path": "a", "hub": "a/b"}, "body", "exactly one of path, hub, config and header"),
        ("profiles", {"path": "os:system"}, "body.path", "is no file or folder"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(served, uploaded, path, body, field, words):
    if path in {"plans", "comparisons"}:
        body = {"profile": uploaded} | body
    assert words in refused(served.http.post(f"/v1/{path}", json=body), 422, "invalid_request", field)


def test_a_query_field_that_is_not_there_is_refused(served, uploaded):
    for path, name, choice in (
        ("plans?profil=x", "profil", "choose from profile, asked, limit, after, search"),
        (f"plans/{UNKNOWN}?limit=1", "limit", "there are none here"),
        ("jobs?kind=plan&Kind=run", "Kind", "choose from kind, state, limit, after, search"),
        ("devices?=1", "", "there are none here"),
        (f"plans?{'x' * 100}=1", "x" * 80, "choose from"),
        ("devices?%ff=1", "\ufffd", "there are none here"),
    ):
        told = refused(served.http.get(f"/v1/{path}"), 422, "invalid_request", f"query.{name}")
        assert told.startswith(f"no query field is called {name!r}; {choice}")
    assert refused(served.http.post(f"/v1/jobs/{JOB}/cancel?force=1"), 422, "invalid_request", "query.force")
    assert refused(
        served.http.delete(f"/v1/profiles/{uploaded}?with_plan=1"), 422, "invalid_request", "query.with_plan"
    )
    assert served.http.get(f"/v1/profiles/{uploaded}").status_code == 200
    for path in ("/healthz?at=1", "/page/?at=1", "/v1/plans?limit=1"):
        assert served.http.get(path).status_code == 200


def test_every_route_refuses_query_fields_that_it_does_not_have(served):
    """Before anything else is looked at."""
    asked = 0
    for path, methods in served.http.get("/openapi.json").json()["paths"].items():
        address = re.sub(r"\{\w+\}", UNKNOWN, path.replace("{things}", "plans").replace("{kind}", "profile"))
        for method in methods if path.startswith("/v1/") else ():
            answer = served.http.request(method, f"{address}?unheard_of=1")
            refused(answer, 422, "invalid_request", "query.unheard_of")
            asked += 1
    assert asked > 20


def test_what_is_not_there(served):
    for path in (
        f"plans/{UNKNOWN}",
        f"profiles/{UNKNOWN}/file",
        "jobs/job-0123456789abcdef",
    ):
        refused(served.http.get(f"/v1/{path}"), 404, "not_found")
    asked = {"profile": UNKNOWN, "memory": "1GB"}
    refused(served.http.post("/v1/plans", json=asked), 404, "not_found", "body.profile")
    told = refused(served.http.get("/v1/nothing"), 404, "not_found")
    assert told == "there is nothing at /v1/nothing; /openapi.json tells what there is"
    # A browser is shown a page with ways back, wherever it went astray; programs get what they read.
    for path in ("/nope", "/page/nope.js"):
        shown = served.http.get(path, headers={"Accept": "text/html,*/*"})
        assert (shown.status_code, shown.headers["content-type"]) == (404, "text/html; charset=utf-8")
        assert 'href="/page/#/models"' in shown.text
        refused(served.http.get(path, headers={"Accept": "application/json"}), 404, "not_found")
    refused(served.http.get("/v1/nothing", headers={"Accept": "text/html"}), 404, "not_found")
    answer = served.http.delete("/v1/plans")
    told = refused(answer, 405, "method_not_allowed")
    assert (told, answer.headers["allow"]) == ("DELETE is not for /v1/plans; send GET or POST", "GET, POST")
    answer = served.http.post("/openapi.json")
    told = refused(answer, 405, "method_not_allowed")
    assert (told, answer.headers["allow"]) == ("POST is not for /openapi.json; send GET or HEAD", "GET, HEAD")
    broken = served.http.post("/v1/plans", content=b"{bad", headers={"Content-Type": "application/json"})
    told = refused(broken, 400, "invalid_request", "body.1")
    assert told == "body.1: not JSON (Expecting property name enclosed in double quotes)"
    for path in ("/healthz", "/page/", f"/v1/plans?profile={UNKNOWN}"):
        full, head = served.http.get(path), served.http.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == full.headers["content-length"]
    # A stream lasts as long as its job: without its body it would hold up the connection as long.
    head = served.http.head("/v1/jobs/job-0123456789abcdef/events")
    assert (head.status_code, head.headers["allow"]) == (405, "GET")
    refused(served.http.get("/v1/plans/short"), 404, "not_found")


def test_an_uploaded_profile_is_planned_but_never_run(served, uploaded, minimum):
    plan = served.result("/v1/plans", profile=uploaded, memory=minimum)["plan"]
    answer = served.http.post("/v1/runs", json={"plan": plan, "data": "random", "steps": 1})
    assert "was not made by this service" in refused(answer, 422, "invalid_request", "body.plan")
    assert "was not made by this service" in served.http.get(f"/v1/plans/{plan}/view").json()["not_runnable"]


def test_bodies_that_are_refused(served, profile):
    def post(body, **headers):
        headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        return served.http.post("/v1/uploads/profile", content=body, headers=headers)

    bomb = gzip.compress(b" " * (65 << 20), 9)
    assert "unpacks to more than" in refused(post(bomb, Content_Encoding="gzip"), 413, "too_large")
    refused(post(b"x", Content_Encoding="gzip"), 400, "invalid_request")
    refused(post(b"x", Content_Encoding="br"), 415, "unsupported_media_type")
    refused(post(b"{}", Content_Type="text/plain"), 415, "unsupported_media_type", "header.Content-Type")
    refused(post(b" " * ((64 << 20) + 1)), 413, "too_large")
    refused(post(iter([b" " * (1 << 20)] * 65)), 413, "too_large")
    refused(post(b"[" * 100_000), 422, "invalid_request", "body")
    refused(post(b"\xff\xfe{}"), 422, "invalid_request", "body")
    refused(post(b'{"layers": [], "version": 99}'), 422, "invalid_request", "body")
    wrong = profile.model_dump(mode="json")
    wrong["layers"][0]["program"] = "none"
    assert "none" in refused(post(json.dumps(wrong)), 422, "invalid_request", "body")
    # A small file that unrolls to many operators: layers share programs.
    large = profile.model_dump(mode="json")
    large["layers"] = [large["layers"][1] | {"name": f"l{i}"} for i in range(60_000)]
    assert "operators; this service plans at most" in refused(post(json.dumps(large)), 422, "invalid_request")
    broken = served.http.post("/v1/plans", content=b"{", headers={"Content-Type": "application/json"})
    refused(broken, 400, "invalid_request")


@pytest.mark.slow
def test_an_upload_that_unfolds_is_refused_and_costs_the_service_no_memory(served, profile):
    """A million layers in 3 KB; faults without number; JSON that is all brackets, or deep where anything may stand."""

    def post(body):
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        return served.http.post("/v1/uploads/profile", content=gzip.compress(body, 9), headers=headers)

    def peak():
        status = Path(f"/proc/{served.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10

    served.upload(profile)  # the process that reads uploads is there
    before = peak()
    layers = b'{"version":6,"layers":['
    told = refused(post(layers + b",".join([b"{}"] * 10**6) + b"]}"), 422, "invalid_request", "body.layers")
    assert told == "the profile has 1000000 layers; this service plans at most 250000 operators"
    refused(post(layers + b",".join([b"{}"] * 10**5) + b"]}"), 422, "invalid_request", "body")
    told = refused(post(b"[" + b",".join([b"[]"] * (4 << 20)) + b"]"), 413, "too_large", "body")
    assert told == "the upload has 4194305 objects and lists; this service reads at most 3000000"
    deep = profile.model_dump(mode="json")
    for depth, words in (
        (80, "the upload has objects and lists more than 64 deep in each other"),
        (300, "lists or objects nested more than 100 deep"),
    ):
        deep["programs"][0]["operators"][0]["args"] = json.loads("[" * depth + "]" * depth)
        assert words in refused(post(json.dumps(deep).encode()), 422, "invalid_request", "body")
    assert peak() - before < 100 << 20
    # Bodies at other doors are small, since they are read where all are answered.
    many = {"profile": UNKNOWN, "memory": "1GB"} | {f"x{number}": 0 for number in range(50_000)}
    assert "more than 262144 bytes" in refused(served.http.post("/v1/plans", json=many), 413, "too_large", "body")


def test_other_sites_pages_are_kept_out(served):
    assert served.http.get("/healthz", headers={"Host": "localhost"}).status_code == 200
    refused(served.http.get("/healthz", headers={"Host": "evil.example"}), 421, "misdirected")
    refused(served.http.post("/v1/jobs/x/cancel", headers={"Origin": "http://evil.example"}), 403, "forbidden")


def test_cancel(served):
    # Both workers are busy with comparisons, so a third job waits.
    jobs = [endless(served, number) for number in range(3)]
    for job in reversed(jobs):
        answer = served.http.post(f"/v1/jobs/{job['id']}/cancel")
        assert answer.status_code == 200
    ended = [served.wait(job)["state"] for job in jobs]
    assert ended == ["cancelled"] * 3
    refused(served.http.post(f"/v1/jobs/{jobs[0]['id']}/cancel"), 409, "conflict")
    # A job that has been taken from the queue, but whose process is only about to start, is cancelled as well.
    for n in range(4):
        job = endless(served, 3 + n)
        while job["state"] == "queued":
            job = served.http.get(f"/v1/jobs/{job['id']}").json()
        served.http.post(f"/v1/jobs/{job['id']}/cancel")
        assert served.wait(job)["state"] == "cancelled"
    # A cancelled request can be asked again: another job.
    again = endless(served, 0)
    assert again["id"] != jobs[0]["id"]
    served.http.post(f"/v1/jobs/{again['id']}/cancel")


def test_a_bare_config_is_one_job(served):
    config = CONFIG
    job = served.ask("/v1/profiles", config=config, seq=16)
    assert served.ask("/v1/profiles", config=dict(reversed(config.items())), seq=16)["id"] == job["id"]
    assert job["request"]["config"] == config
    served.http.post(f"/v1/jobs/{job['id']}/cancel")
    assert served.wait(job)["state"] == "cancelled"


def test_an_idempotency_key(served, uploaded, minimum):
    def ask(memory):
        body = {"profile": uploaded, "memory": memory}
        return served.http.post("/v1/plans", json=body, headers={"Idempotency-Key": "mine"})

    first = ask(minimum)
    assert ask(minimum).json()["id"] == first.json()["id"]
    refused(ask(minimum + 1), 409, "conflict", "header.Idempotency-Key")


@pytest.mark.slow
def test_the_client_does_the_same_work(served, profile, minimum, release, monkeypatch):
    told, stream = [], Client._stream

    def listening(self, identity):
        for event in stream(self, identity):
            release()
            yield event

    monkeypatch.setattr(Client, "_stream", listening)
    with connect(served.url) as service:
        plan = service.plan(profile, minimum + 12288, progress=told.append)
        assert plan.step_seconds == solve_here(profile, minimum + 12288).step_seconds
        assert told
        assert set(told[-1]) >= {"stage", "incumbent", "bound", "gap", "seconds"}
        assert service.plan(profile, minimum + 12288) == plan
        compared = service.compare(profile, [minimum, minimum + 12288])
        assert [one.budget_bytes for one in compared.plans] == [minimum, minimum + 12288]
        (cell,) = service.compare(profile, [minimum + 45056]).plans
        assert service.explanation(cell) == account(cell)
        with pytest.raises(InputError, match="no policy is called 'x'"):
            service.plan(profile, minimum, policy="x")
        with pytest.raises(InputError, match="was not made by this service"):
            service.run(plan, "random", steps=1)
    with pytest.raises(RunError, match=r"no answer .*is `tightfit serve` running there\?"):
        connect("http://127.0.0.1:9")
    with pytest.raises(InputError, match="is no address"):
        connect("nowhere")


@pytest.mark.slow
def test_plans_are_asked_for_without_paths_of_the_machine_that_asks(served, profile, minimum):
    """They come back with the paths, as if they had been made here."""
    paths = {"source": "/home/somebody/where-it-lies/tiny", "store": "/home/somebody/.cache/tightfit/stores/tiny.store"}
    config = profile.model.config | {"adapter_base": "/home/somebody/where-it-lies/base"}
    model = profile.model.model_copy(update=paths | {"config": config})
    own = profile.model_copy(update={"model": model})
    with connect(served.url) as service:
        plan = service.plan(own, minimum + 57344)
        assert plan.model == model
        assert plan.fingerprint == solve_here(own, minimum + 57344).fingerprint
        assert service.explanation(plan)
        (compared,) = service.compare(own, [minimum + 61440]).plans
        assert compared.model == model
    stored = [gzip.decompress(path.read_bytes()) for path in (served.data / "objects").glob("??/*")]
    assert any(b"tiny.store" in content for content in stored)
    assert not any(b"somebody" in content for content in stored)


def test_the_command_line_can_let_a_service_solve(served, profile, minimum, tmp_path, capfd):
    from tightfit.profiles.io import save_profile

    save_profile(profile, tmp_path / "profile.json")
    words = ["plan", str(tmp_path / "profile.json"), "--memory", str(minimum), "--server", served.url, "--json"]
    with pytest.raises(SystemExit) as ended:
        main.main([*words, "-o", str(tmp_path / "plan.json")])
    assert ended.value.code == 0
    assert json.loads(capfd.readouterr().out)["peak_bytes"] <= minimum
    assert load_profile(tmp_path / "profile.json") == profile
    assert Plan.model_validate_json((tmp_path / "plan.json").read_bytes()).budget_bytes == minimum
    words[words.index(str(minimum))] = str(minimum - 1)
    with pytest.raises(SystemExit) as ended:
        main.main(words)
    assert ended.value.code == 3
    told = json.loads(capfd.readouterr().out)
    assert told["minimum_budget_bytes"] == told["explanation"]["shortfall"]["minimum_budget_bytes"] == minimum


def test_a_service_compares_with_the_same_optimizer(served, profile, minimum, tmp_path, capfd):
    from tightfit.profiles.io import save_profile

    save_profile(profile, tmp_path / "profile.json")
    words = ["compare", str(tmp_path / "profile.json"), "--memory", str(4 * minimum), "--policy", "keep-all"]
    words += ["--optimizer", "sgd", "--max-grad-norm", "1", "--json"]
    told = []
    for where in ([], ["--server", served.url]):
        capfd.readouterr()
        with pytest.raises(SystemExit):
            main.main([*words, *where])
        told.append(json.loads(capfd.readouterr().out)["plans"])
    (here,), (there,) = told
    for name in ("status", "peak_bytes", "step_seconds", "bound_seconds", "optimizer", "max_grad_norm"):
        assert here[name] == there[name], name
    assert (here["optimizer"], here["max_grad_norm"]) == ("sgd", 1.0)


@pytest.mark.slow
def test_a_plan_of_the_service_tells_what_the_command_line_tells(served, profile, minimum):
    """What memory is worth beside it, too; what fills its peak adds up to the peak."""
    here = solve_here(profile, minimum + 20480)
    with connect(served.url) as service:
        there = service.plan(profile, minimum + 20480)
        told = service.explanation(there)
        identity = service._id(there.fingerprint)
    assert there.peak_bytes == here.peak_bytes
    planner = planner_of(profile)
    assert told == explained(planner, planner.plan(minimum + 20480), left=30.0)
    assert [worth.change_bytes for worth in told.neighbours] == [-NEIGHBOUR_BYTES, NEIGHBOUR_BYTES]
    view = served.http.get(f"/v1/plans/{identity}/view").json()
    assert any("MiB more" in sentence for sentence in view["details"])
    assert view["peak"]["bytes"] == sum(part["bytes"] for part in view["peak"]["parts"]) == there.peak_bytes


def test_the_client_waits_for_a_service_that_is_started_again(monkeypatch):
    job = {"id": "job-0123456789abcdef", "state": "running"}
    broken = iter([httpx.ReadError("killed"), *[httpx.ConnectError("not up yet")] * 5])
    monkeypatch.setattr("tightfit.planner.service.client.RETRY_SECONDS", 0.0)

    def stream(self, identity):
        yield "job", job
        for error in broken:
            raise error
        yield "job", job | {"state": "succeeded"}

    monkeypatch.setattr(Client, "_stream", stream)
    client = Client("http://127.0.0.1:9", token=None, timeout=1.0)
    assert client.finish(job)["state"] == "succeeded"
    # Where it stays away, what becomes of the job is said.
    monkeypatch.setattr("tightfit.planner.service.client.RESTART_SECONDS", 0.1)
    monkeypatch.setattr(Client, "_stream", lambda self, identity: (_ for _ in ()).throw(httpx.ConnectError("gone")))
    with pytest.raises(
        RunError, match=r"goes on when .* there again: see http://127.0.0.1:9/v1/jobs/job-0123456789abcdef"
    ):
        client.finish(job)


def test_the_client_waits_however_long_a_job_was_silent_before(monkeypatch):
    """A minute counts from where the stream broke, and a proxy without a service behind it is no answer."""
    job = {"id": "job-0123456789abcdef", "state": "running"}
    now = [0.0]
    monkeypatch.setattr("tightfit.planner.service.client.time.monotonic", lambda: now[0])
    monkeypatch.setattr("tightfit.planner.service.client.time.sleep", lambda seconds: None)

    class Silent(httpx.SyncByteStream):
        def __iter__(self):
            yield f"event: job\ndata: {json.dumps(job)}\n\n".encode()
            now[0] += 3600.0
            raise httpx.ReadTimeout("silent")

    done = f"event: job\ndata: {json.dumps(job | {'state': 'succeeded'})}\n\n"
    answers = iter(
        [
            httpx.Response(200, stream=Silent()),
            *(httpx.Response(status, text="nothing behind this proxy") for status in (502, 503, 504)),
            httpx.Response(200, text=done),
        ]
    )
    client = Client("http://planner", token=None, timeout=1.0)
    client._http = httpx.Client(base_url=client.url, transport=httpx.MockTransport(lambda _: next(answers)))
    with client:
        assert client.finish(job)["state"] == "succeeded"


def test_a_run_that_goes_on_is_asked_for_by_its_key(monkeypatch):
    """Cut off and sent again, the request has the same key; interrupted, the run's own address is named."""
    asked = []

    def answer(request):
        asked.append((request.url.path, request.headers.get("Idempotency-Key")))
        if len(asked) == 1:
            raise httpx.ReadError("cut off")
        return httpx.Response(202, json={"id": "job-0123456789abcdef", "kind": "run", "state": "queued"})

    def stream(self, identity):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Client, "_stream", stream)
    client = Client("http://planner", token=None, timeout=1.0)
    client._http = httpx.Client(base_url=client.url, transport=httpx.MockTransport(answer))
    with (
        client,
        pytest.raises(KeyboardInterrupt, match=r"see http://planner/v1/jobs/job-0123456789abcdef, and .*/report once"),
    ):
        client.resume("job-0123456789abcdef")
    assert asked[0] == asked[1] == ("/v1/runs/job-0123456789abcdef/resume", asked[0][1])
    assert asked[0][1]


def test_ctrl_c_says_what_goes_on_at_the_service(served, profile, minimum, tmp_path, monkeypatch, capfd):
    from tightfit.profiles.io import save_profile

    def stream(self, identity):
        yield "progress", {"stage": "pricing", "incumbent": 1.0, "bound": 0.5, "gap": 1.0, "seconds": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "_stream", stream)
    save_profile(profile, tmp_path / "profile.json")
    words = ["plan", str(tmp_path / "profile.json"), "--memory", str(minimum + 28672), "--server", served.url]
    with pytest.raises(SystemExit) as ended:
        main.main([*words, "-o", str(tmp_path / "plan.json")])
    assert ended.value.code == 4
    said = capfd.readouterr().err
    assert re.search(rf"interrupted; job-[0-9a-f]{{16}} goes on at {served.url}: ask the same again", said)


def test_addresses_and_tokens_as_people_give_them(served, tmp_path, monkeypatch):
    # As it is copied from a browser.
    for copied in (f"{served.url}/page/", f"{served.url}/page/#profile={UNKNOWN}&budget=1", f"{served.url}/page?a=b"):
        with connect(copied) as service:
            assert service.get("/v1/jobs")
    monkeypatch.setenv("TIGHTFIT_TOKEN", "")
    with connect(served.url) as service:
        assert service.get("/v1/jobs")
    for token in ("a-secret-of-some-length ", "a-secret-of-söme-length"):
        with pytest.raises(InputError, match=r"^the token holds a blank or a character that no request") as refusal:
            connect(served.url, token=token)
        assert token not in str(refusal.value)
        with pytest.raises(InputError, match="a blank or a character that no request can carry"):
            Settings(data_dir=tmp_path, command=(), token=token)
    # Another web server says what it is not.
    with (
        another_server() as url,
        pytest.raises(InputError, match="if no tightfit service answers there, check the address"),
    ):
        connect(url)


@contextlib.contextmanager
def another_server():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_it_tells_about_itself(served, uploaded, minimum):
    served.result("/v1/plans", profile=uploaded, memory=minimum)
    health = served.http.get("/healthz").json()
    assert (health["status"], health["schema_version"]) == ("ok", SCHEMA)
    device = served.http.get("/v1/devices").json()["devices"][0]
    assert (device["name"], device["local"]) == ("cpu", True)
    assert len(served.http.get("/v1/devices").json()["devices"]) > 3
    jobs = served.http.get("/v1/jobs?kind=plan&state=succeeded&limit=2").json()["items"]
    assert 0 < len(jobs) <= 2


def test_a_token_is_asked_for_and_never_logged(tmp_path):
    token = "a-secret-of-some-length"
    service = Served(tmp_path / "data", token=token).start()
    with contextlib.ExitStack() as stack:
        stack.callback(service.stop)
        assert service.http.get("/v1/jobs").status_code == 200
        # The scheme's name has no case.
        assert service.http.get("/v1/jobs", headers={"Authorization": f"bearer {token}"}).status_code == 200
        bare = stack.enter_context(httpx.Client(base_url=service.url, trust_env=False))
        given = ("Bearer wrong", token, "Bearer", f"Bearer {token[:-1]}", f"Bearer {token}x", f"Basic {token}")
        for headers in ({}, *({"Authorization": words} for words in given)):
            answer = bare.get("/v1/jobs", headers=headers)
            refused(answer, 401, "unauthorized", "header.Authorization")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert bare.get("/healthz").status_code == 200
        assert bare.get("/page/").status_code == 200
        assert bare.get("/healthz", headers={"Host": "planner.example"}).status_code == 200
        bare.get(f"/v1/jobs?state={token}", headers={"Authorization": f"Bearer {token}"})
        with (
            connect(service.url, token="wrong") as wrong,
            pytest.raises(InputError, match=r"send the service's token.*; set TIGHTFIT_TOKEN to the service's token"),
        ):
            wrong.get("/v1/jobs")
        second = Served(service.data)
        with pytest.raises(AssertionError, match="another service is using it"):
            second.start()
    assert token not in service.log.read_text()
    routes = [line["route"] for line in service.lines() if line["message"] == "request"]
    assert "/v1/jobs" in routes


@pytest.mark.slow
def test_a_bare_graph_from_elsewhere(served):
    """Operators with seconds and bytes are enough: planned, told and drawn operator by operator."""
    graph = (ROOT / "examples" / "bare-graph.json").read_bytes()
    answer = served.http.post("/v1/uploads/profile", content=graph, headers={"Content-Type": "application/json"})
    assert answer.status_code == 201, answer.text
    identity, policies = answer.json()["id"], answer.json()["summary"]["policies"]
    assert policies == ["solver", "keep-all", "checkpoint-layers", "checkpoint-sqrt"]
    refused(
        served.http.post("/v1/plans", json={"profile": identity, "memory": 1, "policy": "mebp"}),
        422,
        "invalid_request",
        "body.policy",
    )
    result = served.result("/v1/plans", profile=identity, memory=1)
    told, unfit = result["summary"], result["plan"]
    assert told["status"] == "infeasible"
    # Nothing fits, so no bound is finite: JSON says null, the client says infinity.
    with connect(served.url) as service:
        assert service.stored_plan(unfit).minimum_budget_bytes == told["minimum_budget_bytes"]
    assert served.http.get(f"/v1/plans/{unfit}/view").json()["gist"]
    plan = served.result("/v1/plans", profile=identity, memory=told["minimum_budget_bytes"])["plan"]
    view = served.http.get(f"/v1/plans/{plan}/view").json()
    operators = [one["name"] for one in json.loads(graph)["operators"]]
    assert [layer["name"] for layer in view["layers"]] == operators
