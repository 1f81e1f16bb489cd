"""Files of the service that were damaged on disk, or that a service of another version has left: what they belong to is
told by name, no list fails because of them, and they are made anew when they are asked for again.
"""

from __future__ import annotations

import gzip
import time

import pytest
from served import PATIENCE, service
from synthetic import small_chain

from tightfit.planner.plan import minimum_budget
from tightfit.planner.schema import PLAN_VERSION
from tightfit.planner.service.jobs.store import file_row

SUMMARIES = {
    "profile": {"policies": ["solver"]},
    "plan": {"status": "optimal", "policy": "solver", "budget_bytes": 1, "explanation": None},
}
"""kind of a file -> the summary of one"""
DAMAGES = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut in the head": lambda path: path.write_bytes(path.read_bytes()[:5]),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "without its checksum": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "no gzip": lambda path: path.write_bytes(b"{}"),
    "a changed byte": lambda path: path.write_bytes(path.read_bytes()[:200] + b"\0" + path.read_bytes()[201:]),
    "another's": lambda path: path.write_bytes(gzip.compress(b"{}")),
}
"""what may become of a file on disk"""


def asked(http, identity, memory):
    """The job of a plan, at its end."""
    job = http.post("/v1/plans", json={"profile": identity, "memory": memory}).json()
    until = time.monotonic() + PATIENCE
    while job["state"] in {"queued", "running"}:
        assert time.monotonic() < until
        time.sleep(0.02)
        job = http.get(f"/v1/jobs/{job['id']}").json()
    return job


@pytest.mark.slow
def test_what_is_damaged_on_disk_is_set_aside_and_made_anew(tmp_path):
    profile = small_chain(3, layers=2)
    least, body = minimum_budget(profile), profile.model_dump(mode="json")
    with service(tmp_path) as http:
        objects = http.app.state.service.objects
        identity = http.post("/v1/uploads/profile", json=body).json()["id"]
        first = asked(http, identity, least)
        plan = first["result"]["plan"]
        for number, damage in enumerate(sorted(DAMAGES)):
            DAMAGES[damage](objects.path(http.app.state.service.store.file("plan", plan)["digest"]))
            answer = http.get(f"/v1/plans/{plan}/{('file', 'view')[number % 2]}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), damage
            assert f"set aside as set-aside/plan-{plan}.json" in answer.json()["error"]["message"]
            told = http.get("/v1/plans").json()
            assert (told["items"], told["set_aside"]) == ([], [f"plan-{plan}"])
            for path in ("", "/file", "/view"):
                assert "was set aside" in http.get(f"/v1/plans/{plan}{path}").json()["error"]["message"]
            # Its job no longer answers: what is asked for again is made again.
            again = asked(http, identity, least)
            assert (again["state"], again["result"]["plan"]) == ("succeeded", plan)
            assert again["id"] != first["id"]
            assert http.get(f"/v1/plans/{plan}/file").status_code == 200

            DAMAGES[damage](objects.path(identity))
            failed = asked(http, identity, least + 4096 * (1 + number))
            assert (failed["state"], failed["error"]["code"]) == ("failed", "input"), damage
            assert f"set aside as set-aside/profile-{identity}.json" in failed["error"]["message"]
            assert http.get("/v1/profiles").json()["items"] == []
            assert http.post("/v1/uploads/profile", json=body).json()["id"] == identity
            DAMAGES[damage](objects.path(identity))
            assert http.post("/v1/uploads/profile", json=body).status_code == 200  # which mends it
            assert http.get(f"/v1/profiles/{identity}/file").json()["batch"] == body["batch"]
    with service(tmp_path) as http:
        assert http.get("/healthz").json()["set_aside"] == [f"plan-{plan}", f"profile-{identity}"]
        assert asked(http, identity, least + 4096)["state"] == "succeeded"


CONTENTS = {
    "cut off": '{"layers": [',
    "of another version": '{"version": 1, "layers": [], "budget_bytes": 1}',
    "deeper than Python goes": "[" * 100_000,
    "not a number": f'{{"version": {PLAN_VERSION}, "budget_bytes": NaN}}',
    "no text": "\ud800",
}
"""what a service of another version, or somebody with an editor, may have left, under its own checksum"""


@pytest.mark.slow
@pytest.mark.parametrize("content", sorted(CONTENTS))
def test_what_is_stored_and_cannot_be_used_is_told_in_words(tmp_path, content):
    with service(tmp_path) as http:
        own = http.app.state.service
        for kind in ("profile", "plan"):
            written = own.objects.put(CONTENTS[content].encode(errors="surrogatepass"))
            of = {"origin": {"profile": "made", "plan": "1" * 64}.get(kind), "paths": {} if kind == "profile" else None}
            own.store.add(file_row(kind, "1" * 64, written, name="n", summary=SUMMARIES[kind], **of))
        told = http.get(f"/v1/plans/{'1' * 64}/view")
        assert (told.status_code, told.json()["error"]["code"]) == (422, "invalid_request")
        assert http.get(f"/v1/plans/{'1' * 64}/changes/{'1' * 64}").status_code == 422
        failed = asked(http, "1" * 64, "1GiB")
        assert (failed["state"], failed["error"]["code"]) == ("failed", "input")
        assert failed["error"]["message"].startswith(f"the stored profile {'1' * 64}: ")
        for kind in ("profile", "plan"):
            assert [one["id"] for one in http.get(f"/v1/{kind}s").json()["items"]] == ["1" * 64]
            assert http.get(f"/v1/{kind}s/{'1' * 64}/file").status_code == 200
