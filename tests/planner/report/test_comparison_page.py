"""The comparison page in a real browser, opened as a file: what its charts draw and tell."""

from __future__ import annotations

import itertools
import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from chromium import PATIENCE
from playwright.sync_api import expect
from sample_plans import sample_plan, sample_plans

from tightfit.planner.report.compare import compare
from tightfit.planner.report.html import comparison_page
from tightfit.planner.schema import TimelinePoint
from tightfit.profiles.graph_input import BareGraph, BareOperator, graph_profile
from tightfit.runtime.common.units import MIB

KINDS = ["floor", "trainable", "optimizer", "weight", "activation"]
FREE = 30 * MIB


def plans():
    """Plans on the machine, and one on a card with far more memory than it needs, of which some lies free for reuse."""
    device = sample_plan().device.model_copy(update={"name": "card", "kind": "cuda", "measured": False})
    roomy = sample_plan(budget=4096 * MIB, device=device)
    timeline = [
        TimelinePoint(
            instruction=point.instruction,
            seconds=point.seconds,
            bytes=point.bytes + FREE,
            by_kind=point.by_kind | {"fragmentation": FREE},
        )
        for point in roomy.timeline
    ]
    return [*sample_plans(), roomy.model_copy(update={"timeline": timeline})]


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """Open a page of plans from its file; anything that goes wrong in it fails the test, and so does any request."""
    folder = tmp_path_factory.mktemp("comparison")
    wrong, asked, made = [], [], []

    def call(plans):
        file = folder / f"{len(made)}.html"
        file.write_text(comparison_page(plans))
        page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        made.append(file.as_uri())
        return page

    yield call
    assert wrong == []
    assert asked == made


@pytest.fixture(scope="module")
def page(opened):
    return opened(plans())


@pytest.fixture
def article(page):
    """The plan that is shown when the page is opened: the solver's at 250 MiB."""
    for name, value in (("device", "cpu-test"), ("policy", "solver"), ("budget", str(250 * MIB))):
        page.check(f"#chooser input[name={name}][value='{value}']", force=True)
    return page.locator(".plan:visible")


def titles(page, selector):
    return [title.text_content() for title in page.locator(f"{selector} title").all()]


def test_the_curve_is_drawn(page):
    curves = page.locator(".curve")
    assert curves.locator("svg").count() == 2
    first = curves.first
    assert [group.locator("circle").count() for group in first.locator("svg g").all()] == [4, 1, 3]
    assert first.locator("svg .line").count() == 2  # a single plan makes no line
    assert first.locator("svg .bound").count() == 1
    assert "solver at 250.0 MiB: 1.28 s per step, peak 246.0 MiB" in titles(first, ".dot-mark")
    assert first.locator("svg text", has_text="budget, MiB").count() == 1
    assert first.locator(".legend li").all_inner_texts() == [
        "solver",
        "keep-all",
        "mebp",
        "proven bound: no plan of this class is faster",
        "× does not fit; the line beside it ends where it would",
    ]
    # More seconds are higher up, more memory is further right.
    left, right = first.locator("svg g").first.locator("circle").all()[::3]
    assert float(left.get_attribute("cx")) < float(right.get_attribute("cx"))
    assert float(left.get_attribute("cy")) < float(right.get_attribute("cy"))
    assert curves.last.locator("svg circle").count() == 1
    assert curves.last.locator(".legend li").all_inner_texts() == ["solver"]


def test_budgets_that_are_too_small_are_crossed(page):
    needs = [f"keep-all at {budget}.0 MiB: needs 640.0 MiB" for budget in (250, 350, 500)]
    assert titles(page, ".misfit") == [*needs, "mebp at 250.0 MiB: needs 262.0 MiB"]
    # No cross hides another.
    places = [cross.bounding_box() for cross in page.locator(".misfit").all()]
    assert len({(round(place["x"]), round(place["y"])) for place in places}) == len(places)


def test_the_timeline_is_drawn(page, article):
    kinds = article.locator("svg path[data-kind]")
    assert [kind.get_attribute("data-kind") for kind in kinds.all()] == KINDS
    assert article.locator(".legend li").all_inner_texts() == [
        "Python and PyTorch",
        "trainables",
        "optimizer state",
        "weights, unpacked",
        "activations",
    ]
    assert article.locator(".cap-label").text_content() == "cap 250.0 MiB"
    assert article.locator("svg .cap").count() == 1
    assert titles(article, ".peak") == ["layer 5: aten.mm.default: 245.9 MiB in use"]
    assert article.locator(".peak-label").text_content() == "instruction 23: layer 5: aten.mm.default"
    # The floor fills most of the memory, so the axis starts just inside it.
    assert re.fullmatch(r"MiB, from 2\d0 up", article.locator("svg text", has_text=", from ").text_content())
    # The bands lie on each other: what ends the lowest begins the next.
    boxes = [kind.bounding_box() for kind in kinds.all()[:3]]
    assert all(abs(low["y"] - (high["y"] + high["height"])) < 1 for low, high in itertools.pairwise(boxes))
    # A colour for each, of which none is the default's black.
    fills = kinds.evaluate_all("them => them.map(one => getComputedStyle(one).fill)")
    assert len(set(fills)) == len(KINDS)
    assert "rgb(0, 0, 0)" not in fills


def test_a_far_away_cap_does_not_flatten_the_picture_and_what_lies_free_sets_no_peak(page):
    page.check("#chooser input[name=device][value=card]", force=True)
    article = page.locator(".plan:visible")
    assert article.locator("h3").inner_text() == "solver at 4096.0 MiB on card"
    assert article.locator("svg .cap").count() == 0
    assert article.locator("svg path[data-kind=fragmentation]").count() == 1
    full = max(point.bytes for point in sample_plan().timeline) / MIB
    assert titles(article, ".peak") == [f"layer 5: aten.mm.default: {full:.1f} MiB in use"]


def test_the_keyboard_moves_a_cursor_that_is_read_out(page, article):
    chart, reading, cursor = article.locator("svg"), article.locator(".reading"), article.locator("svg .cursor")
    assert chart.get_attribute("aria-label").startswith("Memory over one step of solver at 250.0 MiB")
    assert chart.get_attribute("tabindex") == "0"  # Chromium alone would do without
    expect(reading).to_contain_text("use the arrow keys")
    expect(cursor).to_have_attribute("visibility", "hidden")
    page.locator("#chooser input[name=budget]:checked").focus()
    page.keyboard.press("Tab")
    expect(chart).to_be_focused()
    expect(cursor).to_have_attribute("visibility", "visible")
    at_peak, place = reading.inner_text(), cursor.get_attribute("x1")
    assert re.fullmatch(r"0\.6\d+ s: 245\.9 MiB = Python and PyTorch 220\.0 \+ .* \+ activations 4\.7", at_peak)
    page.keyboard.press("ArrowRight")
    assert reading.inner_text() != at_peak
    assert float(cursor.get_attribute("x1")) > float(place)
    page.keyboard.press("ArrowLeft")
    assert reading.inner_text() == at_peak
    page.keyboard.press("End")
    assert reading.inner_text().startswith("1.28 s: ")
    page.keyboard.press("PageUp")
    assert reading.inner_text().startswith("1.28 s: ")  # nothing lies behind the end
    page.keyboard.press("Home")
    assert re.match(r"0\.0\d+ s: ", reading.inner_text())
    # The pointer does the same, and takes the cursor away when it leaves a chart that has no focus.
    chart.blur()
    box = chart.bounding_box()
    chart.hover(position={"x": box["width"] * 0.9, "y": box["height"] / 2})
    expect(reading).to_have_text(re.compile(r"^1\.1\d+ s: "))
    expect(cursor).to_have_attribute("visibility", "visible")
    article.locator("h3").hover()
    expect(cursor).to_have_attribute("visibility", "hidden")


def test_a_budget_that_a_policy_does_not_fit_cannot_be_chosen(page, article):
    page.check("#chooser input[name=policy][value=keep-all]", force=True)
    assert page.locator(".plan:visible h3").inner_text() == "keep-all at 800.0 MiB on cpu-test"
    assert page.locator("#chooser input[name=budget]:disabled").count() == 4
    # Drawn when it is shown, at the width of its place.
    shown = page.locator(".plan:visible svg")
    width = page.locator(".plan:visible .chart-box").evaluate("box => box.clientWidth")
    expect(shown).to_have_attribute("viewBox", f"0 0 {width} 360")


def test_nothing_hinders_people(page, article):
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        assert [(one["id"], [node["html"][:100] for node in one["nodes"]]) for one in found] == [], scheme
    # The button changes the ground, and the colours of the charts with it.
    band = article.locator("svg path[data-kind=weight]")
    fill = "band => getComputedStyle(band).fill"
    dark = band.evaluate(fill)
    page.click("#theme")
    assert band.evaluate(fill) != dark
    page.click("#theme")
    assert band.evaluate(fill) == dark
    page.emulate_media(color_scheme="light")


def test_on_a_phone_the_charts_are_drawn_anew(page, article):
    page.set_viewport_size({"width": 390, "height": 844})
    expect(page.locator(".curve svg").first).to_have_attribute("viewBox", re.compile(r"^0 0 3\d\d "))
    expect(article.locator("svg")).to_have_attribute("viewBox", re.compile(r"^0 0 3\d\d "))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1200, "height": 900})


def test_small_graphs_are_told_in_bytes_and_microseconds(opened):
    small = (("a", 100, []), ("b", 300, ["a"]), ("c", 200, ["b"]), ("d", 50, ["a", "c"]))
    made = [
        BareOperator(name=name, seconds=1e-6 * (i + 1), output_bytes=size, inputs=inputs)
        for i, (name, size, inputs) in enumerate(small)
    ]
    found = compare(graph_profile(BareGraph(format="tightfit-graph", operators=made)), [450, 500, 600])
    page = opened(found.plans)
    assert page.locator("svg text", has_text="budget, B").count() == 1
    assert "solver at 500 B: 11.0 µs per step, peak 500 B" in titles(page, ".dot-mark")
    assert "solver at 450 B: needs 500 B" in titles(page, ".misfit")
    shown = page.locator(".plan:visible")
    assert shown.locator(".cap-label").text_content() == "cap 500 B"
    shown.locator("svg").focus()
    assert re.fullmatch(r"\d\.\d+ µs: 500 B = activations 500", shown.locator(".reading").inner_text())


def test_budgets_that_nothing_fits_are_crossed_all_the_same(opened):
    page = opened([plan for plan in sample_plans() if plan.status == "infeasible"])
    assert page.locator(".misfit").count() == 4
    assert page.locator("svg circle").count() == 0


def test_without_a_script_the_tables_say_everything(browser, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(comparison_page(plans()))
    page = browser.new_page(java_script_enabled=False)
    page.goto(file.as_uri())
    assert page.locator("svg").count() == 0
    said = page.locator(".chart-box noscript")
    assert said.count() == page.locator(".chart-box").count() > 2
    assert all(one.bounding_box()["height"] > 0 for one in said.all())
    assert all(one.is_visible() for one in page.locator(".curve table, .plan .facts").all())
    expect(page.locator("#chooser")).to_be_hidden()
    page.close()
