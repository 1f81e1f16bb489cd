"""The page of a fleet: as text, and in a real browser, opened as a file."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from chromium import PATIENCE
from html_page import Page
from playwright.sync_api import expect
from sample_fleets import sample_fleet, sample_member

from tightfit.planner.fleet.schema import FleetPlan, Span
from tightfit.planner.report.chart_data import lanes_of
from tightfit.planner.report.fleet_html import fleet_page
from tightfit.planner.report.fleet_text import activity_sheet, chain_sheet


def renamed(names):
    text = sample_fleet().model_dump_json()
    for old, new in names.items():
        text = text.replace(f'"{old}', f'"{new}').replace(f"→ {old}", f"→ {new}")
    return FleetPlan.model_validate_json(text)


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_links_lie_between_their_devices():
    """Upwards first, whatever the devices are called."""
    names = [lane["name"] for lane in lanes_of(renamed({"laptop": "z", "phone": "a"}))["lanes"]]
    assert names == ["z", "z → a", "a → z", "a"]
    drawn = lanes_of(sample_fleet())
    assert [(lane["name"], lane["kind"]) for lane in drawn["lanes"]] == [
        ("laptop", "device"),
        ("laptop → phone", "link"),
        ("phone → laptop", "link"),
        ("phone", "device"),
    ]
    assert [kind["name"] for kind in drawn["kinds"]] == ["compute", "add", "send", "update"]
    assert drawn["seconds"] == 7.25


def test_every_micro_batch_is_a_bar():
    lanes = {lane["name"]: lane["bars"] for lane in lanes_of(sample_fleet())["lanes"]}
    computed = [bar for bar in lanes["phone"] if bar["what"] == "compute"]
    assert [(bar["first"], bar["last"], bar["begin"], bar["end"]) for bar in computed] == [
        (5, 5, 0.0, 1.5), (6, 6, 1.5, 3.0), (7, 7, 3.0, 4.5),
    ]  # fmt: skip
    assert [(bar["begin"], bar["end"], bar["first"]) for bar in lanes["laptop → phone"]] == [(5.0, 6.0, None)]
    assert [bar["begin"] for bar in lanes["phone"] if bar["what"] == "add"] == [5.25, 5.5, 5.75, 6.0]
    # It makes no difference whether the timeline has them one by one.
    apart = [
        Span(lane="phone", what="compute", begin_seconds=1.5 * k, end_seconds=1.5 * (k + 1), micro_batch=5 + k)
        for k in range(3)
    ]
    (lane,) = lanes_of(sample_fleet(timeline=apart))["lanes"]
    assert lane["bars"] == computed


def test_micro_batches_too_short_to_be_told_apart_are_one_bar():
    many = [sample_member("laptop", 0, 725, 0.01), sample_member("phone", 725, 1, 1.0)]
    spans = [Span(lane="laptop", what="compute", begin_seconds=0.0, end_seconds=7.25)]
    (lane,) = lanes_of(sample_fleet(members=many, timeline=spans))["lanes"]
    (bar,) = lane["bars"]
    assert (bar["first"], bar["last"], bar["begin"], bar["end"]) == (0, 724, 0.0, 7.25)


def test_a_short_exchange_is_enlarged():
    assert lanes_of(sample_fleet())["exchange"] == 5.0  # 2.25 s of 7.25
    assert lanes_of(sample_fleet(compute_seconds=4.5))["exchange"] is None
    alone = sample_fleet(members=[sample_member("laptop", 0, 8, 0.875)], compute_seconds=7.0, timeline=[])
    assert lanes_of(alone)["exchange"] is None


# --- the page as text -------------------------------------------------------------------------------------------------


def test_the_page_fetches_nothing_and_escapes_names():
    text = fleet_page(sample_fleet())
    page = Page(text)
    # The scripts within it are looked at in test_html.py.
    words = re.sub(
        r'<script type="importmap">.*?</script>|^import .* from "tightfit/\w+\.js";$', "", text, flags=re.MULTILINE
    )
    assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]|@import|url\(|\bimport\b|\bfetch\(", words, re.IGNORECASE)
    assert not [element for element in page.elements if "src" in element or "href" in element]
    assert "<model>" not in text
    assert "<title>Tiny &lt;model&gt; on laptop and phone – a step of a fleet</title>" in text


def test_the_tables_say_what_the_texts_say():
    fleet = sample_fleet()
    page = Page(fleet_page(fleet))
    cells = [element["text"] for element in page.elements if element["tag"] in {"th", "td"}]
    wanted = [activity_sheet(fleet), chain_sheet(fleet)]
    assert cells == [cell for sheet in wanted for row in (sheet.headings, *sheet.rows) for cell in row]
    assert [element["text"] for element in page.find("caption")] == [sheet.caption for sheet in wanted]
    assert json.loads(page.find("script", id="drawn")[0]["text"]) == lanes_of(fleet)


# --- the page in a browser --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    file = tmp_path_factory.mktemp("fleet") / "fleet.html"
    file.write_text(fleet_page(sample_fleet()))
    opened = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
    opened.set_default_timeout(PATIENCE)
    wrong, asked = [], []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda message: wrong.append(message.text))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(file.as_uri())
    yield opened
    assert wrong == []
    assert set(asked) == {file.as_uri()}
    opened.close()


def test_every_lane_is_drawn(page):
    lanes = page.locator("#lanes svg [data-lane]")
    assert [lane.get_attribute("data-lane") for lane in lanes.all()] == [
        "laptop", "laptop → phone", "phone → laptop", "phone",
    ]  # fmt: skip
    assert [lane.locator(".bar-mark").count() for lane in lanes.all()] == [6, 1, 1, 8]
    assert lanes.first.locator(".bar-name").all_text_contents() == ["0", "1", "2", "3", "4"]
    titles = [title.text_content() for title in lanes.locator("title").all()]
    assert "laptop computes micro-batch 3: 3.00 s to 4.00 s" in titles
    assert "laptop → phone sends: 5.00 s to 6.00 s" in titles
    assert page.locator(".legend li").all_inner_texts() == ["computes", "adds gradients", "sends", "updates", "waits"]
    # Lanes lie under each other, bars beside each other; a second is as long everywhere.
    tops = [lane.locator(".bar-mark").first.bounding_box()["y"] for lane in lanes.all()]
    assert tops == sorted(set(tops))
    boxes = [bar.bounding_box() for bar in lanes.first.locator(".bar-mark").all()]
    assert all(abs(one["x"] + one["width"] - next_["x"]) < 2 for one, next_ in itertools.pairwise(boxes[:5]))
    assert lanes.nth(1).locator("rect").bounding_box()["width"] == pytest.approx(boxes[0]["width"], abs=0.2)
    fills = lanes.locator(".bar-mark").evaluate_all("them => [...new Set(them.map(one => getComputedStyle(one).fill))]")
    assert len(fills) == 4
    assert "rgb(0, 0, 0)" not in fills


def test_the_exchange_is_drawn_once_more(page, browser, tmp_path):
    whole, enlarged = page.locator("#lanes"), page.locator("#exchange")
    assert [lane.locator(".bar-mark").count() for lane in enlarged.locator("[data-lane]").all()] == [1, 1, 1, 5]
    link = "[data-lane='laptop → phone'] rect"
    boxes = [box.locator(link).bounding_box() for box in (whole, enlarged)]
    assert boxes[1]["width"] == pytest.approx(boxes[0]["width"] * 7.25 / 2.25, rel=0.01)
    enlarged.locator("svg").focus()
    expect(page.locator(".reading")).to_have_text("5.00 s: laptop → phone sends; laptop waits; phone waits")
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".reading")).to_have_text(
        "5.00 s: laptop → phone sends; laptop waits; phone waits"
    )  # nothing lies before it
    page.keyboard.press("End")
    expect(page.locator(".reading")).to_have_text("7.25 s: the step is done")
    file = tmp_path / "long.html"
    file.write_text(fleet_page(sample_fleet(compute_seconds=4.5)))
    other = browser.new_page()
    other.goto(file.as_uri())
    expect(other.locator("#lanes svg")).to_be_visible()
    expect(other.locator("h3", has_text="enlarged")).to_be_hidden()
    assert other.locator("#exchange svg").count() == 0
    other.close()


def test_the_keyboard_goes_from_change_to_change(page):
    chart, reading, cursor = page.locator("#lanes svg"), page.locator(".reading"), page.locator("#lanes .cursor")
    assert chart.get_attribute("aria-label").startswith(
        "What each device and each link does in one step of Tiny <model>"
    )
    page.reload()
    expect(reading).to_contain_text("use the arrow keys")
    page.locator("#theme").focus()
    page.keyboard.press("Tab")
    expect(chart).to_be_focused()
    expect(reading).to_have_text("0.00 s: laptop computes micro-batch 0; phone computes micro-batch 5")
    page.keyboard.press("ArrowRight")
    expect(reading).to_have_text("1.00 s: laptop computes micro-batch 1; phone computes micro-batch 5")
    place = float(cursor.get_attribute("x1"))
    page.keyboard.press("ArrowRight")
    expect(reading).to_have_text("1.50 s: laptop computes micro-batch 1; phone computes micro-batch 6")
    assert float(cursor.get_attribute("x1")) > place
    page.keyboard.press("End")
    expect(reading).to_have_text("7.25 s: the step is done")
    page.keyboard.press("ArrowLeft")
    expect(reading).to_have_text("7.00 s: laptop updates; phone updates")
    # The pointer does the same: here nobody but the link is at work.
    chart.blur()
    box = page.locator("#lanes [data-lane='phone → laptop'] rect").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 2)
    expect(reading).to_have_text(re.compile(r"^6\.06\d* s: phone → laptop sends; laptop waits; phone waits$"))
    page.locator("h1").hover()
    expect(cursor).to_have_attribute("visibility", "hidden")


def test_nothing_hinders_people(page):
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        assert [(one["id"], [node["html"][:100] for node in one["nodes"]]) for one in found] == [], scheme
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 390, "height": 844})
    expect(page.locator("#lanes svg")).to_have_attribute("viewBox", re.compile(r"^0 0 3\d\d "))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1200, "height": 900})
