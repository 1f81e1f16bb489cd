"""Fleets on the page: planned from known devices, drawn, kept, and refused beside the device that is wrong."""

from __future__ import annotations

import re

import pytest
from places_of_the_page import at, nothing_hinders, rows, tab
from playwright.sync_api import expect
from synthetic import small_chain

from tightfit.planner.fleet.schema import FleetPlan


@pytest.fixture(scope="module")
def chain(served):
    return served.upload(small_chain(3, layers=3))


def fill(page, budgets):
    """Two devices with these budgets in MiB, of the model that stands in the form."""
    page.get_by_role("button", name="Add", exact=True).click()
    for index, budget in enumerate(budgets):
        page.locator(f"[data-member='{index}'] input[type=number]").fill(budget)
    page.get_by_label("Micro-batches of a step").fill("6")


def test_a_fleet_is_planned_and_drawn(browser, served, chain):
    with tab(browser, at(served, f"fleets/new?profile={chain}")) as page:
        fill(page, ("32", "32"))
        page.reload()  # what is filled in is still there
        assert page.locator("[data-member='1'] input[type=number]").input_value() == "32"
        page.get_by_role("button", name="Plan this fleet").click()
        page.wait_for_url(re.compile("#/fleets/[0-9a-f]{64}$"))
        expect(page.locator("#lanes svg")).to_be_visible()
        identity = page.url.rsplit("/", 1)[1]
        view = served.http.get(f"/v1/fleets/{identity}/view").json()
        drawn = [lane.get_attribute("data-lane") for lane in page.locator("#lanes [data-lane]").all()]
        assert drawn == [lane["name"] for lane in view["lanes"]["lanes"]]
        assert page.locator("#lanes .bar-mark").count() == sum(len(lane["bars"]) for lane in view["lanes"]["lanes"])
        assert page.locator("#sentences li").all_inner_texts() == view["sentences"][:5]
        assert rows(page, "[aria-label='The members of the chain']") == view["chain"]["rows"]
        fleet = FleetPlan.model_validate_json(served.http.get(f"/v1/fleets/{identity}/file").content)
        page.get_by_text("In numbers").click()
        assert rows(page, "[aria-label='What each device and each link does']") == view["activity"]["rows"]
        page.get_by_text("More about this fleet").click()
        told = page.locator("ul.plain li")
        assert told.all_inner_texts() == view["sentences"]
        for name, plan in view["plans"].items():
            with page.expect_download() as caught:
                page.get_by_role("button", name=f"Download {name}").click()
            assert caught.value.path().read_bytes() == served.http.get(f"/v1/plans/{plan}/file").content
        # What is started where is told, to be copied.
        told = page.locator(".command code").all_inner_texts()
        assert (
            told
            if not view["commands"]
            else set(view["commands"].values()) <= set(told) or "tightfit profile MODEL" in told[0]
        )
        # A member's plan says whose it is, and is none of those that somebody fine-tunes with.
        page.get_by_role("link", name="this-machine", exact=True).click()
        expect(page.locator("#part-of")).to_have_text(re.compile(r"^Part of fleet .+: this-machine"))
        page.go_back()
        expect(page.locator("#lanes svg")).to_be_visible()
        assert served.http.get("/v1/plans?whole=true&asked=true").json()["plans"] == []
        alone = next(one.makespan_seconds for one in fleet.baselines if one.name == "fastest alone")
        expect(page.locator(".cards")).to_contain_text(f"{alone / fleet.makespan_seconds:.2f} ×")
        with page.expect_download() as caught:
            page.get_by_role("button", name="Download fleet.json").click()
        assert FleetPlan.model_validate_json(caught.value.path().read_bytes()) == fleet
        # It is in the list tomorrow, under the name that it is given, and another is planned like it.
        page.get_by_role("button", name="Change: Name").click()
        page.get_by_label("Name", exact=True).fill("desk and desk")
        page.keyboard.press("Enter")
        expect(page.locator("h1")).to_contain_text("desk and desk")
        page.get_by_role("button", name="Plan another like it").click()
        assert page.locator("[data-member='1'] input[type=number]").input_value() == "32"
        page.goto(at(served, "fleets"))
        page.get_by_role("link", name="desk and desk").click()
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(page.locator(".empty")).to_contain_text("No fleet is planned yet")
        assert served.http.get(f"/v1/fleets/{identity}").status_code == 404


@pytest.mark.slow
def test_nothing_hinders_people(browser, served, chain, pictures):
    members = [
        {"name": name, "profile": chain, "memory": "32MiB", "link": "100Mbit/s"} for name in ("this-machine", "other")
    ]
    fleet = served.result("/v1/fleets", micro_batches=6, members=members)["fleet"]
    with tab(browser, at(served, f"fleets/{fleet}")) as page:
        expect(page.locator("#lanes svg")).to_be_visible()
        nothing_hinders(page, pictures, "fleet")


def test_waiting_is_drawn_as_waiting(browser, served, chain):
    """A device with a slow link waits while the sum comes to it."""
    with tab(browser, at(served, f"fleets/new?profile={chain}")) as page:
        page.evaluate("sessionStorage.clear()")
        page.reload()
        fill(page, ("32", "32"))
        for index in range(2):
            page.locator(f"[data-member='{index}'] select").select_option("other")
            page.locator(f"[data-member='{index}']").get_by_label("Rate").fill("2Mbit/s")
            page.locator(f"[data-member='{index}']").get_by_label("Rate").press("Tab")
        page.get_by_role("button", name="Plan this fleet").click()
        expect(page.locator("#lanes .waiting").first).to_be_attached()
        page.locator("#lanes svg").focus()
        page.keyboard.press("End")
        page.keyboard.press("ArrowLeft")
        expect(page.locator(".reading")).to_contain_text("waits")


def test_what_is_wrong_is_told_beside_its_device(browser, served, chain):
    with tab(browser, at(served, f"fleets/new?profile={chain}"), expected=("422",)) as page:
        page.evaluate("sessionStorage.clear()")
        page.reload()
        fill(page, ("32", "32"))
        page.locator("[data-member='1'] select").select_option("other")
        page.locator("[data-member='1']").get_by_label("Rate").fill("fast")
        page.locator("[data-member='1']").get_by_label("Rate").press("Tab")
        page.get_by_role("button", name="Plan this fleet").click()
        expect(page.locator("[data-member='1'] .wrong")).to_contain_text("'fast' is not a rate")
        page.locator("[data-member='1']").get_by_role("button", name="Remove").click()
        expect(page.locator("[data-member]")).to_have_count(1)


def test_a_known_device_is_estimated(served, chain):
    """A member may be of a device with a data sheet: its plan is the profile's with that device's times, and is not run here."""
    members = [
        {"name": "desk", "profile": chain, "memory": "32MiB", "link": "1Gbit/s"},
        {"name": "other", "profile": chain, "device": "no-such", "memory": "32MiB", "link": "1Gbit/s"},
    ]
    refused = served.http.post("/v1/fleets", json={"micro_batches": 6, "members": members})
    assert refused.json()["error"]["fields"][0]["field"] == "body.members.1.device"
    members[1]["device"] = "raspberry-pi-5"
    job = served.wait(served.ask("/v1/fleets", micro_batches=6, members=members))
    # A synthetic profile states no FLOPs, so the estimate is refused in words.
    assert "states no FLOPs" in job["error"]["message"]
