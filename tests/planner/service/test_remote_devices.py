"""Devices that ask: what they say of themselves is bounded, listed beside their plans, and forgotten."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import Served, service
from synthetic import small_chain

from tightfit.planner.plan import minimum_budget
from tightfit.planner.service.client import connect
from tightfit.planner.service.jobs import store as stores
from tightfit.planner.service.jobs.store import JobStore
from tightfit.planner.service.wire.remote_devices import (
    DEVICE,
    HEADER,
    REPORT,
    PhaseMemory,
    RemoteDevice,
    RunReport,
    device_of,
    this_device,
)
from tightfit.runtime.common.errors import InputError

MIB = 1 << 20


def test_a_device_is_listed_with_its_plan_and_how_it_went(tmp_path):
    profile = small_chain(3, layers=3)
    budget = minimum_budget(profile) + 4096
    device = this_device(budget)
    report = RunReport(
        phases=[PhaseMemory(phase="training", predicted_bytes=budget, held_bytes=budget - 1)],
        predicted_step_seconds=1.5,
        measured_step_seconds=1.6,
    )
    running = Served(tmp_path / "data").start()
    try:
        with connect(running.url, device=device) as client:
            client.upload(profile)
            (asking,) = client.get("/v1/remote-devices")["devices"]
            assert (asking["id"], asking["planned"], asking["report"]) == (device.identity, None, None)
            assert RemoteDevice(**asking["device"]) == device
            plan = client.plan(profile, budget)
            client.report(report)
            (asking,) = client.get("/v1/remote-devices")["devices"]
            planned = asking["planned"]
            assert (planned["model"], planned["memory"], planned["policy"]) == (profile.model.name, budget, "solver")
            assert planned["state"] == "succeeded"
            assert (planned["step_seconds"], planned["peak_bytes"]) == (plan.step_seconds, plan.peak_bytes)
            assert client.stored_plan(planned["plan"]) == plan
            assert RunReport(**asking["report"]) == report
            # The report is of that plan, and not of another one.
            client.plan(profile, budget)
            assert client.get("/v1/remote-devices")["devices"][0]["report"] is not None
            client.plan(profile, budget + 4096)
            assert client.get("/v1/remote-devices")["devices"][0]["report"] is None
        # Whoever says nothing of itself is not listed, and cannot report.
        with connect(running.url) as client:
            client.plan(profile, budget)
            with pytest.raises(InputError, match=r"connect with device=this_device\(\)"):
                client.report(report)
        answer = running.http.post("/v1/remote-devices/device-0123456789abcdef/reports", json=REPORT)
        assert answer.status_code == 404
        assert "the 256 that asked last are known" in answer.json()["error"]["message"]
        assert len(running.http.get("/v1/remote-devices").json()["devices"]) == 1
    finally:
        assert running.stop() == 0
    assert not [line for line in running.lines() if line["level"] == "error"]


def test_what_leaves_a_device_with_a_report():
    """Figures and names of phases: no data, no texts, no paths."""
    assert set(RunReport.model_fields) == {"phases", "predicted_step_seconds", "measured_step_seconds"}
    assert set(PhaseMemory.model_fields) == {"phase", "predicted_bytes", "held_bytes"}
    assert set(RemoteDevice.model_fields) == {"name", "processor", "cores", "memory_bytes", "budget_bytes"}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("", "Expecting value"),
        ("[]", "valid dictionary"),
        ("[" * 1000, "nested more than"),
        (json.dumps(DEVICE | {"name": "x" * 101}), "name: String should have at most 100"),
        (json.dumps(DEVICE | {"name": "a\nb"}), "name: String should match"),
        (json.dumps(DEVICE | {"name": "größer"}), "name: String should match"),
        (json.dumps(DEVICE | {"data": "x"}), "data: Extra inputs"),
        (json.dumps(DEVICE | {"memory_bytes": -1}), "memory_bytes: Input should be greater"),
        (json.dumps(DEVICE | {"x" * 2000: 1}), "letters; at most 1024 are read"),
    ],
)
def test_a_header_that_describes_no_device_is_refused(tmp_path, header, words):
    with service(tmp_path) as http:
        body = small_chain(3, layers=2).model_dump(mode="json")
        answer = http.post("/v1/profiles/upload", json=body, headers={HEADER: header.encode()})
        assert answer.status_code == 422, answer.text
        (fault,) = answer.json()["error"]["fields"]
        assert fault["field"] == f"header.{HEADER}"
        assert words in fault["message"]
        assert http.get("/v1/profiles").json()["profiles"] == []


@pytest.mark.parametrize(
    "report",
    [
        REPORT | {"phases": [{"phase": "/home/me/data", "held_bytes": 1}]},
        REPORT | {"phases": [{"phase": "training", "held_bytes": -1}]},
        REPORT | {"phases": [{"phase": "training", "held_bytes": 1}] * 33},
        REPORT | {"measured_step_seconds": "fast"},
        REPORT | {"text": "the quick brown fox"},
        REPORT | {"predicted_step_seconds": 1e300},
    ],
)
def test_a_report_of_something_else_is_refused(tmp_path, report):
    with service(tmp_path) as http:
        asking = http.app.state.service.store
        device = RemoteDevice(**DEVICE)
        asking.note_device(device)
        answer = http.post(f"/v1/remote-devices/{device.identity}/reports", json=report)
        assert answer.status_code == 422, answer.text
        assert http.get("/v1/remote-devices").json()["devices"][0]["report"] is None


def test_those_that_asked_last_are_known(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stores, "MOST_DEVICES", 3)
    monkeypatch.setattr(stores.time, "time", lambda: now[0])
    store = JobStore(tmp_path / "s.sqlite")
    for number in (0, 1, 2, 0, 3):
        now[0] += 1
        store.note_device(RemoteDevice(**DEVICE | {"name": f"d{number}"}))
    assert [one.device.name for one in store.remote_devices()] == ["d3", "d0", "d2"]
    # Another budget is the same device.
    store.note_device(RemoteDevice(**DEVICE | {"name": "d0", "budget_bytes": None}))
    assert len(store.remote_devices()) == 3
    store.expire(before=4.5, keep_bytes=MIB)
    assert {one.device.name for one in store.remote_devices()} == {"d3", "d0"}
    store.close()


VALUES = st.none() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.binary() | st.text() | st.just('{"a": [1}')


@settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(column=st.sampled_from(["id", "described", "job", "report", "seen"]), value=VALUES)
def test_a_device_that_cannot_be_read_is_set_aside(tmp_path_factory, column, value):
    store = JobStore(tmp_path_factory.mktemp("devices") / "s.sqlite")
    first, second = (RemoteDevice(**DEVICE | {"name": name}) for name in ("first", "second"))
    for device in (first, second):
        store.note_device(device)
    try:
        store._database.execute(f"UPDATE remote_devices SET {column} = ? WHERE id = ?", (value, first.identity))
    except Exception:  # what the database itself refuses
        store.close()
        return
    for _ in range(2):
        listed = store.remote_devices()
        assert second.identity in [one.id for one in listed]
        assert len(listed) + len(store.set_aside("device")) == 2
        assert all(one.model_dump_json() for one in listed)
    store.close()


def test_what_this_machine_says_of_itself_is_a_header():
    device = this_device(256 * MIB)
    assert device_of(device.model_dump_json()) == device
    assert device.budget_bytes == 256 * MIB
    assert device.memory_bytes > 256 * MIB
    assert device_of(None) is None
