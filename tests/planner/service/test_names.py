"""What is kept has names that people give it, and labels where they give none; lists are searched and come in pages."""

from __future__ import annotations

import json

import pytest
from served import service
from synthetic import small_chain

from tightfit.planner.service.jobs.labels import job_label
from tightfit.planner.service.jobs.store import file_row
from tightfit.planner.service.wire.schema import JOB

SUMMARIES = {
    "profile": {"policies": ["solver"], "batch": 16, "seq": 64, "lora": {"rank": 8}},
    "plan": {"status": "optimal", "budget_bytes": 350 << 20, "policy": "mebp", "explanation": None},
}
"""kind of a file -> the summary of one"""
NAMES = {"profile": "tiny", "plan": "tiny, mebp"}
LABELS = {
    "profile": "tiny, LoRA rank 8, batch 16, sequence 64",
    "plan": "tiny in 350.0 MiB, mebp",
}


def identity_of(kind, number=0):
    return f"{['profile', 'plan'].index(kind)}{number:063d}"


def keep(own, kind, number=0):
    """Store a file of a kind; every plan is of the first profile."""
    written = own.objects.put(f"{kind} {number}".encode())
    origin = {"profile": "made", "plan": identity_of("profile")}.get(kind)
    row = file_row(kind, identity_of(kind, number), written, name=NAMES[kind], summary=SUMMARIES[kind], origin=origin)
    return own.store.add(row)["id"]


def ask(own, kind, request):
    return own.store.enqueue(kind, "none", request, content=None, key=None, waiting=10**6)[0].id


@pytest.fixture(scope="module")
def http(tmp_path_factory):
    with service(tmp_path_factory.mktemp("names")) as opened:
        for kind in NAMES:
            keep(opened.app.state.service, kind)
        yield opened


@pytest.fixture(scope="module")
def own(http):
    return http.app.state.service


@pytest.mark.parametrize("kind", sorted(NAMES))
def test_a_file_is_called_by_the_name_that_it_is_given(http, own, kind):
    path = f"/v1/{kind}s/{identity_of(kind)}"
    before = http.get(path).json()
    assert (before["title"], before["note"], before["label"]) == (None, None, LABELS[kind])
    named = http.patch(path, json={"title": "  the phone's ☎ ", "note": "first\nsecond"}).json()
    assert named == before | {"title": "the phone's ☎", "note": "first\nsecond"}
    assert http.patch(path, json={"title": None}).json() == before | {"note": "first\nsecond"}
    assert http.patch(path, json={}).json()["note"] == "first\nsecond"
    # Made or uploaded again, it keeps its name.
    http.patch(path, json={"title": "mine"})
    keep(own, kind)
    assert http.get(path).json()["title"] == "mine"
    assert http.get(f"/v1/{kind}s").json()["items"][0]["title"] == "mine"
    http.patch(path, json={"title": None, "note": None})


def test_a_job_is_called_by_its_name_and_others_hear_of_it(http, own):
    job = ask(own, "run", {"plan": identity_of("plan"), "data": "/srv/data/reviews.jsonl"})
    path = f"/v1/jobs/{job}"
    assert http.get(path).json()["label"] == "tiny on reviews.jsonl in 350.0 MiB"
    sent = []
    own.events._pass_on = lambda job, event: sent.append((event.name, json.loads(event.data)["title"]))
    named = http.patch(path, json={"title": "third try"}).json()
    del own.events._pass_on
    assert (named["title"], named["state"]) == ("third try", "queued")
    assert sent == [("job", "third try")]
    assert http.get(f"/v1/jobs/{job}").json()["title"] == "third try"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"title": ""}, "body.title"),
        ({"title": "   "}, "body.title"),
        ({"title": "two\nlines"}, "body.title"),
        ({"title": "x" * 201}, "body.title"),
        ({"title": 1}, "body.title"),
        ({"note": "x" * 10_001}, "body.note"),
        ({"note": "\ud800"}, "body.note"),
        ({"name": "x"}, "body.name"),
    ],
)
def test_a_name_that_is_none_is_refused(http, body, field):
    content = json.dumps(body)
    answer = http.patch(
        f"/v1/plans/{identity_of('plan')}", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["fields"][0]["field"] == field


def test_what_is_not_there_has_no_name(http):
    for path in (*(f"{kind}s/{'f' * 64}" for kind in NAMES), f"jobs/{JOB}"):
        assert http.patch(f"/v1/{path}", json={"title": "x"}).status_code == 404, path


def pages(http, path, **query):
    """The ids of a list, page by page."""
    query |= {"limit": 2}
    while query is not None:
        answer = http.get(path, params=query).json()
        yield [item["id"] for item in answer["items"]]
        query = None if answer["next"] is None else query | {"after": answer["next"]}


@pytest.mark.slow
def test_lists_come_in_pages(tmp_path):
    """Nothing is missed or told twice, though it is stored at the same moment, and what is new does not move the
    pages.
    """
    with service(tmp_path) as http:
        own = http.app.state.service
        numbers = range(5)
        files = [keep(own, "profile", number) for number in numbers]
        own.store._database.execute("UPDATE files SET created = 1790000000.1234567")
        listing = pages(http, "/v1/profiles")
        assert next(listing) == [files[4], files[3]]
        keep(own, "profile", 9)
        assert list(listing) == [[files[2], files[1]], [files[0]]]
        jobs = [ask(own, "run" if number % 2 else "comparison", {"n": number}) for number in numbers]
        listing = pages(http, "/v1/jobs")
        assert next(listing) == [jobs[4], jobs[3]]
        ask(own, "run", {})
        assert list(listing) == [[jobs[2], jobs[1]], [jobs[0]]]
        assert list(pages(http, "/v1/jobs", kind="comparison", state="queued")) == [
            [jobs[4], jobs[2]],
            [jobs[0]],
        ]
        # A page that what is left fills is the last.
        assert http.get("/v1/jobs", params={"limit": 6}).json()["next"] is None
        for after in ("x", "1", f"1e5_{JOB}", "1_"):
            answer = http.get("/v1/jobs", params={"after": after})
            assert (answer.status_code, answer.json()["error"]["fields"][0]["field"]) == (422, "query.after")


def test_lists_are_searched(tmp_path):
    with service(tmp_path) as http:
        own = http.app.state.service
        keep(own, "profile")
        plans = [keep(own, "plan", number) for number in range(3)]
        http.patch(f"/v1/plans/{plans[0]}", json={"title": "Für das Telefon", "note": "slow % of it"})
        run = ask(own, "run", {"plan": plans[0], "data": "/srv/private/reviews.jsonl"})

        def found(what, search, **query):
            return [item["id"] for item in http.get(f"/v1/{what}", params={"search": search} | query).json()["items"]]

        assert found("plans", "telefon") == found("plans", "FÜR slow") == found("plans", "%") == [plans[0]]
        assert found("plans", "telefon slower") == []
        assert found("plans", "mebp") == found("plans", " ") == plans[::-1]
        assert found("plans", plans[2]) == [plans[2]]
        assert found("plans", "mebp", profile="f" * 64) == []
        assert found("jobs", "tiny reviews") == [run]
        assert found("jobs", "private") == []  # where it lies is told to nobody
        listing = pages(http, "/v1/plans", search="mebp")
        assert list(listing) == [[plans[2], plans[1]], [plans[0]]]


def test_plans_that_nobody_asked_for_can_be_left_out(tmp_path):
    """What a comparison alone has made, and the answer to a budget of one byte, which asks for the smallest."""
    with service(tmp_path) as http:
        store = http.app.state.service.store
        rows = {}
        for name, kind, summary in (
            ("asked for", "plan", {}),
            ("smallest", "plan", {"budget_bytes": 1}),
            ("compared", "comparison", {}),
            ("compared and run", "comparison", {}),
            ("compared and named", "comparison", {}),
        ):
            identity, written = identity_of("plan", len(rows)), http.app.state.service.objects.put(name.encode())
            file = file_row("plan", identity, written, name=name, summary=SUMMARIES["plan"] | summary)
            store.finish(ask(http.app.state.service, kind, {}), "succeeded", result={}, files=[file])
            rows[identity] = name
        run = rows_by_name(rows)["compared and run"]
        store.enqueue("run", "none", {"plan": run}, content=None, key=None, waiting=9, uses=[("plan", run)])
        http.patch(f"/v1/plans/{rows_by_name(rows)['compared and named']}", json={"title": "mine"})

        def told(**query):
            return [rows[identity] for page in pages(http, "/v1/plans", **query) for identity in page]

        assert told() == list(rows.values())[::-1]
        assert told(asked=True) == ["compared and named", "compared and run", "asked for"]
        assert told(asked=True, search="mine") == ["compared and named"]


def rows_by_name(rows):
    return {name: identity for identity, name in rows.items()}


FILES = {
    ("profile", "p"): {"kind": "profile", "name": "tiny", "origin": "made", "summary": "{}"},
    ("plan", "q"): {"kind": "plan", "name": "tiny", "origin": "p", "summary": json.dumps({"budget_bytes": 1 << 20})},
    ("plan", "gone"): {
        "kind": "plan",
        "name": "tiny",
        "origin": "removed",
        "summary": json.dumps({"budget_bytes": 1 << 20}),
    },
    ("upload", "u"): {"kind": "upload", "name": "mine.csv", "origin": None, "summary": "{}"},
}


@pytest.mark.parametrize(
    ("kind", "request_fields", "label"),
    [
        ("run", {"plan": "q", "data": "/a/b c/folder"}, "tiny on folder in 1.0 MiB"),
        ("run", {"plan": "q", "data": "upload:u"}, "tiny on mine.csv in 1.0 MiB"),
        ("run", {"plan": "q", "data": "upload:lost"}, "tiny on upload:lost in 1.0 MiB"),
        ("run", {"plan": "gone", "data": "x"}, "a model on x in 1.0 MiB"),
        ("plan", {"profile": "p", "memory": 3 << 20, "policy": "mesp"}, "tiny in 3.0 MiB, mesp"),
        ("plan", {"profile": "lost", "memory": 3 << 20, "policy": "solver"}, "a model in 3.0 MiB"),
        ("comparison", {"profile": "p", "memory": [1 << 20, 3 << 20], "policies": []}, "tiny in 1.0 MiB to 3.0 MiB"),
        ("comparison", {"profile": "p", "memory": [1], "policies": []}, "tiny"),  # what the smallest budget is
        ("bundle", {"model": "other", "description": "p"}, "other"),
        ("profile", {"source": "/srv/models/small.gguf", "batch": 2, "seq": 8}, "small.gguf, batch 2, sequence 8"),
        ("profile", {"source": "org/name", "batch": 1, "seq": None}, "name, batch 1"),
        ("profile", {"config": {"model_type": "llama"}, "batch": 1}, "llama of a config, batch 1"),
        ("run", {}, "a model"),
    ],
)
def test_a_job_is_labelled_by_what_it_is_of(kind, request_fields, label):
    assert job_label(kind, request_fields, lambda kind, identity: FILES.get((kind, identity))) == label


def test_a_profile_that_is_uploaded_is_labelled(http):
    told = http.post("/v1/uploads/profile", json=small_chain(3, layers=2).model_dump(mode="json")).json()
    assert told["label"].startswith(f"{told['name']}, ")
    assert (told["title"], told["note"]) == (None, None)
