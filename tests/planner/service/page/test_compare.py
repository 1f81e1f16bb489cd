"""The place where plans, or runs, stand side by side."""

from __future__ import annotations

import re

import pytest
from places_of_the_page import PHONE, at, nothing_hinders, number, tab
from playwright.sync_api import expect
from synthetic import decoder_like

from tightfit.planner.plan import plan as solve


@pytest.fixture(scope="module")
def plans(served, decoder):
    """Three plans: two rules that fit, and one that does not."""
    need = {rule: solve(decoder_like(2), 1 << 40, policy=rule).peak_bytes for rule in ("mebp", "checkpoint-layers")}
    asked = [
        ("mebp", need["mebp"] * 1.02),
        ("checkpoint-layers", need["checkpoint-layers"] * 1.02),
        ("mebp", need["mebp"] * 0.5),
    ]
    jobs = [
        served.http.post("/v1/plans", json={"profile": decoder, "memory": int(memory), "policy": rule}).json()
        for rule, memory in asked
    ]
    return [served.wait(job)["result"]["plan"] for job in jobs]


@pytest.fixture
def page(browser, served, plans):
    with tab(browser, at(served, f"compare?plans={','.join(plans)}")) as opened:
        expect(opened.locator(".step-frame")).to_have_count(2)  # the third has no step
        yield opened


def figures(page):
    """Row of the table of what differs -> its cells."""
    found = {}
    for row in page.locator(".side-by-side > .scroll tbody tr").all():
        cells = row.locator("th, td").all_inner_texts()
        found[cells[0]] = cells[1:]
    return found


def test_what_differs_comes_first_and_the_best_is_marked(page, served, plans):
    told = figures(page)
    assert told["fits"] == ["yes", "yes", "no"]
    assert told["planned by"] == ["rule “Stream the weights”", "rule “Redo each layer”", "rule “Stream the weights”"]
    summaries = [served.http.get(f"/v1/plans/{plan}").json()["summary"] for plan in plans]
    steps = [number(cell) for cell in told["one step, by the model"][:2]]
    assert steps == [pytest.approx(summary["step_seconds"], rel=1e-3) for summary in summaries[:2]]
    assert told["one step, by the model"][2] == "–"
    best = page.locator("tr", has=page.locator("th", has_text=re.compile("^one step, by the model$"))).locator(
        "td.best"
    )
    assert number(best.inner_text()) == min(steps)
    # What is the same is folded, and does not stand above.
    same = page.locator("details", has_text="The same in all")
    expect(same.locator("tbody")).to_be_hidden()
    same.locator("summary").click()
    names = same.locator("tbody th").all_inner_texts()
    assert "model" in names
    assert not set(names) & told.keys()


def test_steps_are_on_one_scale_and_move_together(page):
    frames = page.locator(".step-frame")
    before = [frame.locator("canvas").first.evaluate("canvas => canvas.toDataURL()") for frame in frames.all()]
    page.get_by_role("button", name="Zoom in").click()
    page.wait_for_timeout(200)
    after = [frame.locator("canvas").first.evaluate("canvas => canvas.toDataURL()") for frame in frames.all()]
    assert all(old != new for old, new in zip(before, after, strict=True))
    expect(page.get_by_role("button", name="Zoom in")).to_have_count(1)  # one set of buttons for all


def test_tensors_of_any_two(page, served, plans):
    section = page.locator("section", has_text="What becomes of the tensors")
    expect(section.locator("table").first).to_be_visible()
    difference = served.http.get(f"/v1/plans/{plans[0]}/changes/{plans[1]}").json()
    expect(section.locator("table").first.locator("tbody tr")).to_have_count(len(difference["groups"]))
    section.get_by_label("to", exact=True).select_option(index=0)
    expect(section).to_contain_text("Both treat every tensor the same.")


def test_one_is_left_out_and_another_added(page, plans):
    page.get_by_label(re.compile("^Leave out .*")).last.click()
    expect(page.locator(".chosen li")).to_have_count(2)
    assert page.url.endswith(f"plans={plans[0]}%2C{plans[1]}")
    page.get_by_role("button", name="Add a plan").click()
    page.locator("dialog .listing button.link:enabled").first.click()
    expect(page.locator(".chosen li")).to_have_count(3)
    page.reload()
    expect(page.locator(".chosen li")).to_have_count(3)


def test_on_a_phone_each_figure_has_a_value_for_each_letter(browser, served, plans):
    with tab(browser, at(served, f"compare?plans={','.join(plans)}"), viewport=PHONE) as page:
        row = page.locator("tr", has=page.locator("th", has_text=re.compile("^one step, by the model$")))
        expect(row).to_be_visible()
        cells = [cell.bounding_box() for cell in row.locator("td").all()]
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"] for box in cells)
        letters = row.locator("td").evaluate_all("them => them.map(one => getComputedStyle(one, '::before').content)")
        assert letters == ['"A"', '"B"', '"C"']
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_nothing_chosen_says_where_to_choose(browser, served):
    with tab(browser, at(served, "compare")) as page:
        expect(page.locator(".empty")).to_contain_text("Nothing is chosen yet")
        page.locator(".empty").get_by_role("link", name="Plans").click()
        expect(page.locator("h1")).to_have_text("Plans")


@pytest.mark.slow
def test_nothing_hinders_people(page, pictures):
    for fold in page.locator("details > summary").all():
        fold.click()
    nothing_hinders(page, pictures, "compare")


@pytest.mark.parametrize("width", [390, 320])
def test_it_fits_a_phone(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.wait_for_timeout(150)
    wide = page.evaluate(
        "[...document.querySelectorAll('body *')].filter((one) => one.getBoundingClientRect().right > innerWidth && !one.closest('.scroll')).map((one) => one.outerHTML.slice(0, 150))"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width, wide
