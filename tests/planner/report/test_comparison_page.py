"""The comparison page in a real browser, opened as a file: what its charts draw and tell."""

from __future__ import annotations

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from chromium import PATIENCE
from playwright.sync_api import expect
from sample_plans import sample_plan, sample_plans
from synthetic import decoder_like

from tightfit.planner.compare import compare
from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.report.diff import diff, grouped
from tightfit.planner.report.html import comparison_page
from tightfit.profiles.graph_input import BareGraph, BareOperator, graph_profile
from tightfit.runtime.common.units import MIB


def plans():
    """Plans on the machine, and one on a card with far more memory than it needs."""
    device = sample_plan().device.model_copy(update={"name": "card", "kind": "cuda", "measured": False})
    return [*sample_plans(), sample_plan(budget=4096 * MIB, device=device)]


def colours(frame):
    """The colours of a timeline's pixels, of which there are many of each."""
    return frame.locator("canvas").first.evaluate(
        """canvas => {
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height), counts = new Map();
          for (let i = 0; i < data.length; i += 4) {
            const colour = `rgb(${data[i]}, ${data[i + 1]}, ${data[i + 2]})`;
            if (data[i + 3] === 255) counts.set(colour, (counts.get(colour) ?? 0) + 1);
          }
          return Object.fromEntries([...counts].filter(([, count]) => count > 200));
        }"""
    )


def colour_of(page, name):
    return page.evaluate(
        """name => {
          const dot = document.body.appendChild(document.createElement("span"));
          dot.style.color = `var(${name})`;
          const colour = getComputedStyle(dot).color;
          dot.remove();
          return colour;
        }""",
        name,
    )


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
        # That `colours` reads pixels back is the test's doing.
        page.on("console", lambda message: None if "getImageData" in message.text else wrong.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        made.append(file.as_uri())
        return page

    yield call
    assert wrong == []
    assert [url for url in asked if not url.startswith("data:")] == made


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


@pytest.mark.slow
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
        "proven bound: no plan that can be chosen is faster",
        "× does not fit; the line beside it ends where it would",
        "slower than this picture reaches: its seconds are in the table",
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


def test_the_step_is_drawn(page, article):
    frame = article.locator(".step-frame")
    expect(frame).to_be_visible()
    told = article.locator(".legend li").all_inner_texts()
    assert told == [
        "memory",
        "Python and PyTorch",
        "activations",
        "empty, kept for reuse",
        "below",
        "forward",
        "backward",
    ]
    drawn = colours(frame)
    for name in ("--kind-floor", "--kind-activation", "--step-forward", "--step-backward"):
        assert colour_of(page, name) in drawn, name
    assert colour_of(page, "--kind-weight") not in drawn
    # The activations take less of the picture than Python and PyTorch do.
    assert drawn[colour_of(page, "--kind-activation")] < drawn[colour_of(page, "--kind-floor")]


def test_the_keyboard_moves_a_cursor_that_is_read_out(page, article):
    frame, reading, voice = (article.locator(selector) for selector in (".step-frame", ".reading", ".unseen"))
    assert "One step of solver at 250.0 MiB" in frame.get_attribute("aria-label")
    frame.focus()
    # It begins at the fullest instruction: all sixteen layers have saved theirs.
    expect(reading).to_contain_text("instruction 16 of 48: layer 15: aten.mm.default (forward)")
    expect(voice).to_have_text(reading.inner_text())
    assert "activations 16.0" in reading.inner_text()
    page.keyboard.press("ArrowRight")
    expect(reading).to_contain_text("instruction 17 of 48: layer 15: aten.mm.default (backward)")
    page.keyboard.press("ArrowRight")
    expect(reading).to_contain_text("instruction 18 of 48: free layer 15/saved")
    assert "activations 15.0" in reading.inner_text()
    page.keyboard.press("End")
    expect(reading).to_contain_text("instruction 48 of 48")
    page.keyboard.press("PageUp")
    expect(reading).to_contain_text("instruction 45 of 48: layer 1: aten.mm.default (backward)")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    expect(reading).to_contain_text("instruction 1 of 48")
    expect(voice).to_have_text(reading.inner_text())
    # The pointer does the same, and is not read out.
    box = frame.bounding_box()
    frame.hover(position={"x": box["width"] * 0.9, "y": 100})
    expect(reading).not_to_contain_text("instruction 1 of 48")
    expect(voice).to_contain_text("instruction 1 of 48")


def test_what_is_clicked_is_told(page, article):
    frame, told = article.locator(".step-frame"), article.locator(".step-detail")
    frame.focus()
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    expect(told.locator("h3")).to_have_text("Instruction 1")
    assert told.locator("tbody th").all_inner_texts() == ["layer 0/saved"]
    told.get_by_label("Close").click()
    expect(told).to_be_empty()
    # A band: what lies there, of its kind. The lane of layers: a layer's tensors.
    box = frame.bounding_box()
    frame.click(position={"x": box["width"] / 2, "y": 270})
    expect(told.locator("h3")).to_have_text("Python and PyTorch, 150.0 MiB")
    frame.click(position={"x": 75, "y": 290})
    expect(told.locator("h3")).to_have_text("Layer layer 0")
    expect(told.locator("tbody td").nth(1)).to_contain_text("100 % of the step")


def test_it_is_enlarged_and_moved(page, article):
    frame, reading = article.locator(".step-frame"), article.locator(".reading")
    box = frame.bounding_box()
    middle = {"x": 62 + (box["width"] - 76) / 2, "y": 100}

    def pointed(x):
        frame.hover(position={"x": x, "y": 100})
        return int(re.search(r"instruction (\d+) of", reading.inner_text())[1])

    whole = [pointed(x) for x in (70, middle["x"], box["width"] - 20)]
    assert whole[0] <= 2
    assert whole[2] >= 45
    frame.hover(position=middle)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -300)
    page.keyboard.up("Control")
    page.wait_for_timeout(100)
    near = [pointed(x) for x in (70, middle["x"], box["width"] - 20)]
    assert whole[0] < near[0] <= near[1] <= near[2] < whole[2]  # what lay under the pointer stays there
    page.mouse.move(box["x"] + middle["x"], box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + middle["x"] - 200, box["y"] + 100, steps=4)
    page.mouse.up()
    page.wait_for_timeout(100)
    assert pointed(70) > near[0]
    article.get_by_role("button", name="Whole step").click()
    page.wait_for_timeout(100)
    assert [pointed(x) for x in (70, box["width"] - 20)] == [whole[0], whole[2]]


def test_a_budget_that_a_policy_does_not_fit_cannot_be_chosen(page, article):
    page.check("#chooser input[name=policy][value=keep-all]", force=True)
    assert page.locator(".plan:visible h3").inner_text() == "keep-all at 800.0 MiB on cpu-test"
    assert page.locator("#chooser input[name=budget]:disabled").count() == 4
    # Drawn when it is shown, at the width of its place.
    shown = page.locator(".plan:visible .step-frame")
    expect(shown.locator("canvas").first).to_be_visible()
    page.wait_for_function("() => document.querySelector('.plan:not([hidden]) canvas').width > 500")


@pytest.mark.slow
def test_nothing_hinders_people(page, article):
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        assert [(one["id"], [node["html"][:100] for node in one["nodes"]]) for one in found] == [], scheme
    # The button changes the ground, and the colours of the pictures with it.
    frame = article.locator(".step-frame")
    dark = colour_of(page, "--kind-activation")
    assert dark in colours(frame)
    page.click("#theme")
    page.wait_for_timeout(100)
    light = colour_of(page, "--kind-activation")
    assert light != dark
    assert light in colours(frame)
    assert dark not in colours(frame)
    page.click("#theme")
    page.emulate_media(color_scheme="light")


def test_on_a_phone_the_charts_are_drawn_anew(page, article):
    page.set_viewport_size({"width": 390, "height": 844})
    expect(page.locator(".curve svg").first).to_have_attribute("viewBox", re.compile(r"^0 0 3\d\d "))
    page.wait_for_function("() => document.querySelector('.plan:not([hidden]) canvas').width < 390")
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
    expect(shown.locator(".reading")).to_have_text(
        re.compile(r"^\d\.\d+ µs, instruction .*\. 500 B = activations 500$")
    )


def test_budgets_that_nothing_fits_are_crossed_all_the_same(opened):
    page = opened([plan for plan in sample_plans() if plan.status == "infeasible"])
    assert page.locator(".misfit").count() == 4
    assert page.locator("svg circle").count() == 0


def test_any_two_plans_are_compared_tensor_by_tensor(opened):
    """By the page's script as by `diff`."""
    planner = ModelPlanner(decoder_like(2, tokens=128, slices=2, slice_rows=512))
    made = [planner.plan(1 << 30, policy=policy) for policy in ("keep-all", "checkpoint-layers", "mebp")]
    page, changes = opened(made), diff(made[0], made[2])
    page.select_option("#pair [name=second]", "2")
    expect(page.locator("#diff-pair")).to_have_text("keep-all at 1024.0 MiB → mebp at 1024.0 MiB")
    rows = [row.locator("th, td").all_inner_texts() for row in page.locator("#diff-rows tr").all()]
    assert [row[0] for row in rows] == [change.name for change in changes]
    assert [row[1] for row in rows] == [
        before if before == after else f"{before} → {after}"
        for before, after in [(change.before or "–", change.after or "–") for change in changes]
    ]
    for column, name in enumerate(("compute_seconds", "transfer_seconds"), 3):
        shown = sum(float(row[column]) for row in rows) / 1000
        assert shown == pytest.approx(sum(getattr(change, name) for change in changes), abs=1e-5 * len(rows))
    assert page.locator("#diff-sums tr").count() == len(grouped(changes))
    page.select_option("#pair [name=first]", "2")
    expect(page.locator("#diff-pair")).to_have_text(re.compile(": the same$"))


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
