"""The page in a real browser: the four jobs that it is for, by mouse and by keyboard, in light and dark, on a phone.

Pictures are kept in the folder that TIGHTFIT_PICTURES names, or in the test's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from chromium import PATIENCE
from damage import SEQ
from places import ROOT
from playwright.sync_api import expect
from served import Served
from synthetic import decoder_like

from tightfit.planner.plan import minimum_budget
from tightfit.planner.service.client import connect
from tightfit.planner.service.wire.remote_devices import PhaseMemory, RemoteDevice, RunReport
from tightfit.planner.service.wire.schema import PLAN_JOB

NOTE_CURVING = """() => {
  const curving = document.getElementById("curving");
  const note = () => { if (curving.textContent) document.body.dataset.curving = curving.textContent; };
  new MutationObserver(note).observe(curving, { childList: true, subtree: true, characterData: true });
}"""
"""keeps what is said of the curve, however short a time it is said"""


@contextlib.contextmanager
def serving(folder, root):
    service = Served(folder / "data", "--root", str(root)).start()
    yield service
    service.stop()
    assert not [line for line in service.lines() if line["level"] == "error"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("page"), tmp_path_factory.mktemp("root")) as service:
        yield service


@pytest.fixture
def measuring(tmp_path, work, measured):
    """A service that has measured the tiny model before, so that it measures another adapter of it sooner."""
    shutil.copytree(measured, tmp_path / "data")
    with serving(tmp_path, work) as service:
        yield service


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = Path(os.environ.get("TIGHTFIT_PICTURES") or tmp_path_factory.mktemp("pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def page(browser, served, tmp_path_factory):
    """The page with a profile uploaded and its curve drawn; anything that goes wrong in it fails the test."""
    opened = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
    opened.set_default_timeout(PATIENCE)
    wrong, asked = [], []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(served.url)
    profile = tmp_path_factory.mktemp("profile") / "profile.json"
    profile.write_text(decoder_like(2).model_dump_json())
    opened.set_input_files("#upload", profile)
    # The plan in the middle is there before the curve is.
    expect(opened.locator("#timeline svg")).to_be_visible()
    expect(opened.locator("#curve")).not_to_have_attribute("aria-busy", "true")
    expect(opened.locator("#curve-legend")).to_contain_text("mebp")
    yield opened
    assert wrong == []
    elsewhere = [url for url in asked if not url.startswith((served.url, "data:", "blob:"))]
    assert elsewhere == []
    opened.close()


def rows(page, selector):
    return [
        [cell.text_content() for cell in row.locator("th, td").all()]
        for row in page.locator(f"{selector} tbody tr").all()
    ]


def solved(page):
    """Seconds of the solver's plans on the curve, by budget."""
    return [number(row[1]) for row in rows(page, "#curve-table") if not row[1].startswith(("needs", "–"))]


def set_budget(page, mib):
    page.fill("#budget", str(mib))
    page.press("#budget", "Enter")


def between(page, first, last):
    """What of the page lies between two elements, for a picture."""
    top, bottom = page.locator(first).bounding_box(), page.locator(last).bounding_box()
    begun = top["y"] + page.evaluate("window.scrollY")
    return {"x": 0, "y": begun - 16, "width": 1200, "height": bottom["y"] + bottom["height"] - top["y"] + 28}


def number(text):
    return float(re.search(r"[\d.]+", text.replace(",", ""))[0])


@pytest.mark.slow
def test_will_it_fit(page, served, pictures):
    verdict = page.locator("#verdict")
    expect(verdict).to_have_text(re.compile(r"^Fits [\d.]+ MiB: [\d.]+ s per step, within [\d.]+ % of the best plan"))
    title = page.locator("#plan-title")
    # By keyboard: the end of the slider is the largest budget, and as fast as it gets.
    slow = number(verdict.inner_text().split(":")[1])
    page.locator("#slider").focus()
    page.keyboard.press("End")
    expect(verdict).to_contain_text("as at")
    assert number(verdict.inner_text().split(":")[1]) <= slow
    # By mouse, along the curve: towards less memory, never faster.
    roomy = title.inner_text()
    box = page.locator("#curve svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] / 2, steps=5)
    expect(title).not_to_have_text(roomy)  # the plan moves along, before the button is let go
    page.mouse.up()
    expect(verdict).to_contain_text("as at")
    dragged = number(page.input_value("#budget"))
    # A budget between two points of the curve is solved on demand, and stands on the curve afterwards.
    before = solved(page)
    set_budget(page, dragged + 0.3)
    page.click("#solve")
    expect(title).to_contain_text(f"{dragged + 0.3:.1f} MiB")
    expect(verdict).to_contain_text("within")
    after = solved(page)
    assert len(after) == len(before) + 1
    # Every budget that a policy does not fit is crossed, and the cross tells what the table tells.
    needs = [cell for row in rows(page, "#curve-table") for cell in row[1:] if cell.startswith("needs")]
    told = [title.text_content().split(": ")[1] for title in page.locator("#curve svg .misfit title").all()]
    assert sorted(told) == sorted(f"{cell} MiB" for cell in needs)
    assert needs
    page.screenshot(path=pictures / "fit.png", full_page=True, clip=between(page, "#fit", "#timeline-legend"))


@pytest.mark.slow
def test_why_nothing_fits(page, served, pictures):
    smallest = number(rows(page, "#curve-table")[0][0])
    set_budget(page, round(smallest - 1, 1))
    verdict = page.locator("#verdict")
    expect(verdict).to_contain_text("Does not fit")
    expect(verdict).to_contain_text("the smallest budget found to be enough is")
    expect(page.locator("#plan-title")).to_have_text("3. Why nothing fits")
    told = page.locator("#sentences").inner_text()
    assert "smallest" in told
    assert "peak" in told
    expect(page.locator("#feasible")).to_be_hidden()
    expect(page.locator("#run")).to_be_hidden()
    page.locator("#plan").screenshot(path=pictures / "infeasible.png")
    # What it names is enough.
    set_budget(page, number(verdict.inner_text().split("enough is")[1]))
    expect(page.locator("#plan-title")).to_contain_text("The plan: solver")


@pytest.mark.slow
def test_a_later_question_voids_an_earlier_one(page, served):
    """The answer for a budget that was left meanwhile stands on the curve, and takes nobody's place."""
    smallest = number(rows(page, "#curve-table")[0][0])
    held = []

    def hold(route):
        held.append(route)

    page.route("**/v1/plans", hold)
    set_budget(page, round(smallest - 2, 1))
    expect(page.locator("#working")).to_contain_text("planning at")
    set_budget(page, 1000)
    expect(page.locator("#working")).to_be_empty()
    title = page.locator("#plan-title")
    expect(title).to_contain_text("The plan: solver")
    before = len(rows(page, "#curve-table"))
    held[0].continue_()
    expect(page.locator("#curve-table tbody tr")).to_have_count(before + 1)
    page.unroute("**/v1/plans")
    page.wait_for_timeout(300)
    expect(title).to_contain_text("The plan: solver")
    expect(page.locator("#verdict")).to_contain_text("Fits 1,000.0 MiB")


def test_what_is_no_budget_is_refused(page, served):
    problem, kept = page.locator("#problem"), page.input_value("#budget")
    for text, told in (
        ("0", "0 is no budget"),
        ("-5", "-5 is no budget"),
        ("", "nothing is no budget"),
        ("1e300", "1e300 is no"),
    ):
        set_budget(page, text)
        expect(problem).to_contain_text(told)
        assert page.input_value("#budget") == kept
        set_budget(page, float(kept) + 1)
        expect(problem).to_be_hidden()
        set_budget(page, kept)


def test_a_slip_of_the_keyboard_leaves_slider_and_curve_as_they_are(page, served):
    slider = page.locator("#slider")
    bounds = [slider.get_attribute(name) for name in ("min", "max", "step")]
    kept, curve = page.input_value("#budget"), page.locator("#curve svg text").all_text_contents()
    set_budget(page, float(kept) * 1e6)
    expect(page.locator("#verdict")).to_contain_text("as at")
    assert [slider.get_attribute(name) for name in ("min", "max", "step")] == bounds
    assert slider.input_value() == bounds[1]
    # Planned there all the same, it stands in the table, and the curve keeps its scale.
    before = len(rows(page, "#curve-table"))
    page.click("#solve")
    expect(page.locator("#curve-table tbody tr")).to_have_count(before + 1)
    assert page.locator("#curve svg text").all_text_contents() == curve
    set_budget(page, kept)
    expect(page.locator("#verdict")).to_contain_text(f"Fits {float(kept):,.1f} MiB")


def test_the_verdict_is_of_the_budget_and_the_policy_that_are_chosen(browser, page, served):
    """A plan that comes late says nothing of a budget that was left for another; a rule that does not fit speaks for itself."""
    own = browser.new_page()
    own.set_default_timeout(PATIENCE)
    own.goto(page.url)
    expect(own.locator("#curve-legend")).to_contain_text("mebp")
    expect(own.locator("#curve")).not_to_have_attribute("aria-busy", "true")
    expect(own.locator("#plan-title")).to_contain_text("The plan: solver")
    verdict, table = own.locator("#verdict"), rows(own, "#curve-table")
    smallest, opened_at = number(table[0][0]), number(own.input_value("#budget"))
    # A budget whose plan this page has not asked for yet: it opened at one, which may be the largest.
    roomy = next(number(row[0]) for row in reversed(table) if number(row[0]) != opened_at)
    # The solver's plans fit there, and not all rules.
    middle = next(number(row[0]) for row in table if row[1][0].isdigit() and row[2].startswith("needs"))
    late, unsolved = [], []

    def hold(route):
        late.append(route)

    def ignore(route):
        unsolved.append(route)

    set_budget(own, middle)
    expect(own.locator("#plan-title")).to_have_text(f"3. The plan: solver at {middle:,.1f} MiB")
    own.route("**/view", hold)
    own.route("**/v1/plans", ignore)
    with own.expect_request("**/view"):
        set_budget(own, roomy)
    expect(verdict).to_contain_text(f"Fits {roomy:,.1f} MiB")
    set_budget(own, round(smallest - 3, 1))
    expect(verdict).to_contain_text("Does not fit")
    with own.expect_response("**/view"):
        late[0].continue_()
    own.wait_for_timeout(300)
    expect(verdict).to_have_text(
        re.compile(rf"^Does not fit {smallest - 3:,.1f} MiB: the smallest budget found to be enough is")
    )
    assert verdict.get_attribute("class") == "verdict not"
    own.unroute("**/view")
    own.unroute("**/v1/plans")
    # Of a rule it is said that this rule does not fit, and from where on the solver's plans do.
    set_budget(own, middle)
    expect(verdict).to_contain_text(f"Fits {middle:,.1f} MiB")
    own.select_option("#policy", "keep-all")
    expect(verdict).to_have_text(
        re.compile(
            rf"^The rule keep-all does not fit {middle:,.1f} MiB, it needs [\d.,]+ MiB; plans of the solver fit from"
        )
    )
    expect(own.locator("#plan-title")).to_have_text(f"3. Why the rule keep-all does not fit {middle:,.1f} MiB")
    told = own.locator("#plan").inner_text()
    assert "the rule keep-all does not fit" in told
    assert "no plan fits" not in told
    set_budget(own, round(smallest - 3, 1))
    expect(verdict).to_contain_text("nor does any other plan found: the smallest budget found to be enough is")
    own.close()


def test_the_address_brings_back_what_is_looked_at(browser, page, served):
    page.select_option("#policy", "mebp")
    expect(page.locator("#plan-title")).to_contain_text("mebp")
    again = browser.new_page()
    again.set_default_timeout(PATIENCE)
    again.goto(page.url)
    expect(again.locator("#verdict")).to_contain_text(f"Fits {number(page.input_value('#budget')):,.1f} MiB")
    expect(again.locator("#plan-title")).to_contain_text("mebp")
    assert again.input_value("#profile") == page.input_value("#profile")
    assert "uploaded" in again.locator("#profile option:checked").inner_text()
    # Nothing is named any more, so nothing is shown; what was uploaded before that does not take its place.
    held = []

    def hold(route):
        held.append(route)

    again.route("**/v1/profiles/upload", hold)
    with again.expect_request("**/v1/profiles/upload"):
        again.set_input_files("#upload", ROOT / "examples" / "bare-graph.json")
    again.evaluate("location.hash = ''")
    expect(again.locator("#fit")).to_be_hidden()
    expect(again.locator("#start")).to_be_visible()
    known = again.locator("#profile option").count()
    held[0].continue_()
    expect(again.locator("#profile option")).to_have_count(known + 1)
    assert again.input_value("#profile") == ""
    expect(again.locator("#fit")).to_be_hidden()
    # A measurement says why it says nothing, but not in the place of what was chosen meanwhile.
    job = {"id": "job-0123456789abcdef", "kind": "profile", "state": "queued"}
    again.route("**/v1/profiles", lambda route: route.fulfill(json=job))
    again.route("**/events", lambda route: route.abort())
    again.locator("#measure-box > summary").click()
    again.fill("#measure [name=path]", "model")
    again.locator("#measure button").click()
    about, measuring = again.locator("#about"), again.locator("#measuring")
    expect(measuring).to_have_text("measuring: the service does not answer, asked again until it does")
    again.unroute("**/events")
    again.select_option("#profile", page.input_value("#profile"))
    expect(about).to_contain_text("layers of")
    # The job that is asked for again is not known to the service: it has failed, and nothing goes on any more.
    expect(again.locator("#problem")).to_contain_text("there is no job")
    expect(measuring).to_be_empty()
    expect(about).to_contain_text("layers of")
    again.close()
    page.select_option("#policy", "solver")


def test_devices_that_ask(browser, served, pictures):
    """What they are, what was planned for them, and how it went; the plan is a link to it."""
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
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.goto(served.url)
    expect(page.locator("#devices-table tbody tr")).to_have_count(2)
    small, large = rows(page, "#devices-table")
    assert small[:3] == ["watchCortex-A76, 1 core", "4,096.0", "–"]
    assert small[3].endswith("nothing fits 1.0 MiB")
    assert small[4:6] == ["–", "–"]
    assert large[0] == "<b>phone</b>Cortex-A76, 4 cores"
    assert number(large[2]) == pytest.approx(least / (1 << 20), abs=0.06)
    assert large[4].startswith("7.25 (")
    assert large[5] == "measuring: 100.0 (–)training: 299.0 (300.0)"
    page.locator("#devices").screenshot(path=pictures / "devices.png")
    page.locator("#devices-table a").last.click()
    expect(page.locator("#plan-title")).to_contain_text("3. The plan: solver")
    assert number(page.input_value("#budget")) == pytest.approx(least / (1 << 20), abs=0.06)
    page.close()


def test_a_run_that_fails_says_nothing_beside_another(browser, served):
    """Two runs of which the one that was left ends badly, while the other is looked at."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    left, other = (PLAN_JOB | {"id": f"job-{digit * 16}", "kind": "run", "request": {"steps": 3}} for digit in "ab")
    left |= {"state": "running", "result": None}
    failed = left | {"state": "failed", "error": {"code": "run_failed", "message": "the disk is full", "fields": []}}
    figures = {"predicted": 1.0, "measured": 1.0}
    report = {
        "peak_bytes": figures,
        "step_seconds": figures,
        "evaluation": {},
        "enforced_by": "meter",
        "loss": [1.0] * 3,
    }
    held = []

    def hold(route):
        held.append(route)

    page.route("**/v1/jobs?kind=run*", lambda route: route.fulfill(json={"jobs": [left, other]}))
    page.route("**/metrics", lambda route: route.fulfill(json={"budget_bytes": 1 << 30, "steps": []}))
    page.route("**/report", lambda route: route.fulfill(json=report))
    page.route(f"**/v1/jobs/{left['id']}", lambda route: route.fulfill(json=left))
    page.route(f"**/v1/jobs/{other['id']}", lambda route: route.fulfill(json=other))
    page.route("**/events", hold)
    page.goto(served.url)
    with page.expect_request("**/events"):
        page.select_option("#runs", left["id"])
    page.select_option("#runs", other["id"])
    state = page.locator("#run-state")
    expect(state).to_contain_text("done: 3 steps")
    held[0].fulfill(content_type="text/event-stream", body=f"event: job\ndata: {json.dumps(failed)}\n\n")
    page.wait_for_timeout(500)
    expect(page.locator("#problem")).to_be_hidden()
    expect(state).to_contain_text("done: 3 steps")
    page.close()


@pytest.mark.slow
def test_names_of_any_length_and_with_markup_stay_text(browser, served):
    graph = json.loads((ROOT / "examples" / "bare-graph.json").read_text())
    long = {one["name"]: f"<script>{one['name']}</script>{'x' * 120}" for one in graph["operators"]}
    for one in graph["operators"]:
        one["name"], one["inputs"] = long[one["name"]], [long[name] for name in one.get("inputs", [])]
    graph["name"] = "<img src=x onerror=alert(1)>" * 9
    identity = served.http.post("/v1/profiles/upload", json=graph).json()["id"]
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.goto(f"{served.url}/page/#profile={identity}")
    expect(page.locator("#sentences")).to_contain_text("</script>")
    assert page.locator("main img, main script").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200
    page.close()


@pytest.mark.slow
def test_a_small_graph_is_told_in_figures(browser, served):
    """Forty KiB are 0.0391 MiB, not 0.0."""
    operators = [
        {"name": f"op{i}", "seconds": 0.1, "output_bytes": 10 << 10, "inputs": [f"op{i - 1}"] if i else []}
        for i in range(8)
    ]
    identity = served.http.post(
        "/v1/profiles/upload", json={"format": "tightfit-graph", "operators": operators}
    ).json()["id"]
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.goto(f"{served.url}/page/#profile={identity}&budget={40 << 10}")
    verdict = page.locator("#verdict")
    expect(verdict).to_contain_text("Fits 0.0391 MiB")
    assert page.input_value("#budget") == "0.0391"
    expect(page.locator("#curve")).not_to_have_attribute("aria-busy", "true")
    # The curve goes from the smallest budget to what keeps everything.
    budgets = [number(row[0]) for row in rows(page, "#curve-table")]
    assert 0 < budgets[0] < budgets[-1] <= 0.11
    assert budgets == sorted(set(budgets))
    assert "0.0" not in {row[2] for row in rows(page, "#peak")}
    # The chart and its table are in the unit that suits them.
    assert page.locator("#timeline-table caption").text_content() == "KiB by kind"
    assert {row[-1] for row in rows(page, "#timeline-table")} == {"10.0", "20.0"}
    set_budget(page, 0.0009)
    expect(verdict).to_contain_text("Does not fit 0.000977 MiB")
    set_budget(page, number(verdict.inner_text().split("enough is")[1]))
    expect(page.locator("#plan-title")).to_contain_text("The plan: solver")
    page.close()


@pytest.mark.slow
def test_a_service_that_is_gone_is_told_of(browser, tmp_path):
    service = Served(tmp_path / "data").start()
    service.upload(decoder_like(2))
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(service.url)
    page.route("**/view", lambda route: route.abort())
    held = []

    def hold(route):
        held.append(route)

    page.route("**/v1/comparisons", hold)
    page.evaluate(NOTE_CURVING)
    page.select_option("#profile", index=1)
    # The first plan cannot be shown; the curve goes on, and says so until it is there.
    expect(page.locator("#problem")).to_contain_text("the service does not answer")
    page.unroute("**/v1/comparisons")
    held[0].continue_()
    expect(page.locator("body")).to_have_attribute("data-curving", re.compile("the curve"))
    expect(page.locator("#curving")).to_be_empty()
    expect(page.locator("#curve-table tbody tr")).not_to_have_count(1)
    page.unroute("**/view")
    page.click("#solve")
    expect(page.locator("#plan-title")).to_contain_text("The plan: solver")
    # Nothing can be started without a plan that runs here.
    expect(page.locator("#run-form")).to_be_hidden()
    service.kill()
    page.click("#solve")
    expect(page.locator("#problem")).to_contain_text("the service does not answer")
    expect(page.locator("#working")).to_be_empty()
    assert page.is_enabled("#solve")
    page.close()


def test_nothing_hinders_people(page, served, pictures):
    """axe-core finds no fault in light or dark; on a phone nothing is cut off."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        assert [(one["id"], [node["html"][:100] for node in one["nodes"]]) for one in found] == [], scheme
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    # Charts are drawn anew for the width, so that their text stays as large as on a desk.
    expect(page.locator("#curve svg")).to_have_attribute("viewBox", re.compile(r"^0 0 3\d\d "))
    page.screenshot(path=pictures / "phone-dark.png", full_page=True)
    page.emulate_media(color_scheme="light")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    page.click("#theme")
    page.set_viewport_size({"width": 1200, "height": 900})
    # Every chart says what it shows, and a table stands beside it.
    for chart in ("curve", "timeline", "layers"):
        label = page.locator(f"#{chart} svg").get_attribute("aria-label")
        assert label, chart
        assert page.locator(f"#{chart}-table table").count() == 1


@pytest.mark.slow
def test_a_token_is_asked_for(browser, tmp_path):
    service = Served(tmp_path / "data", token="a-secret-of-some-length").start()
    try:
        service.upload(decoder_like(2))
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(service.url)
        expect(page.locator("#token")).to_be_focused()
        page.keyboard.type("something-else-of-some-length")
        page.keyboard.press("Enter")
        expect(page.locator("#problem")).to_contain_text("this token is not the service's")
        expect(page.locator("#token")).to_be_focused()
        page.keyboard.type("a-secret-of-some-length")
        page.keyboard.press("Enter")
        expect(page.locator("#token-form")).to_be_hidden()
        expect(page.locator("#profile option")).to_have_count(2)
        page.close()
    finally:
        service.stop()


@pytest.mark.slow
def test_run(browser, measuring, pictures):
    """Measure a model on the service's machine, plan it, train, and take the adapter: all on the page."""
    page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
    page.set_default_timeout(PATIENCE)
    page.goto(measuring.url)
    page.locator("#measure-box > summary").click()
    assert page.locator("#start").is_visible()
    for name, value in (("path", "model"), ("seq", str(SEQ)), ("batch", "2"), ("lora_rank", "4")):
        page.fill(f"#measure [name={name}]", value)
    page.fill("#measure [name=lora_targets]", "q_proj,down_proj")
    page.select_option("#measure [name=base]", "8bit")
    # What the form asks for besides is folded away; what is wrong with a field is told beside it.
    page.locator("#measure .more > summary").click()
    page.fill("#measure [name=rank_pattern]", "q_proj=2")
    page.fill("#measure [name=lora_dropout]", "0.1")
    page.fill("#measure [name=lora_layers]", "none")
    page.locator("#measure button").click()
    wrong = page.locator("#measure .wrong")
    expect(wrong).to_contain_text("String should match pattern")
    assert page.locator("#measure [name=lora_layers]").get_attribute("aria-errormessage") == wrong.get_attribute("id")
    page.fill("#measure [name=lora_layers]", "0")
    page.locator("#measure button").click()
    expect(wrong).to_have_count(0)
    expect(page.locator("#run")).to_be_visible()
    identity = httpx.get(f"{measuring.url}/v1/profiles").json()["profiles"][0]["id"]
    model = httpx.get(f"{measuring.url}/v1/profiles/{identity}/file").json()["model"]
    assert model["lora"]["target_modules"] == ["down_proj", "q_proj"]
    assert model["base"] == "8bit"
    assert (model["lora"]["rank_pattern"], model["lora"]["lora_dropout"]) == ({"q_proj": 2}, 0.1)
    # Plans with another optimizer: the curve is drawn anew, and the address brings them back.
    page.locator("#step-form summary").click()
    page.select_option("#step-form [name=optimizer]", "sgd")
    page.fill("#step-form [name=max_grad_norm]", "1")
    page.locator("#step-form button").click()
    expect(page.locator("#sentences")).to_contain_text("updates by sgd")
    assert "optimizer=sgd&max_grad_norm=1" in page.url
    expect(page.locator("#curve")).not_to_have_attribute("aria-busy", "true")
    page.locator("#slider").focus()
    page.keyboard.press("End")
    page.fill("#run-form [name=data]", "data.jsonl")
    page.fill("#run-form [name=steps]", "12")
    page.fill("#run-form [name=eval_data]", "data.jsonl")
    page.locator("#run-form .more > summary").click()
    page.fill("#run-form [name=eval_every]", "6")
    page.check("#run-form [name=keep_best]")
    page.check("#run-form [name=packing]")
    page.fill("#run-form [name=min_lr_ratio]", "0.5")
    page.locator("#run-form button").click()
    expect(page.locator("#run-form label:has([name=min_lr_ratio])")).to_contain_text("the constant schedule does not")
    page.select_option("#run-form [name=schedule]", "linear")
    page.locator("#run-form button").click()
    expect(page.locator("#run-state")).to_have_text(re.compile(r"done: 12 steps, peak [\d.]+ of [\d.]+ MiB"))
    steps = rows(page, "#steps-table")
    assert [int(row[0]) for row in steps] == list(range(1, 13))
    assert all(re.fullmatch(r"\d+ %", row[4]) for row in steps)
    assert [row[0] for row in rows(page, "#evaluations")] == ["0", "6", "12"]
    job = httpx.get(f"{measuring.url}/v1/jobs?kind=run&limit=1").json()["jobs"][0]["request"]
    assert (job["schedule"], job["keep_best"], job["packing"]) == ("linear", True, True)
    report = {row[0]: row[1:] for row in rows(page, "#report")}
    assert any(re.fullmatch(r"tokens/s \(rows \d+ % padding\)", name) for name in report)
    training = number(report["– training, MiB"][1])
    assert training == pytest.approx(max(number(row[-1]) for row in steps), abs=1)
    whole = number(report["peak of its processes, MiB"][1])
    assert whole == pytest.approx(training + number(report["– supervisor, MiB"][1]), abs=0.2)
    assert page.locator("#memory svg .cap").count() == 1
    with page.expect_download() as caught:
        page.click("#adapter-button")
    import tarfile

    with tarfile.open(caught.value.path()) as archive:
        assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= set(archive.getnames())
        config = json.load(archive.extractfile("adapter/adapter_config.json"))
    assert config["r"] == 4
    page.locator("#run").screenshot(path=pictures / "run.png")
    # What is refused is told, and not beside the next run.
    page.fill("#run-form [name=data]", "none.jsonl")
    page.locator("#run-form button").click()
    expect(page.locator("#run-form .wrong")).to_contain_text("'none.jsonl' is no file or folder")
    page.fill("#run-form [name=data]", "data.jsonl")
    for name in ("eval_data", "eval_every"):
        page.fill(f"#run-form [name={name}]", "")
    page.uncheck("#run-form [name=keep_best]")
    # Cancelled, a run saves and ends; whoever comes back to the page finds it.
    page.fill("#run-form [name=steps]", "1000000")
    page.locator("#run-form button").click()
    expect(page.locator("#run-state")).to_have_text(re.compile(r"^step \d+ of 1000000: loss"))
    expect(page.locator("#problem")).to_be_hidden()
    page.click("#cancel")
    expect(page.locator("#run-state")).to_contain_text("was cancelled")
    # It goes on from where it has saved.
    saved = len(rows(page, "#steps-table"))
    refusal = {"error": {"code": "busy", "message": "1000 jobs are waiting already", "fields": []}}
    page.route("**/resume", lambda route: route.fulfill(status=429, json=refusal))
    page.click("#resume")
    expect(page.locator("#run-state")).to_have_text("1000 jobs are waiting already")
    page.unroute("**/resume")
    page.click("#resume")
    expect(page.locator("#run-state")).to_have_text(re.compile(r"^step \d+ of 1000000: loss"))
    # The first step told may be the last of those before the cancel; then others follow it.
    reached = int(re.match(r"step (\d+)", page.locator("#run-state").inner_text())[1])
    assert reached >= saved > 0
    shown = "document.querySelector('#run-state').innerText.match(/^step (\\d+) of 1000000: loss/)"
    page.wait_for_function(f"saved => Number(({shown} || [])[1]) > saved", arg=saved)
    page.click("#cancel")
    expect(page.locator("#run-state")).to_contain_text("was cancelled")
    page.reload()
    page.select_option("#runs", index=2)
    expect(page.locator("#run-state")).to_contain_text("done: 12 steps")
    assert len(rows(page, "#steps-table")) == 12
    page.close()
