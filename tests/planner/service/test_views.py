"""What is shown of plans is made beside the service: once, for whoever asks, and holding nobody else up."""

from __future__ import annotations

import asyncio
import gzip
import json
import subprocess
import sys
import threading
import time

import pytest
from served import PATIENCE, service
from synthetic import small_chain

from tightfit.planner.plan import plan as solve_here
from tightfit.planner.service.http import views
from tightfit.planner.service.jobs.orders import JobOrder
from tightfit.planner.service.jobs.processes import WorkerProcesses
from tightfit.planner.service.jobs.store import file_row
from tightfit.planner.service.jobs.work import view as viewing

IDS = ("1" * 64, "2" * 64)


@pytest.fixture(scope="module")
def plans():
    profile = small_chain(3, layers=2)
    return [solve_here(profile, size, policy="keep-all") for size in (1 << 30, 1 << 31)]


@pytest.fixture
def http(tmp_path, plans):
    with service(tmp_path) as opened:
        own = opened.app.state.service
        for identity, plan in zip(IDS, plans, strict=True):
            summary = {
                "status": "feasible",
                "policy": "keep-all",
                "budget_bytes": plan.budget_bytes,
                "explanation": None,
            }
            written = own.objects.put(plan.model_dump_json().encode())
            own.store.add(file_row("plan", identity, written, name="tiny", summary=summary, origin="0" * 64))
        yield opened


@pytest.fixture
def orders(monkeypatch):
    """The orders that go to processes which make views."""
    sent, ask = [], WorkerProcesses.ask

    async def counted(self, lane, order, seconds):
        sent.append(order)
        return await ask(self, lane, order, seconds)

    monkeypatch.setattr(WorkerProcesses, "ask", counted)
    return sent


def test_a_view_is_made_once_and_sent_as_the_client_takes_it(http, orders, plans):
    packed = http.get(f"/v1/plans/{IDS[0]}/view", headers={"Accept-Encoding": "gzip"})
    plain = http.get(f"/v1/plans/{IDS[0]}/view", headers={"Accept-Encoding": "identity"})
    assert (packed.headers["content-encoding"], "content-encoding" in plain.headers) == ("gzip", False)
    assert packed.json() == plain.json()
    assert plain.json()["summary"]["fingerprint"] == plans[0].fingerprint
    changes = http.get(f"/v1/plans/{IDS[0]}/changes/{IDS[1]}").json()
    assert [one["budget_bytes"] for one in changes["plans"]] == [1 << 30, 1 << 31]
    back = http.get(f"/v1/plans/{IDS[1]}/changes/{IDS[0]}").json()
    assert [one["budget_bytes"] for one in back["plans"]] == [1 << 31, 1 << 30]
    timeline = [http.get(f"/v1/plans/{IDS[0]}/timeline").json() for _ in range(2)]
    assert timeline[0] == timeline[1]
    assert len(timeline[0]) > 3
    assert [order.request["what"] for order in orders] == ["plan", "changes", "changes", "timeline"]
    # What cannot be run any more is told so: another view.
    http.app.state.service.store._database.execute(
        "UPDATE files SET summary = json_set(summary, '$.policy', 'mobillm')"
    )
    assert "is a device's part of mobillm" in http.get(f"/v1/plans/{IDS[0]}/view").json()["not_runnable"]
    assert not list(http.app.state.service.objects.temporary.glob("view-*"))


def test_the_service_makes_no_views_itself():
    """It has not even loaded what makes them."""
    modules = "import sys; import tightfit.planner.service.http.app; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", modules], capture_output=True, text=True, check=True).stdout.split()
    assert "tightfit.planner.service.http.views" in loaded
    assert not [name for name in loaded if name.startswith("tightfit.planner.service.jobs.work")]


def test_others_are_answered_while_a_view_is_made_and_who_asks_for_the_same_shares_it(http, monkeypatch):
    ask, begun, go_on = WorkerProcesses.ask, [], threading.Event()

    async def slow(self, lane, order, seconds):
        begun.append(lane)
        await asyncio.to_thread(go_on.wait, PATIENCE)
        return await ask(self, lane, order, seconds)

    monkeypatch.setattr(WorkerProcesses, "ask", slow)
    answers = []
    asking = [threading.Thread(target=lambda: answers.append(http.get(f"/v1/plans/{IDS[0]}/view"))) for _ in range(3)]
    for thread in asking:
        thread.start()
    until = time.monotonic() + PATIENCE
    while not begun:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert http.get("/healthz").status_code == 200
    go_on.set()
    for thread in asking:
        thread.join(PATIENCE)
    assert [answer.status_code for answer in answers] == [200] * 3
    assert begun == ["view"]


def test_the_views_that_were_looked_at_last_are_kept(http, orders, monkeypatch):
    size = len(gzip.compress(http.get(f"/v1/plans/{IDS[0]}/view").content))
    monkeypatch.setattr(views, "MOST_KEPT_BYTES", int(1.5 * size))
    for identity, made in ((IDS[0], 1), (IDS[1], 2), (IDS[1], 2), (IDS[0], 3)):
        assert http.get(f"/v1/plans/{identity}/view").status_code == 200
        assert len(orders) == made


ENDS = [
    (None, 422, "takes more than 4096.0 MiB of memory to make"),
    ({"code": "worker_died", "message": "x"}, 422, "takes more than 4096.0 MiB of memory to make"),
    ({"code": "internal", "message": "x"}, 500, "internal error; the service's log tells more"),
    ({"code": "storage", "message": "No space left"}, 507, "No space left; free disk space and ask again"),
    ({"code": "input", "message": "the stored plan: no plan"}, 422, "the stored plan: no plan"),
    (TimeoutError(), 422, "takes longer to make than 60 s; download the file instead"),
]


@pytest.mark.slow_but_for(
    "None-422-takes more than 4096.0 MiB of memory to make",
    "end4-422-the stored plan: no plan",
    "end5-422-takes longer to make than 60 s; download the file instead",
    "end1-422-takes more than 4096.0 MiB of memory to make",
)
@pytest.mark.parametrize(("end", "status", "words"), ENDS)
def test_a_view_that_cannot_be_made_is_told_in_words(http, monkeypatch, end, status, words):
    """And is made when it is asked for again."""

    async def failing(self, lane, order, seconds):
        if isinstance(end, Exception):
            raise end
        return end, "its last words"

    with monkeypatch.context() as patch:
        patch.setattr(WorkerProcesses, "ask", failing)
        answer = http.get(f"/v1/plans/{IDS[0]}/view")
        assert answer.status_code == status
        assert words in answer.json()["error"]["message"]
        assert "its last words" not in answer.text
    assert http.get(f"/v1/plans/{IDS[0]}/view").status_code == 200


@pytest.mark.slow
def test_a_process_that_is_killed_is_replaced(http):
    for _ in range(2):
        assert http.get(f"/v1/plans/{IDS[0]}/view").status_code == 200
        http.app.state.service.views._kept.clear()
        spare = http.app.state.service.supervisor.processes._spare["view"].result()
        spare.kill()


def test_plans_that_were_read_before_give_way_where_memory_is_short(tmp_path, plans, monkeypatch):
    tried = []

    def short_once(order):
        tried.append(viewing._read.cache_info().currsize)
        viewing._parsed(order, IDS[0])
        if len(tried) == 1:
            raise MemoryError
        return {"fingerprint": plans[0].fingerprint}

    monkeypatch.setattr(viewing, "SHOWN", {"plan": short_once})
    monkeypatch.setattr(viewing, "parse_plan", lambda content, name: plans[0])
    monkeypatch.setattr(viewing.ObjectStore, "read", lambda self, digest: b"")
    path = tmp_path / "view"
    order = JobOrder(
        kind="view",
        request={"what": "plan", "path": str(path)},
        objects=str(tmp_path),
        memory_bytes=None,
        digests={IDS[0]: "d"},
    )
    viewing._read.cache_clear()
    assert viewing.do(order, None) == {"result": {}}
    assert tried == [0, 0]
    assert json.loads(gzip.decompress(path.read_bytes()))["fingerprint"] == plans[0].fingerprint
    viewing._read.cache_clear()
