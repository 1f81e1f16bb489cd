"""Events of jobs have ids, and a stream that broke off is taken up again after the last one that was received."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from served import service

from tightfit.planner.service.client import Client
from tightfit.planner.service.wire.events import ENDED, QUEUE, Events
from tightfit.planner.service.wire.schema import JOB, PLAN_JOB, ServiceJob

RUNNING = ServiceJob.model_validate(PLAN_JOB | {"state": "running", "finished": None, "result": None})
DONE = ServiceJob.model_validate(PLAN_JOB)


def parsed(text):
    """(id, name, data) of an event."""
    lines = dict(line.split(": ", 1) for line in text.strip().split("\n"))
    return lines["id"], lines["event"], json.loads(lines["data"])


def told(events, job=RUNNING, last=None, count=None):
    """What a stream tells of a job: the first `count` events, or all to its end."""

    async def listen():
        heard = []
        stream = events.stream(job.id, lambda _: job, last)
        async for text in stream:
            heard.append(parsed(text))
            if len(heard) == count:
                await stream.aclose()
                break
        return heard

    return asyncio.run(asyncio.wait_for(listen(), 5))


def steps(heard):
    return [data["step"] for _, name, data in heard if name == "progress"]


def test_a_stream_goes_on_after_the_last_event_that_was_received():
    events = Events()
    ((first, name, data),) = told(events, count=1)
    assert (name, data["state"]) == ("job", "running")
    for step in range(5):
        events.progress(JOB, {"step": step})
        events.progress("job-of another", {"step": -1})
    heard = told(events, last=first, count=2)
    assert steps(heard) == [0, 1]
    events.changed(DONE)
    heard = told(events, DONE, last=heard[-1][0])
    assert steps(heard) == [2, 3, 4]
    assert (heard[-1][1], heard[-1][2]["state"]) == ("job", "succeeded")
    # Who has heard the end hears no more.
    assert told(events, DONE, last=heard[-1][0]) == []
    assert len({one for one, _, _ in heard}) == len(heard)


def test_what_is_told_live_is_told_once():
    """What comes between the past and the present of a stream is neither missed nor repeated."""
    events = Events()
    ((first, _, _),) = told(events, count=1)
    events.progress(JOB, {"step": 0})

    async def listen():
        heard = []
        async for text in events.stream(JOB, lambda _: RUNNING, first):
            heard.append(parsed(text))
            if len(heard) < 4:
                events.progress(JOB, {"step": len(heard)})
            else:
                events.changed(DONE)
        return heard

    heard = asyncio.run(asyncio.wait_for(listen(), 5))
    assert steps(heard) == [0, 1, 2, 3]
    assert heard[-1][1] == "job"


@pytest.mark.parametrize(
    "last", ["", "x", "0", "12345678-1", "{start}-", "{start}-x", "{start}--1", "{start}-99", "{start}-1e3"]
)
def test_after_an_id_that_is_not_known_a_stream_begins_with_the_job(last):
    """Of another start of the service, or none at all."""
    events = Events()
    ((first, _, _),) = told(events, count=1)
    events.progress(JOB, {"step": 0})
    ((_, name, data),) = told(events, last=last.format(start=first.partition("-")[0]), count=1)
    assert (name, data["progress"]) == ("job", {"step": 0})


def test_a_stream_that_is_too_far_behind_begins_with_the_job():
    events = Events()
    ((first, _, _),) = told(events, count=1)
    for step in range(QUEUE):
        events.progress(JOB, {"step": step})
    heard = told(events, last=first, count=QUEUE)
    assert steps(heard) == list(range(QUEUE))
    events.progress(JOB, {"step": QUEUE})
    assert told(events, last=first, count=1)[0][1] == "job"
    assert steps(told(events, last=heard[0][0], count=QUEUE)) == list(range(1, QUEUE + 1))


def test_events_of_jobs_that_have_ended_are_forgotten_in_time():
    events = Events()
    jobs = [DONE.model_copy(update={"id": f"job-{number:016d}"}) for number in range(ENDED + 5)]
    ids = []
    for job in jobs:
        running = job.model_copy(update={"state": "running"})
        ids.append(told(events, running, count=1)[0][0])
        events.progress(job.id, {"step": 1})
        events.changed(job)
    events.progress(JOB, {"step": 1})
    assert len(events._histories) == ENDED + 1
    for job, last in zip(jobs, ids, strict=True):
        names = [name for _, name, _ in told(events, job, last=last)]
        assert names == (["job"] if job in jobs[:5] else ["progress", "job"])
    events.forget(jobs[-1].id)
    assert [name for _, name, _ in told(events, jobs[-1], last=ids[-1])] == ["job"]


def test_a_stream_over_http_goes_on(tmp_path):
    with service(tmp_path) as http:
        own = http.app.state.service
        job, _ = own.store.enqueue("plan", "none", {"n": 1}, content=None, key=None, waiting=9)
        own.events.changed(job)
        own.events.progress(job.id, {"step": 1})
        own.events.changed(own.store.finish(job.id, "succeeded", result={}))
        path = f"/v1/jobs/{job.id}/events"
        (whole,) = http.get(path).text.strip().split("\n\n")
        last, name, data = parsed(whole)
        assert (name, data["state"]) == ("job", "succeeded")
        assert http.get(path, headers={"Last-Event-ID": last}).text == ""
        start, _, number = last.partition("-")
        text = http.get(path, headers={"Last-Event-ID": f"{start}-{int(number) - 2}"}).text
        assert [parsed(part)[1] for part in text.strip().split("\n\n")] == ["progress", "job"]
        assert http.get(path, headers={"Last-Event-ID": "of another time"}).text == f"{whole}\n\n"


def test_the_client_goes_on_after_the_last_event_that_it_has_received(monkeypatch):
    """One of which it has the id alone it has not received. Followed anew, a job is told from the start."""
    monkeypatch.setattr("tightfit.planner.service.client.RETRY_SECONDS", 0.0)
    running, done = RUNNING.model_dump_json(), DONE.model_dump_json()
    texts = [
        f"event: job\nid: a-1\ndata: {running}\n\nevent: progress\nid: a-2\ndata: {{}}\n\nevent: progress\nid: a-3\n",
        f"event: progress\nid: a-3\ndata: {{}}\n\nevent: job\nid: a-4\ndata: {done}\n\n",
        f"event: job\nid: a-4\ndata: {done}\n\n",
    ]
    asked = []

    def answer(request):
        asked.append(request.headers.get("Last-Event-ID"))
        return httpx.Response(200, text=texts[len(asked) - 1])

    with Client("http://planner", token=None, timeout=1.0) as client:
        client._http = httpx.Client(base_url=client.url, transport=httpx.MockTransport(answer))
        assert [name for name, _ in client.events(JOB)] == ["job", "progress", "progress", "job"]
        assert [name for name, _ in client.events(JOB)] == ["job"]
    assert asked == [None, "a-2", None]
