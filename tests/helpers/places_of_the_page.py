"""What the tests of the page's places share: a service that must not log errors, a tab that must not complain, tables
as text, axe.

The fixtures made of it stand in `tests/planner/service/page/conftest.py`.
"""

from __future__ import annotations

import contextlib
import re

from axe_playwright_python.sync_playwright import Axe
from chromium import PATIENCE
from served import Served

DESK = {"width": 1400, "height": 900}
PHONE = {"width": 390, "height": 844}
LARGE = {"width": 2560, "height": 1440}
SIZES = {"phone": PHONE, "desk": DESK, "large": LARGE}
THEMES = ("light", "dark")


@contextlib.contextmanager
def serving(folder, *roots):
    """A service on `folder`/data that must have logged no error when it is left."""
    service = Served(folder / "data", *(word for root in roots for word in ("--root", str(root)))).start()
    try:
        yield service
    finally:
        service.stop()
    assert not [line for line in service.lines() if line["level"] == "error"]


@contextlib.contextmanager
def tab(browser, url, *, expected=(), **options):
    """A tab of its own, opened at `url`. What goes wrong in it fails the test, and so does a request that leaves the
    service.

    `expected` are patterns of what the console may say, such as that a resource answered with a status that the test
    provokes.
    """
    context = browser.new_context(viewport=options.pop("viewport", DESK), **options)
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE)
    wrong, asked = [], []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda request: asked.append(request.url))
    try:
        opened.goto(url)
        yield opened
    finally:
        context.close()
    assert [text for text in wrong if not any(re.search(pattern, text) for pattern in expected)] == []
    home = url.split("/page/")[0]
    assert [address for address in asked if not address.startswith((home, "data:", "blob:"))] == []


def at(served, place):
    """The address of a place: `at(served, "models/ID?budget=…")`."""
    return f"{served.url}/page/#/{place}"


def rows(page, selector):
    """The text of a table's cells, row by row."""
    return [
        [cell.text_content() for cell in row.locator("th, td").all()]
        for row in page.locator(f"{selector} tbody tr").all()
    ]


def number(text):
    """The first number of a text."""
    return float(re.search(r"[\d.]+", text.replace(",", ""))[0])


HIDDEN = """[...document.querySelectorAll("#places a")].filter((place) => place.getBoundingClientRect().right > innerWidth)
    .concat(innerWidth > 400 ? [] : [...document.querySelectorAll(".scroll:has(> table)")].filter((box) => box.scrollWidth > box.clientWidth))
    .map((one) => one.getAttribute("aria-label") ?? one.textContent)"""
"""places that the window cuts off, and on a phone tables that have columns out of sight"""


def nothing_hinders(page, pictures, name):
    """At three sizes, in light and dark: axe finds no fault, nothing is wider than the window, no place and no table is
    cut off; a picture is kept of each.
    """
    before = page.viewport_size
    for size, viewport in SIZES.items():
        page.set_viewport_size(viewport)
        for theme in THEMES:
            page.emulate_media(color_scheme=theme)
            page.wait_for_timeout(150)  # charts are drawn anew for the width
            found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
            faults = [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found]
            assert faults == [], (size, theme)
            assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], (size, theme)
            assert page.evaluate(HIDDEN) == [], (size, theme)
            page.screenshot(path=pictures / f"{name}-{size}-{theme}.png", full_page=True)
    page.emulate_media(color_scheme="light")
    page.set_viewport_size(before)
