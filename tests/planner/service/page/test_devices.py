"""Devices on the page: this machine, those that have asked with what was planned for them, and how it went."""

from __future__ import annotations

import pytest
from places_of_the_page import at, nothing_hinders, number, rows, tab
from playwright.sync_api import expect
from synthetic import decoder_like

from tightfit.planner.plan import minimum_budget
from tightfit.planner.service.client import connect
from tightfit.planner.service.wire.remote_devices import PhaseMemory, RemoteDevice, RunReport


def test_devices_that_ask(browser, served, pictures):
    """What they are, what was planned for them, and how it went; the plan is a link to it, and names with markup stay text."""
    profile = decoder_like(2)
    least = minimum_budget(profile)
    phone = RemoteDevice(name="<b>phone</b>", processor="Cortex-A76", cores=4, memory_bytes=4 << 30, budget_bytes=least)
    watch = phone.model_copy(update={"name": "watch", "budget_bytes": None, "cores": 1})
    with connect(served.url, device=phone) as client:
        plan = client.plan(profile, least)
        phases = [
            PhaseMemory(phase="measuring", held_bytes=100 << 20),
            PhaseMemory(phase="training", predicted_bytes=300 << 20, held_bytes=299 << 20),
        ]
        client.report(RunReport(phases=phases, predicted_step_seconds=plan.step_seconds, measured_step_seconds=7.25))
    with connect(served.url, device=watch) as client:
        client.plan(profile, 1 << 20)
    with tab(browser, at(served, "devices")) as page:
        cards = page.locator("#asking article")
        expect(cards).to_have_count(2)
        small, large = cards.all()
        expect(small).to_contain_text("watch")
        expect(small).to_contain_text("Cortex-A76, 1 core, 4,096 MiB")
        expect(small.get_by_role("link")).to_contain_text("nothing fits 1.0 MiB")
        expect(small).to_contain_text("It has not told how a run went.")
        expect(large.locator("h3")).to_have_text("<b>phone</b>")
        assert number(large.get_by_text("a budget of").inner_text()) == pytest.approx(least / (1 << 20), abs=0.06)
        told = {name: figures for name, *figures in rows(page, "#asking article:nth-of-type(2)")}
        assert told["one step, s"][1] == "7.25"
        assert told["measuring, MiB"] == ["–", "100.0"]
        assert told["training, MiB"] == ["300.0", "299.0"]
        nothing_hinders(page, pictures, "devices")
        large.get_by_role("link").click()
        (asked,) = [one for one in served.http.get("/v1/remote-devices").json()["devices"] if one["report"]]
        page.wait_for_url(f"**/page/#/plans/{asked['planned']['plan']}")
