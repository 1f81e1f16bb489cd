"""Whatever a request holds, and whatever has become of what is stored, no lane stops and every list is answered: what
could not be shown is not stored, and what cannot be read any more is set aside by name.
"""

from __future__ import annotations

import json
import time

import pytest
from damage import CONFIG
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from served import service
from synthetic import small_chain

from tightfit.planner.service.jobs.store import JobStore, file_row, listed
from tightfit.planner.service.jobs.supervisor import Supervisor
from tightfit.planner.service.wire.errors import ServiceError
from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.planner.service.wire.schema import Error

PATIENCE = 30.0
"""seconds"""
ROUTES = (
    "profiles",
    "bundles",
    "plans",
    "comparisons",
    "answer-plans",
    "runs",
    "uploads/profile",
    "uploads/description",
)
TEXT = st.text(st.characters(exclude_categories=())) | st.sampled_from(["\ud800", "\0", "", "a" * 5000])
LEAVES = TEXT | st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from([10**400, -0.0, 1e308])
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))


def nested(depth, inner, kind):
    for _ in range(depth):
        inner = [inner] if kind == "list" else {"a": inner}
    return inner


ANYTHING = st.builds(nested, st.integers(0, 400), TREES, st.sampled_from(["list", "object"]))
GENERATED = settings(
    max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def http(tmp_path_factory):
    """A service whose jobs end as soon as they are taken."""

    async def carry_out(self, job, lane):
        self._announce(self.store.finish(job.id, "failed", error=Error(code="input", message="not tried")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supervisor, "_carry_out", carry_out)
        with service(tmp_path_factory.mktemp("any")) as opened:
            yield opened


def ended(http, job):
    until = time.monotonic() + PATIENCE
    while http.get(f"/v1/jobs/{job}").json()["state"] in {"queued", "running"}:
        assert time.monotonic() < until
        time.sleep(0.01)


def send(http, route, body):
    """The answer to a body as Python writes it: NaN and halves of characters too."""
    return http.post(f"/v1/{route}", content=json.dumps(body), headers={"Content-Type": "application/json"})


def check_it_goes_on(http, answer):
    assert answer.status_code < 500, answer.text
    if answer.status_code == 202:
        ended(http, answer.json()["id"])
    else:
        assert answer.json()["error"]["message"]
    assert http.get("/v1/jobs?limit=1000").status_code == 200


@GENERATED
@given(route=st.sampled_from(ROUTES), body=ANYTHING)
def test_any_body_is_answered(http, route, body):
    check_it_goes_on(http, send(http, route, body))


@GENERATED
@given(inside=ANYTHING, name=TEXT)
def test_any_config_is_refused_or_becomes_a_job_that_ends(http, inside, name):
    check_it_goes_on(http, send(http, "profiles", {"config": CONFIG | {"extra": inside, name: 1}}))


@pytest.mark.parametrize(
    "extra", [nested(300, 1, "list"), nested(61, 1, "list"), "\ud800", {"\udfff": 1}, float("nan")]
)
def test_what_cannot_be_repeated_as_json_is_no_job(http, extra):
    """One such request stopped every list and the device's lane, over restarts too."""
    answer = send(http, "profiles", {"config": CONFIG | {"extra": extra}})
    fine = isinstance(extra, float) or extra == nested(61, 1, "list")
    assert answer.status_code == (202 if fine else 422), answer.text
    check_it_goes_on(http, answer)


def test_a_request_may_be_64_levels_deep(http):
    """The body, the config and what is in it."""
    for depth, status in ((62, 202), (63, 422)):
        assert send(http, "profiles", {"config": CONFIG | {"x": nested(depth, 1, "object")}}).status_code == status


@pytest.mark.slow
@GENERATED
@given(value=ANYTHING)
def test_what_is_stored_can_be_shown(tmp_path_factory, value):
    """Whoever asks the store, by whichever door: requests and results."""
    folder = tmp_path_factory.mktemp("store")
    store = JobStore(folder / "s.sqlite", ObjectStore(folder / "objects"))
    try:
        job, _ = store.enqueue("plan", "solve", {"value": value}, content=None, key=None, waiting=9)
    except ServiceError as refusal:
        assert (refusal.status, refusal.field) == (422, "body")
        job, _ = store.enqueue("plan", "solve", {}, content=None, key=None, waiting=9)
    store.next("solve")
    try:
        store.finish(job.id, "succeeded", result={"value": value})
    except ValueError:
        store.finish(job.id, "failed", error=Error(code="internal", message="not shown"))
    assert store.jobs().items[0].model_dump_json()
    assert store.set_aside() == []
    store.close()


COLUMNS = (
    "kind",
    "state",
    "request",
    "result",
    "error",
    "created",
    "started",
    "attempts",
    "id",
    "title",
    "note",
    "label",
)
VALUES = st.none() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.binary() | st.text() | ANYTHING.map(json.dumps)


@pytest.mark.slow
@GENERATED
@given(column=st.sampled_from(COLUMNS), value=VALUES, blob=st.booleans())
def test_a_stored_job_that_cannot_be_read_is_set_aside_by_name(tmp_path_factory, column, value, blob):
    folder = tmp_path_factory.mktemp("store")
    store = JobStore(folder / "s.sqlite", ObjectStore(folder / "objects"))
    first, second = (
        store.enqueue("plan", "solve", {"n": number}, content=None, key=None, waiting=9)[0].id for number in range(2)
    )
    if isinstance(value, bytes) and not blob:
        statement = f"UPDATE jobs SET {column} = CAST(? AS TEXT) WHERE id = ?"
    else:
        statement = f"UPDATE jobs SET {column} = ? WHERE id = ?"
    try:
        store._database.execute(statement, (value, first))
    except Exception:  # what the database itself refuses
        store.close()
        return
    for _ in range(2):
        listed = [job.id for job in store.jobs().items]
        assert second in listed
        if first not in listed and column != "id":
            assert store.set_aside() == [first]
            with pytest.raises(ServiceError, match="could not be read and was set aside as set-aside/job-"):
                store.job(first)
        store.close()
        store = JobStore(folder / "s.sqlite", ObjectStore(folder / "objects"))
        store.recover()
    taken = []
    while (job := store.next("solve")) is not None:
        taken.append(job.id)
    assert taken[-1] == second
    assert len(taken) + len(store.set_aside()) <= 2
    store.close()


def test_what_is_set_aside_is_told_and_stops_nothing_over_restarts(tmp_path, caplog):
    with service(tmp_path) as http:
        store = http.app.state.service.store
        bad, _ = store.enqueue("run", "cpu", {}, content=None, key="k", waiting=9)
        request = json.dumps({"config": nested(300, 1, "list")})
        store._database.execute("UPDATE jobs SET request = ? WHERE id = ?", (request, bad.id))
    folder = tmp_path / "data" / "runs" / bad.id
    folder.mkdir()
    for _ in range(2):
        with service(tmp_path) as http:
            told = http.get("/v1/jobs").json()
            assert (told["items"], told["set_aside"]) == ([], [bad.id])
            assert http.get("/healthz").json()["set_aside"] == [bad.id]
            answer = http.get(f"/v1/jobs/{bad.id}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
            http.app.state.service.supervisor.retain()
            job, _ = http.app.state.service.store.enqueue(
                "run", "cpu", {"plan": "0" * 64}, content=None, key=None, waiting=9
            )
            http.app.state.service.supervisor.wake("cpu")
            ended(http, job.id)
            http.app.state.service.store._database.execute("DELETE FROM jobs")
    kept = json.loads((tmp_path / "data" / "set-aside" / f"{bad.id}.json").read_text())
    assert kept["request"] == request
    assert folder.is_dir()  # what it had saved
    (line,) = [record for record in caplog.records if record.message == "cannot be read: set aside"]
    assert line.what == bad.id


SUMMARIES = {
    "profile": {"policies": ["solver"]},
    "plan": {
        "status": "optimal",
        "policy": "solver",
        "budget_bytes": 1,
        "explanation": None,
        "step_seconds": float("inf"),
    },
    "report": {},
}
"""kind of a file -> the summary of one"""
ORIGINS = {"profile": "made", "plan": "0" * 64}
FILE_COLUMNS = (
    *(
        "kind",
        "id",
        "digest",
        "bytes",
        "stored_bytes",
        "name",
        "origin",
        "summary",
        "paths",
        "created",
        "used",
        "title",
        "note",
    ),
)


@pytest.mark.slow
@settings(GENERATED, max_examples=120)
@given(kind=st.sampled_from(sorted(SUMMARIES)), column=st.sampled_from(FILE_COLUMNS), value=VALUES, blob=st.booleans())
@example(kind="profile", column="summary", value='{"policies": ["solver"', blob=False)
@example(kind="plan", column="summary", value='{"status": "optimal"}', blob=False)
@example(kind="plan", column="digest", value=b"\xff", blob=False)
@example(kind="report", column="stored_bytes", value="many", blob=False)
@example(kind="profile", column="paths", value="[" * 300 + "]" * 300, blob=False)
@example(kind="plan", column="id", value=b"\xff\0", blob=False)
@example(kind="plan", column="kind", value=b"plan", blob=True)
def test_a_stored_file_that_cannot_be_read_is_set_aside_by_name(tmp_path_factory, kind, column, value, blob):
    folder = tmp_path_factory.mktemp("store")
    objects = ObjectStore(folder / "objects")
    store = JobStore(folder / "s.sqlite", objects)
    first, second = "1" * 64, "2" * 64
    for other, summary in SUMMARIES.items():
        for identity in (first, second):
            written = objects.put(f"{other} {identity}".encode())
            store.add(file_row(other, identity, written, name="n", summary=summary, origin=ORIGINS.get(other)))
    kept = store.digests()
    placed = "CAST(? AS TEXT)" if isinstance(value, bytes) and not blob else "?"
    try:
        store._database.execute(f"UPDATE files SET {column} = {placed} WHERE kind = ? AND id = ?", (value, kind, first))
    except Exception:  # what the database itself refuses
        store.close()
        return
    for _ in range(2):
        for other in ("profile", "plan"):
            found = [listed(row) for row in store.files(other).items]
            assert second in [one.id for one in found]
            assert all(one.model_dump_json() for one in found)
            if other == kind and column not in {"kind", "id"} and first not in [one.id for one in found]:
                assert store.set_aside() == store.set_aside(kind) == [f"{kind}-{first}"]
                assert "could not be read and was set aside as set-aside/" in str(store.missing(kind, first))
        store.close()
        store = JobStore(folder / "s.sqlite", ObjectStore(folder / "objects"))
        store.recover()
        assert store.expire(before=-1e300, keep_bytes=1 << 62) == []
        left = store._count("SELECT count(*) AS n FROM files")
        assert left + len(store.set_aside()) == 2 * len(SUMMARIES)
        if column != "digest":
            assert store.digests() == kept  # what it holds may still be of use to somebody
    store.close()


PLACES = [
    ("model", "name"),
    ("model", "config", "x"),
    ("model", "lora"),
    ("model", "rounding"),
    ("model", "source"),
    ("device", "name"),
    ("device", "label"),
    ("optimizer", "x"),
    ("fingerprint",),
    ("batch",),
    ("x",),
]


@pytest.mark.slow
@settings(GENERATED, max_examples=10)
@given(place=st.sampled_from(PLACES), value=ANYTHING)
@example(place=("model", "name"), value="\ud800")
@example(place=("model", "config", "x"), value="\ud800")
@example(place=("model", "lora"), value={"rank": 8, "x": float("nan")})
@example(place=("model", "lora"), value=nested(61, 1, "object"))
def test_any_profile_is_refused_or_listed(http, place, value):
    body = small_chain(3, layers=2).model_dump(mode="json")
    inside = body
    for name in place[:-1]:
        inside = inside[name]
    inside[place[-1]] = value
    answer = send(http, "uploads/profile", body)
    assert answer.status_code < 500, answer.text
    assert http.get("/v1/profiles").status_code == 200
    if answer.status_code in {200, 201}:
        identity = answer.json()["id"]
        for path in (identity, f"{identity}/file"):
            assert http.get(f"/v1/profiles/{path}").status_code == 200
        check_it_goes_on(http, send(http, "plans", {"profile": identity, "memory": "1GiB"}))
