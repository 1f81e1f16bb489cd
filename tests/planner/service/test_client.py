"""What a client does with what the service keeps: list, rename, delete, download, follow."""

from __future__ import annotations

import json
import threading

import httpx
import pytest
from served import Served
from synthetic import small_chain

from tightfit.planner.plan import minimum_budget
from tightfit.planner.service.client import Client, connect
from tightfit.planner.service.wire.schema import JOB
from tightfit.profiles.io import canonical_json
from tightfit.runtime.common.errors import InputError, RunError

UNKNOWN = "0" * 64


@pytest.fixture(scope="module")
def profile():
    return small_chain(3, layers=2)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    service = Served(tmp_path_factory.mktemp("client") / "data").start()
    yield service
    assert service.stop() == 0
    assert not [line for line in service.lines() if line["level"] == "error"]


@pytest.fixture
def client(served):
    with connect(served.url) as opened:
        yield opened


@pytest.mark.slow
def test_what_is_kept_is_listed_renamed_downloaded_and_deleted(client, profile, tmp_path):
    least = minimum_budget(profile)
    plans = [client.plan(profile, least + 4096 * number) for number in range(3)]
    ids = [client._id(plan.fingerprint) for plan in plans]
    assert [plan["id"] for plan in client.items("plans")] == ids[::-1]
    # Every page of a list is asked for.
    assert [plan["id"] for plan in client.items("plans", limit="1")] == ids[::-1]
    (kept,) = client.items("profiles", search=profile.model.name)
    assert [plan["id"] for plan in client.items("plans", profile=kept["id"])] == ids[::-1]
    assert client.rename("plans", ids[1], title="the phone's")["title"] == "the phone's"
    assert [plan["id"] for plan in client.items("plans", search="PHONE")] == [ids[1]]
    assert client.rename("plans", ids[1], note="n")["title"] == "the phone's"
    assert client.rename("plans", ids[1], title=None)["title"] is None
    with pytest.raises(InputError, match=r"body.name: Extra inputs"):
        client.rename("plans", ids[1], name="x")
    path = client.download("profiles", kept["id"], tmp_path / "profile.json")
    assert path.read_text() == canonical_json(profile)
    plan = json.loads(client.download("plans", ids[0], str(tmp_path / "plan.json")).read_bytes())
    assert plan["fingerprint"] == plans[0].fingerprint
    jobs = list(client.items("jobs", kind="plan", state="succeeded"))
    assert len(jobs) == 3
    assert list(client.items("runs")) == []
    client.delete("jobs", jobs[0]["id"])
    client.delete("plans", ids[0])
    assert [plan["id"] for plan in client.items("plans")] == ids[:0:-1]
    with pytest.raises(InputError, match="2 plans of the profile"):
        client.delete("profiles", kept["id"])
    client.delete("profiles", kept["id"], with_plans=True)
    assert list(client.items("plans")) == list(client.items("profiles")) == []


def test_what_is_not_there_leaves_no_file(client, tmp_path):
    (tmp_path / "kept").write_text("as it was")
    with pytest.raises(InputError, match="there is no plan"):
        client.download("plans", UNKNOWN, tmp_path / "kept")
    with pytest.raises(InputError, match="there is no"):
        client.download("runs", JOB, tmp_path / "adapter.tar")
    with pytest.raises(InputError, match="No such file or directory; name a file that can be written"):
        client.download("plans", UNKNOWN, tmp_path / "none" / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "as it was"


def test_a_job_that_somebody_else_began_is_followed(client, served, profile):
    identity = served.upload(profile)
    job = served.ask("/v1/plans", profile=identity, memory="1GiB", policy="keep-all")
    assert client.follow(job["id"])["result"]["summary"]["status"] == "feasible"
    assert client.follow(job["id"])["state"] == "succeeded"
    with pytest.raises(InputError, match="there is no job"):
        client.follow(JOB)
    large = [f"{1000 + 8 * step}MiB" for step in range(40)]
    many = [
        served.ask("/v1/comparisons", profile=identity, memory=large, time_limit=limit)["id"] for limit in (30, 31, 32)
    ]
    failed = []

    def wait():
        with connect(served.url) as other, pytest.raises(RunError, match="was cancelled") as ended:
            other.follow(many[2])
        failed.append(ended)

    waiting = threading.Thread(target=wait)
    waiting.start()
    # The last waits for its turn, and is ended first.
    for one in many[::-1]:
        client.cancel(one)
    waiting.join(60)
    assert len(failed) == 1


def test_a_download_that_breaks_off_begins_anew(monkeypatch, tmp_path):
    class Broken(httpx.SyncByteStream):
        def __iter__(self):
            yield b"half of "
            raise httpx.ReadError("cut off")

    answers = iter([httpx.Response(200, stream=Broken()), httpx.Response(200, content=b"all of it")])
    with Client("http://planner", token=None, timeout=1.0) as client:
        client._http = httpx.Client(base_url=client.url, transport=httpx.MockTransport(lambda _: next(answers)))
        assert client.download("runs", JOB, tmp_path / "a.tar").read_bytes() == b"all of it"
