"""What is deleted is gone with all that it alone had, and nothing that is needed goes."""

from __future__ import annotations

import re

import pytest
from served import service

from tightfit.planner.service.jobs.store import content_key, file_row, folder_row
from tightfit.planner.service.wire.schema import Error

IDS = {"profile": "1" * 64, "plan": "2" * 64}
SUMMARIES = {
    "profile": {"policies": ["solver"]},
    "plan": {"status": "optimal", "policy": "solver", "budget_bytes": 1 << 20, "explanation": None},
}
"""kind of a file -> the summary of one"""


def file_of(own, kind, identity=None, content=None):
    written = own.objects.put((content or kind).encode())
    origin = {"profile": "made", "plan": IDS["profile"]}.get(kind)
    of = {"origin": origin, "paths": {} if kind == "profile" else None}
    return file_row(kind, identity or IDS.get(kind), written, name="tiny", summary=SUMMARIES.get(kind, {}), **of)


def ask(own, kind, uses=(), **request):
    """A job that waits for ever: nothing serves its lane."""
    content = None if kind == "run" else content_key(kind, request)
    return own.store.enqueue(kind, "none", request, content=content, key=None, waiting=99, uses=uses)[0]


def stored(own):
    """What lies on the disk: digests of objects, and folders of runs."""
    objects = {path.parent.name + path.name for path in own.objects.folder.glob("??/*")}
    return objects, {path.name for path in own.supervisor.runs.iterdir()}


@pytest.fixture
def http(tmp_path):
    with service(tmp_path) as opened:
        own = opened.app.state.service
        for kind in IDS:
            own.store.add(file_of(own, kind))
        yield opened
        assert own.store.set_aside() == []


@pytest.fixture
def own(http):
    return http.app.state.service


def refused(answer, status=409):
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


def test_a_plan_is_deleted_with_its_object(http, own):
    digest = own.store.file("plan", IDS["plan"])["digest"]
    answer = http.delete(f"/v1/plans/{IDS['plan']}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert http.get("/v1/plans").json()["items"] == []
    assert digest not in stored(own)[0]
    assert len(stored(own)[0]) == 1
    refused(http.delete(f"/v1/plans/{IDS['plan']}"), 404)


def test_what_two_files_hold_stays_while_one_has_it(http, own):
    own.store.add(file_of(own, "plan", "4" * 64))
    assert len(stored(own)[0]) == 2
    http.delete(f"/v1/plans/{'4' * 64}")
    assert len(stored(own)[0]) == 2
    assert http.get(f"/v1/plans/{IDS['plan']}/file").text == "plan"


def test_a_profile_goes_with_its_plans_or_not_at_all(http, own):
    path = f"/v1/profiles/{IDS['profile']}"
    assert re.match("a plan of the profile “[^”]+” would be", refused(http.delete(path)))
    own.store.add(file_of(own, "plan", "4" * 64))
    message = refused(http.delete(f"{path}?with_plans=false"))
    assert message.startswith("2 plans of the profile")
    assert message.endswith("would be without it; delete them too (with_plans=true)")
    assert len(http.get("/v1/plans").json()["items"]) == 2
    assert http.delete(f"{path}?with_plans=true").status_code == 204
    assert http.get("/v1/plans").json()["items"] == http.get("/v1/profiles").json()["items"] == []
    assert stored(own)[0] == set()


def test_a_profile_without_plans_goes_as_it_is(http):
    http.delete(f"/v1/plans/{IDS['plan']}")
    assert http.delete(f"/v1/profiles/{IDS['profile']}").status_code == 204


@pytest.mark.parametrize("state", ["queued", "running"])
def test_what_a_live_job_needs_stays(http, own, state):
    """A plan that a live run needs keeps its profile too, whatever is said of plans."""
    uses = [(kind, IDS[kind]) for kind in IDS]
    run = ask(own, "run", uses, plan=IDS["plan"], data="random")
    if state == "running":
        assert own.store.next("none").id == run.id
    for kind in ("plan", "profile"):
        message = refused(
            http.delete(f"/v1/{kind}s/{IDS[kind]}?with_plans=true" if kind == "profile" else f"/v1/{kind}s/{IDS[kind]}")
        )
        assert f"({run.id}) is {state} and needs the {kind} “" in message
        assert message.endswith("”; cancel it first, or wait for its end")
        assert IDS[kind] not in message  # people know it by its name
        assert http.get(f"/v1/{kind}s/{IDS[kind]}").status_code == 200
    assert refused(http.delete(f"/v1/jobs/{run.id}")) == f"the job {run.id} is {state}; cancel it first"
    own.store.finish(run.id, "failed", error=Error(code="input", message="no"))
    for kind in ("plan", "profile"):
        assert http.delete(f"/v1/{kind}s/{IDS[kind]}").status_code == 204


def test_what_is_gone_answers_no_request(http, own):
    """The request of a plan that was deleted is planned anew."""
    job = ask(own, "plan", memory=1)
    own.store.finish(job.id, "succeeded", result={"plan": IDS["plan"]}, files=[file_of(own, "plan")])
    assert ask(own, "plan", memory=1).id == job.id
    http.delete(f"/v1/plans/{IDS['plan']}")
    refused(http.get(f"/v1/jobs/{job.id}"), 404)
    assert ask(own, "plan", memory=1).id != job.id


def ended_run(own):
    run = ask(own, "run", [("plan", IDS["plan"]), ("profile", IDS["profile"])], plan=IDS["plan"], data="random")
    left = [
        file_of(own, kind, run.id, content='{"step": 1, "loss": 2.5}\n' if kind == "metrics" else f'["{kind}"]')
        for kind in ("report", "metrics", "adapter")
    ]
    folder = own.supervisor.runs / run.id / "out"
    folder.mkdir(parents=True)
    (folder / "checkpoint-3").write_bytes(b"c" * 1000)
    result = {"report": {"budget_bytes": 1 << 20, "steps": 3, "loss": []}}
    return own.store.finish(run.id, "succeeded", result=result, files=[*left, folder_row(run.id, 1000)])


def test_a_run_goes_with_all_that_it_left(http, own):
    before = stored(own)
    run = ended_run(own)
    assert [len(kept) for kept in stored(own)] == [5, 1]
    assert http.get(f"/v1/runs/{run.id}/adapter").status_code == 200
    answer = http.delete(f"/v1/jobs/{run.id}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert stored(own) == before
    for path in (f"jobs/{run.id}", f"runs/{run.id}/metrics", f"runs/{run.id}/report", f"runs/{run.id}/adapter"):
        refused(http.get(f"/v1/{path}"), 404)
    refused(http.delete(f"/v1/jobs/{run.id}"), 404)
    assert http.get(f"/v1/plans/{IDS['plan']}").status_code == 200


def test_a_run_stays_while_a_live_job_needs_its_adapter(http, own):
    run = ended_run(own)
    other = ask(own, "run", [("adapter", run.id)], plan=IDS["plan"], data="random")
    assert f"({other.id}) is queued and needs the adapter “" in refused(http.delete(f"/v1/jobs/{run.id}"))
    assert http.get(f"/v1/runs/{run.id}/adapter").status_code == 200


def test_a_run_outlives_its_plan(http, own):
    """What it has learnt is not lost with the plan or the profile: its figures, its adapter, what it is called."""
    run = ended_run(own)
    before = http.get(f"/v1/jobs/{run.id}").json()
    assert before["label"] == "tiny on random data in 1.0 MiB"
    assert http.delete(f"/v1/profiles/{IDS['profile']}?with_plans=true").status_code == 204
    assert http.get(f"/v1/jobs/{run.id}").json() == before
    metrics = http.get(f"/v1/runs/{run.id}/metrics").json()
    assert (metrics["budget_bytes"], metrics["steps"][0]["loss"]) == (1 << 20, 2.5)
    assert http.get(f"/v1/runs/{run.id}/report").status_code == 200
    # One that was ended before tells no budget, and cannot go on.
    own.store._database.execute("UPDATE jobs SET state = 'cancelled', result = NULL WHERE id = ?", (run.id,))
    assert http.get(f"/v1/runs/{run.id}/metrics").json()["budget_bytes"] is None
    assert "there is no plan" in refused(http.post(f"/v1/runs/{run.id}/resume"), 404)
