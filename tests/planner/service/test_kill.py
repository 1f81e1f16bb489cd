"""A small share of what `make bench-service` does twenty times."""

from __future__ import annotations

from killing import kill_again_and_again
from served import Served
from synthetic import small_chain

from tightfit.planner.plan import minimum_budget
from tightfit.planner.schema import Plan


def test_nothing_acknowledged_is_lost(tmp_path):
    profile = small_chain(3, layers=3)
    least = minimum_budget(profile)
    service = Served(tmp_path / "data").start()
    budgets = range(least, least + 10**9, 512)
    try:
        found = kill_again_and_again(service, profile, budgets, rounds=3, clients=3, per_client=1)
        assert found["kills"]["service"] >= 2
        assert found["lost"] == []
        assert len(found["acknowledged"]) > 2
        for job in found["acknowledged"].values():
            # Killed workers are tried again; nothing was killed often enough to be given up.
            assert job["state"] == "succeeded", job
            file = service.http.get(f"/v1/plans/{job['result']['plan']}/file")
            assert Plan.model_validate_json(file.content).budget_bytes == job["request"]["memory"]
        # A request of before is answered from what was kept.
        job = next(iter(found["acknowledged"].values()))
        assert service.http.post("/v1/plans", json=job["request"]).json()["id"] == job["id"]
    finally:
        service.stop()
