"""The list of models, and how one comes in, in a real browser."""

from __future__ import annotations

from places_of_the_page import at, tab
from playwright.sync_api import expect


def test_the_places_have_addresses(browser, served, decoder):
    with tab(browser, at(served, "models")) as page:
        expect(page.locator("#places [aria-current=page]")).to_have_text("Models")
