"""One model's place in a real browser: will it fit, why not and what helps, by mouse, by keyboard and on a phone."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
from places import ROOT
from places_of_the_page import at, nothing_hinders, number, rows, serving, tab
from playwright.sync_api import expect
from synthetic import decoder_like


@contextlib.contextmanager
def opened(browser, served, decoder, query="", **options):
    """The model's place with its curve refined."""
    with tab(browser, at(served, f"models/{decoder}{query}"), **options) as page:
        settled(page)
        yield page


def settled(page):
    expect(page.locator("#curve svg")).to_be_visible()
    expect(page.locator("#curve")).not_to_have_attribute("aria-busy", "true")
    # From the sketch on, each search that is under way has its line here.
    expect(page.locator("#curving")).to_be_empty()


@pytest.fixture(scope="module")
def page(browser, served, decoder):
    with opened(browser, served, decoder) as page:
        page.locator("details:has(#curve-table) > summary").click()
        yield page


def table(page):
    return rows(page, "#curve-table")


def solved(page):
    """Seconds of the solver's plans on the curve, by budget."""
    return [number(row[1]) for row in table(page) if not row[1].startswith(("needs", "–"))]


def largest(page):
    """The largest budget of the curve, in MiB; a slip of the keyboard is none."""
    return max(mib for mib in (number(row[0]) for row in table(page)) if mib < 500)


def set_budget(page, mib):
    page.fill("#budget", str(mib))
    page.press("#budget", "Enter")


def hold(page, pattern):
    """Requests to `pattern` that are kept waiting, as they come."""
    held = []

    def keep(route):
        held.append(route)

    page.route(pattern, keep)
    return held


@pytest.mark.slow
def test_will_it_fit(page, pictures):
    verdict = page.locator("#verdict")
    expect(verdict).to_have_text(re.compile(r"^Yes, it fits [\d.,]+ MiB: [\d.]+ s a step\. "))
    assert re.search(r"Within [\d.]+ % of the best plan it can choose from|Proven the best", verdict.inner_text())
    slow = number(verdict.inner_text().split(":")[1])
    # By keyboard: the end of the slider is the largest budget, and as fast as it gets.
    page.locator("#slider").focus()
    page.keyboard.press("End")
    expect(verdict).to_contain_text("as at")
    assert number(verdict.inner_text().split(":")[1]) <= slow
    # By mouse, along the curve: towards less memory, never faster; the verdict moves along before the button is let go.
    roomy = verdict.inner_text()
    box = page.locator("#curve svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.45, box["y"] + box["height"] / 2, steps=5)
    dragged = number(page.input_value("#budget"))
    assert verdict.inner_text() != roomy
    assert f"fits {dragged:,.1f} MiB" in verdict.inner_text()
    page.mouse.up()
    expect(verdict).to_contain_text("as at")
    # A budget between two points of the curve is planned on demand, and stands among them afterwards.
    before = solved(page)
    set_budget(page, dragged + 0.3)
    page.click("#solve")
    expect(verdict).to_have_text(re.compile(rf"^Yes, it fits {dragged + 0.3:,.1f} MiB: [\d.]+ s a step"))
    assert len(solved(page)) == len(before) + 1
    # Every budget that a policy does not fit is crossed below the axis, and the cross tells what the table tells.
    needs = [cell for row in table(page) for cell in row[1:] if cell.startswith("needs")]
    told = [title.text_content().split(": ")[1] for title in page.locator("#curve svg .misfit title").all()]
    assert sorted(told) == sorted(f"{cell} MiB" for cell in needs)
    assert needs
    axis = float(page.locator("#curve svg .axis").get_attribute("y1"))
    marks = [path.get_attribute("d") for path in page.locator("#curve svg .misfit").all()]
    assert all(float(re.match(r"M[\d.]+ ([\d.]+)", mark)[1]) > axis for mark in marks)
    points = [float(dot.get_attribute("cy")) for dot in page.locator("#curve svg .dot-mark:not(.off)").all()]
    assert max(points) < axis
    # The y axis begins near the fastest step: what the search found is not squeezed by rules that are far slower.
    assert max(points) - min(points) > 0.4 * (axis - 26)
    page.screenshot(path=pictures / "fit.png", full_page=True)


def test_from_here_to_the_plan_and_to_others(page, served, decoder):
    set_budget(page, largest(page))
    plan = page.locator("#open-plan").get_attribute("href")
    identity = plan.removeprefix("#/plans/")
    assert served.http.get(f"/v1/plans/{identity}").json()["profile"] == decoder
    # An uploaded profile is not run here, and that is said.
    expect(page.locator("#next")).to_contain_text(
        re.compile("to fine-tune here, measure the model|measured on this machine")
    )
    assert page.locator("#start-run").count() == 0
    expect(page.locator("#compare")).to_be_hidden()
    for box in page.locator("#curve-table input").all()[:2]:
        box.check()
    expect(page.locator("#compare")).to_have_text("Compare 2 plans")
    compared = page.locator("#compare").get_attribute("href")
    assert re.fullmatch(r"#/compare\?plans=[0-9a-f]{64}%2C[0-9a-f]{64}", compared)
    for box in page.locator("#curve-table input").all()[:2]:
        box.uncheck()
    expect(page.locator("#compare")).to_be_hidden()


def test_rules_are_told_in_words_and_can_be_left_out(page):
    listed = rows(page, "#rules")
    assert [row[0] for row in listed][:2] == ["Keep everything", "Redo each layer"]
    keep = next(row for row in listed if row[0] == "Keep everything")
    assert "all that the backward pass reads stays in memory" in keep[1]
    assert re.fullmatch(r"needs [\d.,]+ MiB, [\d.]+ s a step", keep[2])
    assert "–" not in page.locator("#policy").inner_text()
    drawn = page.locator("#curve svg g[data-policy]")
    before = drawn.count()
    page.locator("#rules").get_by_label("Draw Redo each layer").uncheck()
    expect(drawn).to_have_count(before - 1)
    page.locator("#rules").get_by_label("Draw Redo each layer").check()
    expect(drawn).to_have_count(before)


def test_the_smallest_budget_is_told_with_what_is_known_of_it(page):
    smallest = page.locator("#smallest")
    expect(smallest).to_have_text(re.compile(r"^The smallest budget is [\d.,]+ MiB, (proven|the best found so far)"))
    line = page.locator("#curve svg .cap-label").text_content()
    assert line.startswith("nothing fits below" if "proven" in smallest.inner_text() else "no plan found below")
    assert f"{number(smallest.inner_text()):,.1f} MiB" in line


@pytest.mark.slow
def test_why_nothing_fits_and_what_helps(page, pictures):
    smallest = number(page.locator("#smallest").inner_text())
    tight = round(smallest * 0.6, 1)  # a busy machine may find a smaller plan than it knew of, but none as small
    set_budget(page, tight)
    verdict = page.locator("#verdict")
    expect(verdict).to_have_text(re.compile(rf"^Does not fit {tight:,.1f} MiB: the smallest budget"))
    assert "not" in verdict.get_attribute("class")
    help_ = page.locator("#help")
    expect(help_).to_contain_text("Why not, and what would help")
    expect(help_).to_contain_text("The smallest plan is fullest at")
    # What fills the memory is listed, and adds up to the smallest budget that is known.
    *parts, (_, whole, _) = rows(page, "#help")
    assert "activations" in {name for name, *_ in parts}
    assert sum(number(figure) for _, figure, _ in parts) == pytest.approx(number(whole), abs=0.06 * len(parts))
    assert number(whole) == pytest.approx(number(page.locator("#smallest").inner_text()), rel=0.1)
    expect(page.locator("#never")).to_have_text(
        "Nothing is known that would make this step smaller. It takes more memory, or a smaller model."
    )
    expect(page.locator("#next")).to_be_empty()
    page.screenshot(path=pictures / "nothing-fits.png", full_page=True)
    # What it names is enough.
    page.click("#use-smallest")
    expect(verdict).to_contain_text("fits")
    expect(help_).to_be_empty()


@pytest.mark.slow
def test_what_more_memory_is_worth(page):
    set_budget(page, round(largest(page) / 2, 1))
    page.click("#solve")
    worth = page.locator("#worth")
    expect(worth).to_contain_text("What memory is worth here: ")
    expect(worth).to_contain_text("50 MiB more")
    before = len(table(page))
    worth.get_by_role("button", name="Plan 50 MiB more").click()
    expect(page.locator("#curve-table tbody tr")).to_have_count(before + 1)
    expect(worth.get_by_role("button")).to_have_count(0)


def test_fit_this_machine_is_one_click(page, served):
    (own,) = [one for one in served.http.get("/v1/devices").json()["devices"] if one["local"]]
    assert own["spare_bytes"] > 0
    assert "are available" in own["spare_why"]
    fit = page.locator("#fit-machine")
    expect(fit).to_have_text(re.compile(r"Fit this machine \([\d.]+ [GM]iB free\)"))
    fit.click()
    page.wait_for_function(
        "least => Number(document.getElementById('budget').value) * 1048576 > least", arg=own["spare_bytes"] / 2
    )
    expect(page.locator("#verdict")).to_contain_text("fits")
    assert number(page.input_value("#budget")) * (1 << 20) == pytest.approx(own["spare_bytes"], rel=0.5)


@pytest.mark.slow
def test_a_later_question_voids_an_earlier_one(page):
    """The answer for a budget that was left meanwhile stands in the table, and takes nobody's place."""
    smallest = number(page.locator("#smallest").inner_text())
    held = hold(page, "**/v1/plans")
    set_budget(page, round(smallest - 2, 1))
    expect(page.locator("#working")).to_contain_text("Planning at")
    set_budget(page, 1000)
    expect(page.locator("#working")).to_be_empty()
    verdict = page.locator("#verdict")
    expect(verdict).to_contain_text("fits 1,000.0 MiB")
    before = len(table(page))
    held[0].continue_()
    expect(page.locator("#curve-table tbody tr")).to_have_count(before + 1)
    page.unroute("**/v1/plans")
    page.wait_for_timeout(300)
    expect(verdict).to_contain_text("fits 1,000.0 MiB")
    assert page.input_value("#budget") == "1000.0"


@pytest.mark.slow
def test_what_is_typed_while_the_curve_is_searched_for_stays(browser, served):
    """Nothing that is found meanwhile writes over it, and it is what is planned."""
    identity = served.upload(decoder_like(2, tokens=1000))
    with tab(browser, at(served, "models")) as page:
        held = hold(page, "**/v1/comparisons")
        page.goto(at(served, f"models/{identity}"))
        expect(page.locator("#curving")).to_contain_text("Looking for the smallest")
        page.locator("#budget").press_sequentially("61.5")
        for route in held:
            route.continue_()
        page.unroute("**/v1/comparisons")
        expect(page.locator("#curve svg")).to_be_visible()
        expect(page.locator("#curving")).to_contain_text("Refining the curve")
        assert page.input_value("#budget") == "61.5"
        page.click("#solve")
        expect(page.locator("#verdict")).to_have_text(re.compile(r"^Yes, it fits 61\.5 MiB: [\d.]+ s a step\. "))
        assert page.input_value("#budget") == "61.5"


def test_what_is_no_budget_is_refused_beside_the_field(page):
    said, kept = page.locator("#no-budget"), page.input_value("#budget")
    for text, told in (
        ("0", "Write a budget in MiB, such as 300: “0” is none."),
        ("-5", "“-5” is none"),
        ("", "Write a budget in MiB, such as 300."),
        ("much", "“much” is none"),
        ("1e300", "more than any machine has"),
    ):
        set_budget(page, text)
        expect(said).to_contain_text(told)
        expect(page.locator("#budget")).to_have_attribute("aria-invalid", "true")
        assert page.input_value("#budget") == kept
        # What is entered next, even the budget that stood there, takes the complaint away.
        set_budget(page, kept)
        expect(said).to_be_empty()
        expect(page.locator("#budget")).not_to_have_attribute("aria-invalid", "true")
    set_budget(page, "300,5")  # as half of the world writes it
    assert page.input_value("#budget") == "300.5"
    set_budget(page, "1,000")
    assert page.input_value("#budget") == "1000.0"
    set_budget(page, 1e9)
    expect(page.locator("#beyond")).to_have_text(re.compile(r"More than the [\d.]+ GiB that this machine has"))
    set_budget(page, kept)
    expect(page.locator("#beyond")).to_be_empty()


@pytest.mark.slow
def test_passing_over_budgets_asks_for_no_plan(page, served, decoder):
    """Only what somebody enters, asks for by a button or drags to does, and that where something may fit."""

    def count():
        return len(served.http.get(f"/v1/plans?profile={decoder}&asked=true&limit=500").json()["items"])

    before = count()
    page.locator("#slider").focus()
    page.keyboard.press("Home")
    expect(page.locator("#verdict")).to_contain_text("Does not fit")
    box = page.locator("#slider").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 9, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    expect(page.locator("#verdict")).to_contain_text("Does not fit")
    page.wait_for_timeout(500)
    expect(page.locator("#working")).to_be_empty()
    assert count() == before
    page.locator("#slider").press("Enter")
    expect(page.locator("#curve-table")).to_contain_text("needs")
    expect(page.locator("#working")).to_be_empty()
    page.wait_for_timeout(300)
    assert count() == before + 1
    # What stands below says whose figures they are.
    page.keyboard.press("End")
    expect(page.locator("#next h2")).to_have_text(re.compile(r"From here: the plan for [\d.,]+ MiB, which fits too"))


def test_what_came_of_a_change_is_told(browser, served, decoder):
    tried = "a+LoRA+rank+of+4+instead+of+8"
    with opened(browser, served, decoder, f"?budget={1 << 20}&tried={tried}&was={64 << 20}") as page:
        expect(page.locator("#trial")).to_have_text(
            re.compile(
                r"^Tried for 1\.0\d* MiB: a LoRA rank of 4 instead of 8\. The smallest budget was 64\.0 MiB and is [\d.]+ MiB.*: [\d.]+ MiB are missing\.$"
            )
        )


def test_a_slip_of_the_keyboard_leaves_slider_and_curve_as_they_are(page):
    slider = page.locator("#slider")
    set_budget(page, largest(page))
    kept, curve = page.input_value("#budget"), page.locator("#curve svg text").all_text_contents()
    place = slider.input_value()
    set_budget(page, float(kept) * 1e6)
    expect(page.locator("#verdict")).to_contain_text("as at")
    assert slider.input_value() == slider.get_attribute("max")
    # Planned there all the same, it stands in the table, and the curve keeps its scale.
    before = len(table(page))
    page.click("#solve")
    expect(page.locator("#curve-table tbody tr")).to_have_count(before + 1)
    assert page.locator("#curve svg text").all_text_contents() == curve
    set_budget(page, kept)
    expect(page.locator("#verdict")).to_contain_text(f"fits {float(kept):,.1f} MiB")
    assert slider.input_value() == place


@pytest.mark.slow
def test_the_verdict_is_of_the_budget_and_the_policy_that_are_chosen(page):
    """A rule that does not fit speaks for itself; what is not known of a budget is not said of it."""
    verdict, listed = page.locator("#verdict"), table(page)
    smallest = number(page.locator("#smallest").inner_text())
    # The solver's plans fit there, and not all rules.
    middle = next(number(row[0]) for row in listed if row[1][0].isdigit() and row[2].startswith("needs"))
    set_budget(page, middle)
    expect(verdict).to_contain_text(f"fits {middle:,.1f} MiB")
    unsolved = hold(page, "**/v1/plans")
    set_budget(page, round(smallest - 3, 1))
    expect(verdict).to_have_text(re.compile(rf"^Does not fit {smallest - 3:,.1f} MiB: the smallest budget"))
    set_budget(page, middle)
    expect(verdict).to_contain_text(f"fits {middle:,.1f} MiB")
    assert len(unsolved) == 1
    page.unroute("**/v1/plans")
    page.select_option("#policy", "keep-all")
    expect(verdict).to_have_text(
        re.compile(
            rf"^“Keep everything” does not fit {middle:,.1f} MiB, it needs [\d.,]+ MiB; other plans fit from [\d.,]+ MiB on"
        )
    )
    set_budget(page, round(smallest - 3, 1))
    expect(verdict).to_contain_text("nor does any other plan found: the smallest budget found to be enough is")
    page.select_option("#policy", "solver")


@pytest.mark.slow
def test_the_address_brings_back_what_is_looked_at(browser, page, served, decoder):
    set_budget(page, largest(page))
    page.select_option("#policy", "mebp")
    page.click("#solve")
    expect(page.locator("#verdict")).to_contain_text("by the rule “Stream the weights”")
    assert f"#/models/{decoder}?budget=" in page.url
    assert "policy=mebp" in page.url
    jobs = len(served.http.get("/v1/jobs?limit=1000").json()["items"])
    with opened(browser, served, decoder, "?" + page.url.partition("?")[2]) as again:
        expect(again.locator("#verdict")).to_have_text(page.locator("#verdict").inner_text())
        assert again.input_value("#policy") == "mebp"
        assert again.input_value("#budget") == page.input_value("#budget")
        again.locator("details:has(#curve-table) > summary").click()
        assert table(again) == table(page)
        # What was searched for is found again: nothing is searched for a second time.
        assert len(served.http.get("/v1/jobs?limit=1000").json()["items"]) == jobs
    page.select_option("#policy", "solver")


@pytest.mark.slow
def test_another_optimizer_makes_another_curve(browser, served, decoder):
    with opened(browser, served, decoder) as page:
        page.locator("#step-form summary").click()
        page.fill("#step-form [name=max_grad_norm]", "1")
        page.select_option("#step-form [name=optimizer]", "sgd")
        page.locator("#step-form button").click()
        expect(page.locator("#curve")).to_have_attribute("aria-busy", "true")
        settled(page)
        assert "optimizer=sgd&max_grad_norm=1" in page.url
        page.reload()
        settled(page)
        plan = page.locator("#open-plan").get_attribute("href").removeprefix("#/plans/")
        assert served.http.get(f"/v1/plans/{plan}").json()["summary"]["optimizer"] == "sgd"


@pytest.mark.slow
def test_a_curve_goes_on_while_nobody_looks(browser, served):
    """Left while its search is under way, it is found again, and nothing is asked for twice."""
    identity = served.upload(decoder_like(3))
    with tab(browser, at(served, f"models/{identity}")) as page:
        expect(page.locator("#curving")).to_contain_text("Looking for the smallest and the largest budget")
        page.click("#places [data-place=models]")
        expect(page.locator("h1")).to_have_text("Models")
        page.go_back()
        settled(page)
        # What is left behind complains nowhere.
        expect(page.locator("#problem")).to_be_hidden()
    jobs = [job["request"] for job in served.http.get("/v1/jobs?limit=1000").json()["items"]]
    of_it = [json.dumps(one, sort_keys=True) for one in jobs if one.get("profile") == identity]
    assert len(of_it) == len(set(of_it))


@pytest.mark.slow
def test_names_of_any_length_and_with_markup_stay_text(browser, served):
    graph = json.loads((ROOT / "examples" / "bare-graph.json").read_text())
    long = {one["name"]: f"<script>{one['name']}</script>{'x' * 120}" for one in graph["operators"]}
    for one in graph["operators"]:
        one["name"], one["inputs"] = long[one["name"]], [long[name] for name in one.get("inputs", [])]
    graph["name"] = "<img src=x onerror=alert(1)>" * 9
    identity = served.http.post("/v1/uploads/profile", json=graph).json()["id"]
    with opened(browser, served, identity, viewport={"width": 1200, "height": 900}) as page:
        set_budget(page, round(number(page.locator("#smallest").inner_text()) * 0.9, 1))
        expect(page.locator("#help")).to_contain_text("<script>")
        assert page.locator("main img, main script").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 1200


@pytest.mark.slow
def test_a_small_graph_is_told_in_figures(browser, served):
    """Forty KiB are 0.0391 MiB, not 0.0."""
    operators = [
        {"name": f"op{i}", "seconds": 0.1, "output_bytes": 10 << 10, "inputs": [f"op{i - 1}"] if i else []}
        for i in range(8)
    ]
    graph = {"format": "tightfit-graph", "operators": operators}
    identity = served.http.post("/v1/uploads/profile", json=graph).json()["id"]
    with opened(browser, served, identity, f"?budget={40 << 10}") as page:
        verdict = page.locator("#verdict")
        expect(verdict).to_contain_text("fits 0.0391 MiB")
        assert page.input_value("#budget") == "0.0391"
        # The curve goes from the smallest budget to what keeps everything.
        page.locator("details:has(#curve-table) > summary").click()
        budgets = [number(row[0]) for row in table(page)]
        assert 0 < budgets[0] < budgets[-1] <= 0.11
        assert budgets == sorted(set(budgets))
        set_budget(page, 0.0009)
        expect(verdict).to_contain_text("Does not fit 0.000977 MiB")
        set_budget(page, number(page.locator("#smallest").inner_text()))
        expect(verdict).to_contain_text("fits")


@pytest.mark.slow
def test_a_service_that_is_gone_is_told_of(browser, tmp_path):
    with serving(tmp_path) as service:
        identity = service.upload(decoder_like(2))
        with opened(browser, service, identity, expected=["ERR_"]) as page:
            page.locator("details:has(#curve-table) > summary").click()
            set_budget(page, largest(page) - 0.7)
            service.kill()
            page.click("#solve")
            expect(page.locator("#problem")).to_contain_text("the service does not answer")
            expect(page.locator("#working")).to_be_empty()
            assert page.is_enabled("#solve")
            # What is known already is still told.
            expect(page.locator("#verdict")).to_contain_text("fits")
        service.start()
        with opened(browser, service, identity) as page:
            expect(page.locator("#verdict")).to_contain_text("fits")


@pytest.mark.slow
def test_nothing_hinders_people(page, pictures):
    set_budget(page, table(page)[len(table(page)) // 2][0].replace(",", ""))
    nothing_hinders(page, pictures, "model")
    # Charts are drawn anew for the width, so that their text stays as large as on a desk.
    page.set_viewport_size({"width": 390, "height": 844})
    expect(page.locator("#curve svg")).to_have_attribute("viewBox", re.compile(r"^0 0 3\d\d "))
    page.set_viewport_size({"width": 1400, "height": 900})
    assert page.locator("#curve svg").get_attribute("aria-label")
    assert page.locator("#curve-table table").count() == 1
