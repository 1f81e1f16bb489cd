from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import sqlite3
import time

import pytest

from tightfit.planner.service.jobs.paths import confined
from tightfit.planner.service.jobs.store import (
    ATTEMPTS,
    JobStore,
    cache_row,
    content_key,
    file_row,
    folder_row,
)
from tightfit.planner.service.jobs.tables import SCHEMA
from tightfit.planner.service.wire.errors import ServiceError, StorageError, UnreadableError
from tightfit.planner.service.wire.objects import ObjectStore, unpacked
from tightfit.planner.service.wire.schema import Error
from tightfit.planner.service.wire.settings import Settings, loopback
from tightfit.runtime.common.errors import InputError

LANE = "solve"
OWN = "1" * 64
"""id of a file"""
PROFILE, PLAN = {"policies": []}, {"status": "optimal", "policy": "solver", "budget_bytes": 1, "explanation": None}
"""summaries"""


@pytest.fixture
def store(tmp_path, objects):
    opened = JobStore(tmp_path / "s.sqlite", objects)
    yield opened
    opened.close()


@pytest.fixture
def objects(tmp_path):
    return ObjectStore(tmp_path / "objects")


def ask(store, number=1, *, key=None, repeatable=False, waiting=100, uses=(), anew=False):
    request = {"number": number}
    content = None if repeatable else content_key("plan", request | ({"force": True} if anew else {}))
    renews = content_key("plan", request) if anew else None
    return store.enqueue("plan", LANE, request, content=content, key=key, waiting=waiting, uses=uses, renews=renews)


def keep(store, objects, identity, size=100, **more):
    written = objects.put(identity.encode() * size)
    return store.add(file_row("report", identity, written, name=identity, summary={}, **more))


def test_equal_requests_are_one_job_until_it_fails(store):
    first, new = ask(store)
    assert new
    assert ask(store) == (first, False)
    assert ask(store, 2)[0].id != first.id
    store.finish(first.id, "failed", error=Error(code="input", message="no"))
    again, new = ask(store)
    assert new
    assert again.id != first.id


def test_an_answer_that_is_made_anew_answers_from_then_on(store):
    """Asked for twice while it is made it is one job; afterwards it can be made anew again."""
    old, _ = ask(store)
    store.finish(old.id, "succeeded", result={})
    other, _ = ask(store, 2)
    store.finish(other.id, "succeeded", result={})
    renewed, new = ask(store, anew=True)
    assert new
    assert ask(store, anew=True)[0].id == renewed.id
    # Who only asks waits for a job of its own behind it, which finds what was made last.
    after, new = ask(store)
    assert new
    assert after.id not in {old.id, renewed.id}
    for job in (renewed, after):
        store.finish(job.id, "succeeded", result={})
    assert ask(store)[0].id == after.id
    again, new = ask(store, anew=True)
    assert new
    assert again.id != renewed.id
    assert store.job(old.id).state == "succeeded"
    assert ask(store, 2)[0].id == other.id


def test_an_idempotency_key_names_one_request(store):
    first, new = ask(store, key="k", repeatable=True)
    assert new
    assert ask(store, key="k", repeatable=True) == (first, False)
    assert ask(store, repeatable=True)[1]
    with pytest.raises(ServiceError, match="the idempotency key 'k' was used for another request") as caught:
        ask(store, 2, key="k", repeatable=True)
    assert (caught.value.status, caught.value.field) == (409, "header.Idempotency-Key")
    # Also once the job has failed: the key stands for that very attempt.
    store.finish(first.id, "failed", error=Error(code="input", message="no"))
    assert ask(store, key="k", repeatable=True)[0].state == "failed"


def test_a_key_that_joins_a_job_stands_for_it(store):
    first, _ = ask(store)
    assert ask(store, key="k") == (first, False)
    store.finish(first.id, "failed", error=Error(code="input", message="no"))
    assert ask(store, key="k")[0].id == first.id


def test_what_is_asked_for_again_counts_as_used(store, objects):
    job, _ = ask(store)
    store.finish(job.id, "succeeded", result={})
    keep(store, objects, "plan")
    store.flush()
    moment = time.time()
    assert ask(store)[0].id == job.id
    assert store.file("report", "plan") is not None
    assert store.expire(before=moment, keep_bytes=1 << 40) == []
    assert store.job(job.id).state == "succeeded"
    assert store.expire(before=time.time(), keep_bytes=1 << 40) != []
    assert not store._touched


def test_jobs_are_taken_in_their_order_and_end_once(store):
    ids = [ask(store, number)[0].id for number in range(3)]
    assert [store.next(LANE).id for _ in ids] == ids
    assert store.next(LANE) is None
    assert store.next("cpu") is None
    assert store.finish(ids[0], "succeeded", result={"a": 1}).result == {"a": 1}
    assert store.finish(ids[0], "failed", files=[folder_row(ids[0], 5000)]).state == "succeeded"
    assert store.requeue(ids[0], counted=True).state == "succeeded"
    assert store.stored_bytes() == 0
    assert store.lane(LANE) == (ids[1], 0)


def test_a_full_queue_refuses(store):
    ask(store, 1, waiting=1)
    with pytest.raises(ServiceError, match="1 jobs are waiting already") as caught:
        ask(store, 2, waiting=1)
    assert caught.value.status == 429
    assert ask(store, 1, waiting=1)[1] is False


def test_what_is_measured_here_counts_as_made_whoever_uploaded_it_before(store, objects):
    for origin, kept in (("uploaded", "uploaded"), ("made", "made"), ("uploaded", "made")):
        written = objects.put(b"a profile")
        row = store.add(file_row("profile", OWN, written, name="p", summary=PROFILE, origin=origin))
        assert row["origin"] == kept
    # A plan's origin is the profile that it was made from.
    for origin in (OWN, "0" * 64):
        written = objects.put(b"a plan")
        row = store.add(file_row("plan", OWN, written, name="p", summary=PLAN, origin=origin))
        assert row["origin"] == OWN


def test_what_ran_waits_again_but_not_for_ever(store):
    job, _ = ask(store)
    for attempt in range(1, ATTEMPTS + 1):
        assert store.next(LANE).attempts == attempt
        requeued, interrupted = store.recover()
        assert (requeued, interrupted) == ((1, 0) if attempt < ATTEMPTS else (0, 1))
    ended = store.job(job.id)
    assert ended.state == "interrupted"
    assert ended.error.code == "interrupted"
    # Ended by the service itself, an attempt does not count.
    other, _ = ask(store, 2)
    for _ in range(ATTEMPTS + 2):
        store.next(LANE)
        assert store.requeue(other.id, counted=False).attempts == 0


def test_what_was_acknowledged_is_there_for_another_connection(store, tmp_path):
    job, _ = ask(store)
    other = JobStore(tmp_path / "s.sqlite", store._objects)
    assert other.job(job.id) == job
    other.close()
    assert store._database.execute("PRAGMA synchronous").fetchone() == {"synchronous": 2}  # FULL
    with contextlib.closing(sqlite3.connect(tmp_path / "s.sqlite")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    ("code", "raised"),
    [
        (sqlite3.SQLITE_FULL, StorageError),
        (sqlite3.SQLITE_IOERR_WRITE, StorageError),
        (sqlite3.SQLITE_CONSTRAINT, sqlite3.OperationalError),
    ],
)
def test_a_transaction_that_fails_changes_nothing_and_a_disk_that_refuses_is_told(store, code, raised):
    error = sqlite3.OperationalError("no")
    error.sqlite_errorcode = code

    def fail():
        with store._transaction():
            store._add(folder_row("job-1", 1000), 0.0)
            raise error

    with pytest.raises(raised):
        fail()
    assert store.stored_bytes() == 0


def test_a_database_that_is_none_is_told(tmp_path, objects):
    path = tmp_path / "s.sqlite"
    path.write_bytes(b"no database at all, but long enough to be one" * 30)
    with pytest.raises(InputError, match=r"s\.sqlite: damaged \(file is not a database\); restore it, or name another"):
        JobStore(path, objects)


def test_the_schema_has_a_version(tmp_path, objects):
    path = tmp_path / "s.sqlite"
    JobStore(path, objects).close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA,)
        for other in (SCHEMA - 1, SCHEMA + 1):
            database.execute(f"PRAGMA user_version = {other}")
            with pytest.raises(
                InputError, match=rf"written by another version of tightfit \(schema {other}, this one has {SCHEMA}\)"
            ):
                JobStore(path, objects)


def test_objects_appear_whole_under_their_digest(objects):
    written = objects.put(b"abc" * 1000)
    assert written.bytes == 3000
    with pytest.raises(UnreadableError):
        objects.read(written.digest)
    objects.place(written.digest, written.staged)
    objects.place(written.digest, written.staged)  # as where a transaction failed
    objects.unstage(written.staged)
    assert objects.read(written.digest) == b"abc" * 1000
    assert b"".join(objects.unpack(written.digest)) == b"abc" * 1000
    assert gzip.decompress(objects.packed(written.digest)) == b"abc" * 1000
    again, other = objects.put(b"abc" * 1000), objects.put(b"other")
    assert (again.digest, again.stored_bytes) == (written.digest, written.stored_bytes)
    objects.place(other.digest, other.staged)
    assert objects.sweep({written.digest}) == 3
    assert objects.read(written.digest)
    with pytest.raises(UnreadableError, match="No such file"):
        objects.read(other.digest)


def test_bombs_are_refused_before_they_unfold():
    def unpack(content, limit, encoding="gzip"):
        return b"".join(unpacked(io.BytesIO(content), encoding, limit))

    bomb = gzip.compress(b"\0" * (64 << 20), 9)
    assert len(bomb) < 70_000
    with pytest.raises(ServiceError, match="unpacks to more than 1048576 bytes") as caught:
        unpack(bomb, 1 << 20)
    assert caught.value.status == 413
    long = os.urandom(3 << 20)
    assert unpack(gzip.compress(long), len(long)) == unpack(long, len(long), "identity") == long
    for content, told in (
        (gzip.compress(b"x" * 10_000)[:-9], "cut off"),
        (gzip.compress(b""), None),
        (b"", "cut off"),
        (b"hello", "not gzip"),
    ):
        if told is None:
            assert unpack(content, 1 << 20) == b""
            continue
        with pytest.raises(ServiceError, match=told) as caught:
            unpack(content, 1 << 20)
        assert caught.value.status == 400


def test_retention_by_age_spares_what_live_jobs_need(store, objects):
    for name in ("old", "needed", "new"):
        keep(store, objects, name)
    done, _ = ask(store, 1)
    store.next(LANE)
    store.finish(done.id, "succeeded", result={})
    live, _ = ask(store, 2, uses=[("report", "needed")])
    store.flush()
    moment = time.time() + 1
    store._touched = {("report", "new"): moment + 1}
    removed = store.expire(before=moment, keep_bytes=1 << 40)
    assert [row["id"] for row in removed] == ["old"]
    assert {row["id"] for row in store.files("report").items} == {"needed", "new"}
    with pytest.raises(ServiceError):
        store.job(done.id)
    assert store.job(live.id).state == "queued"


def test_retention_by_bytes_takes_the_longest_unused_and_what_answers_with_it(store, objects):
    job, _ = ask(store, 1)
    store.next(LANE)
    row = file_row("report", "answer", objects.put(b"answer"), name="answer", summary={})
    store.finish(job.id, "succeeded", result={}, files=[row])
    keep(store, objects, "other")
    store._touched = {("report", "answer"): time.time() - 100, ("report", "other"): time.time()}
    removed = store.expire(before=0, keep_bytes=store.stored_bytes() - 1)
    assert [row["id"] for row in removed] == ["answer"]
    # Its answer gone, the request is a new job.
    assert ask(store, 1)[1]


def test_retention_takes_no_more_than_it_must(store):
    """What age takes counts; of the rest that nobody waits for the longest unused go, one by one, until there is
    room.
    """
    names = ("old", "needed", "first", "second", "third")
    for name in names:
        store.add(folder_row(name, 1000))
    ask(store, uses=[("folder", "needed")])
    store.flush()
    now = time.time()
    store._touched = {("folder", name): now + age for age, name in enumerate(names)}
    removed = store.expire(before=now + 0.5, keep_bytes=2500)
    assert [row["id"] for row in removed] == ["old", "first", "second"]
    assert {row["id"] for row in store.files("folder").items} == {"needed", "third"}


def test_the_checkpoints_of_a_run_that_was_ended_count_and_go_with_it(store):
    job, _ = ask(store, 1)
    store.next(LANE)
    store.finish(job.id, "cancelled", files=[folder_row(job.id, 5000)])
    assert store.stored_bytes() == 5000
    assert store.expire(before=0, keep_bytes=5000) == []
    assert [row["kind"] for row in store.expire(before=0, keep_bytes=4999)] == ["folder"]
    with pytest.raises(ServiceError, match="there is no job"):
        store.job(job.id)


def test_a_run_that_ended_early_goes_on_and_its_checkpoints_are_its_own_again(store):
    run, _ = ask(store, repeatable=True)
    store.next(LANE)
    store.finish(run.id, "cancelled", files=[folder_row(run.id, 5000)])
    assert store.stored_bytes() == 5000
    resumed, new = store.resume(run.id, key="k", waiting=1)
    assert new
    assert (resumed.state, resumed.finished, resumed.attempts, store.stored_bytes()) == ("queued", None, 0, 0)
    # Asked twice under one key, it goes on once; a key is for one request.
    assert store.resume(run.id, key="k", waiting=1) == (resumed, False)
    with pytest.raises(ServiceError, match="the idempotency key 'k' was used for another request"):
        ask(store, key="k", repeatable=True)
    # What cannot go on is told so, with a full queue too.
    for waiting in (1, 2):
        with pytest.raises(ServiceError, match="is queued: there is nothing to go on with") as refusal:
            store.resume(run.id, waiting=waiting)
        assert refusal.value.status == 409
    other, _ = ask(store, 2, repeatable=True)
    store.finish(other.id, "cancelled")
    with pytest.raises(ServiceError, match="1 jobs are waiting already"):
        store.resume(other.id, waiting=1)
    assert store.job(other.id).state == "cancelled"
    assert store.next(LANE).id == run.id
    store.finish(run.id, "succeeded", result={})
    with pytest.raises(ServiceError, match="is succeeded: there is nothing to go on with"):
        store.resume(run.id, waiting=9)


def test_what_lies_in_the_cache_counts_and_goes_first_of_what_was_used_last_at_once(store, objects):
    measured, _ = ask(store, 1)
    store.next(LANE)
    made = file_row("profile", OWN, objects.put(b"profile"), name="made", summary=PROFILE, origin="made")
    store.finish(measured.id, "succeeded", result={}, files=[made, cache_row("stores/a.store", 5000)])
    store.count_cache([cache_row("stores/a.store", 5000), cache_row("stores/b.store", 3000)])
    small = store.stored_bytes() - 8000
    assert 0 < small < 1000
    # What a run needs that waits is spared.
    uses = [("cache", "stores/b.store")]
    run, _ = store.enqueue("run", "cpu", {}, content=None, key=None, waiting=9, uses=uses)
    store._touched = {("cache", "stores/b.store"): 1.0}
    removed = store.expire(before=0, keep_bytes=3000 + small)
    assert [row["id"] for row in removed] == ["stores/a.store"]
    assert [row["id"] for row in store.files("profile").items] == [OWN]
    # The model would have to be packed again, so the measurement no longer answers; the profile can be planned with.
    assert ask(store, 1)[1]
    # A run that has ended keeps its answer where its weights go.
    store.finish(run.id, "succeeded", result={})
    assert [row["id"] for row in store.expire(before=0, keep_bytes=small)] == ["stores/b.store"]
    assert store.job(run.id).state == "succeeded"
    # What somebody has removed counts no longer.
    store.count_cache([cache_row("profiles/c.json", 7)])
    store.count_cache([])
    assert store.stored_bytes() == small


def test_a_file_told_again_is_told_as_now_but_keeps_its_explanation(store, objects):
    for told, kept in (({"a": 1}, {"a": 1}), ({"a": 2, "explanation": {}}, {"a": 2, "explanation": {}}), ({"a": 3, "explanation": None}, {"a": 2, "explanation": {}})):  # fmt: skip
        row = store.add(file_row("plan", OWN, objects.put(b"a plan"), name="p", summary=PLAN | told))
        assert json.loads(row["summary"]) == PLAN | kept


def test_paths_stay_under_the_roots(tmp_path):
    root = tmp_path / "models"
    (root / "a").mkdir(parents=True)
    (root / "a" / "config.json").write_text("{}")
    (tmp_path / "secret").write_text("s")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "loop").symlink_to(root / "loop")
    inside = str((root / "a" / "config.json").resolve())
    assert confined("a/config.json", [root], "path") == inside
    assert confined(inside, [root], "path") == inside
    for text in (
        "../secret",
        str(tmp_path / "secret"),
        "link",
        "loop",
        "a/../../secret",
        "none",
        "\0",
        "x" * 5000,
        "/",
    ):
        with pytest.raises(ServiceError, match="is no file or folder under a folder that is open") as caught:
            confined(text, [root], "path")
        assert (caught.value.status, caught.value.field) == (422, "body.path")
    with pytest.raises(ServiceError, match="no folder is open to requests; start the service with --root FOLDER"):
        confined("a", [], "path")


def test_a_folder_is_open_only_where_no_link_in_it_leads_out(tmp_path, monkeypatch):
    roots = [tmp_path / "models", tmp_path / "data"]
    blobs, snapshot, data = roots[0] / "hub" / "blobs", roots[0] / "hub" / "snapshots" / "1", roots[1] / "reviews"
    outside = tmp_path / "outside"
    for folder in (blobs, snapshot, data, outside):
        folder.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (outside / "secret.jsonl").write_text("s")
    # As the Hugging Face cache has it, and between two folders that are open.
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "reviews").symlink_to(data)
    (data / "round").symlink_to(data)
    (data / "itself").symlink_to("itself")
    assert confined("hub/snapshots/1", roots, "path") == str(snapshot.resolve())
    assert confined("reviews", roots, "data") == str(data.resolve())

    def refuse(link, target, named):
        """`named` is refused while `link` is there, and not before."""
        assert confined(named, roots, "data")
        link.symlink_to(target)
        with pytest.raises(ServiceError, match=f"'{named}' holds the link .*{link.name}', which leads out") as caught:
            confined(named, roots, "data")
        assert (caught.value.status, caught.value.field) == (422, "body.data")
        assert str(tmp_path) not in str(caught.value)
        link.unlink()

    refuse(data / "a.jsonl", outside / "secret.jsonl", "reviews")
    refuse(
        data / "not-yet.jsonl", outside / "later.jsonl", "reviews"
    )  # it would lead out as soon as something is there
    (snapshot / "deeper").mkdir()
    refuse(snapshot / "deeper" / "up", outside, "hub/snapshots/1")
    refuse(data / "b.jsonl", "../../outside/secret.jsonl", "hub/snapshots/1")  # through the link to the other root
    monkeypatch.setattr("tightfit.planner.service.jobs.paths.MOST_ENTRIES", 1)
    with pytest.raises(ServiceError, match="'reviews' holds more than 1 files"):
        confined("reviews", roots, "data")


def test_other_machines_need_a_token(tmp_path):
    made = {"data_dir": tmp_path, "command": ("tightfit",)}
    with pytest.raises(InputError, match=r"--host 0.0.0.0 can be reached from other machines: set a token"):
        Settings(host="0.0.0.0", **made)
    with pytest.raises(InputError, match="has 5 characters; choose one of at least 16"):
        Settings(host="0.0.0.0", token="short", **made)
    assert Settings(host="0.0.0.0", token="t" * 16, **made).token
    with pytest.raises(InputError, match="no such folder"):
        Settings(roots=(tmp_path / "none",), **made)
    assert [loopback(host) for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]", "10.0.0.1", "example.com")] == [
        True, True, True, True, True, False, False,
    ]  # fmt: skip
