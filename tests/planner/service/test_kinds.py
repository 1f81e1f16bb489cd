"""One table of kinds of jobs and one of what is kept: each kind has its work, each list the same routes."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from served import service
from synthetic import small_chain

from tightfit.planner.service.http.things import THINGS
from tightfit.planner.service.jobs.kinds import KINDS
from tightfit.planner.service.wire.schema import JOB

UNKNOWN = "0" * 64


@pytest.fixture(scope="module")
def http(tmp_path_factory):
    with service(tmp_path_factory.mktemp("kinds")) as opened:
        yield opened


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_its_work_and_is_described(http, kind):
    assert find_spec(f"tightfit.planner.service.jobs.work.{kind.replace('-', '_')}") is not None
    described = http.get("/openapi.json").json()["paths"][f"/v1/{KINDS[kind].address}"]["post"]
    record = described["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert record == KINDS[kind].request.__name__
    assert described["description"].startswith(KINDS[kind].check.__doc__.split("\n")[0])
    answer = http.post(f"/v1/{KINDS[kind].address}", json={"unheard_of": 1})
    assert answer.status_code == 422


@pytest.mark.parametrize("name", THINGS)
def test_every_list_has_the_same_routes(http, name):
    assert http.get(f"/v1/{name}").json() == {"items": [], "next": None, "set_aside": []}
    for identity in (UNKNOWN, JOB):
        address = f"/v1/{name}/{identity}"
        parts = [http.get(f"{address}/{part}") for part in THINGS[name].parts]
        for answer in (http.get(address), http.patch(address, json={"note": "x"}), http.delete(address), *parts):
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), answer.text
            assert answer.json()["error"]["message"].startswith("there is no "), answer.text
    assert http.get(f"/v1/{name}/{UNKNOWN}/unheard-of").status_code == 404


def test_what_is_kept_is_shown_alike(http):
    """A profile and a file of samples: named, listed, downloaded, deleted."""
    samples = b'{"text": "one"}\n'
    sent = {
        "profiles": ("uploads/profile", json.dumps(small_chain(3, layers=2).model_dump(mode="json")).encode()),
        "uploads": ("uploads/samples?name=my%20samples.jsonl", samples),
    }
    for name, (address, content) in sent.items():
        kind = "application/json" if name == "profiles" else "application/octet-stream"
        stored = http.post(f"/v1/{address}", content=content, headers={"Content-Type": kind}).json()
        place = f"/v1/{name}/{stored['id']}"
        assert http.get(place).json() == stored
        named = http.patch(place, json={"title": "mine", "note": "n"}).json()
        assert named == stored | {"title": "mine", "note": "n"}
        assert http.get(f"/v1/{name}?search=mine").json()["items"] == [named]
        file = http.get(f"{place}/file")
        assert file.status_code == 200
        if name == "uploads":
            assert file.content == samples
            assert file.headers["content-disposition"] == "attachment; filename*=utf-8''my%20samples.jsonl"
        assert http.delete(place).status_code == 204
        assert http.get(f"/v1/{name}").json()["items"] == []


def test_addresses_of_older_versions_are_not_there(http):
    for path in ("profiles/upload", "plans/short/file"):
        answer = http.post(f"/v1/{path}", json={})
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == f"there is nothing at /v1/{path}; /openapi.json tells what there is"
    answer = http.post(f"/v1/runs/{JOB}/merge", json={"format": "gguf"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
