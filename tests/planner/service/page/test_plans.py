"""The list of plans: what somebody asked for, and on demand what was made on the way."""

from __future__ import annotations

import re

from places_of_the_page import at, nothing_hinders, tab
from playwright.sync_api import expect


def test_what_nobody_asked_for_is_shown_on_demand(browser, served, decoder, pictures):
    roomy, rule = 200 << 20, "checkpoint-sqrt"
    served.result("/v1/comparisons", profile=decoder, memory=[roomy], policies=["keep-all", "mebp"])
    served.result("/v1/plans", profile=decoder, memory=1, policy="keep-all")
    with tab(browser, at(served, "plans")) as page:
        expect(page.locator(".empty")).to_contain_text("No plan here that somebody asked for")
        page.get_by_role("button", name="Show those made for curves").click()
        expect(page.locator(".listing tbody tr")).to_have_count(3)
        for optimizer in ("adamw", "sgd"):
            served.result("/v1/plans", profile=decoder, memory=roomy, policy=rule, optimizer=optimizer)
        page.goto(at(served, ""))
        latest = page.locator("section", has_text="Planned last").get_by_role("link")
        expect(latest).to_have_count(2)
        # Rules have the names that they have everywhere on the page.
        expect(latest.first).to_have_text(re.compile("in 200.0 MiB, Redo runs of layers$"))
        page.goto(at(served, f"plans?profile={decoder}"))
        listed = page.locator(".listing tbody tr")
        expect(listed).to_have_count(2)
        assert rule not in page.locator("main").inner_text()
        # Two of the same name are told apart.
        expect(listed.first).to_contain_text("; sgd")
        expect(listed.last).not_to_contain_text("; sgd")
        # That it is of one model is said, and how to see all.
        expect(page.locator("h1")).to_have_text(re.compile("^Plans of synthetic"))
        nothing_hinders(page, pictures, "plans-of-a-model")
        page.get_by_label("Also those that were made for a curve").check()
        expect(listed).to_have_count(5)
        page.reload()
        expect(listed).to_have_count(5)
        page.get_by_role("link", name="Plans of all models").click()
        expect(page.locator("h1")).to_have_text("Plans")
        expect(listed).to_have_count(2)
