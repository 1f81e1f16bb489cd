"""The places of plans: the list, and one plan with its step to move in."""

from __future__ import annotations

import re

import pytest
from layered_graph import layered
from places_of_the_page import at, nothing_hinders, number, rows, tab
from playwright.sync_api import expect
from synthetic import decoder_like

from tightfit.planner.plan import plan as solve
from tightfit.profiles.graph_input import graph_profile


def planned(served, profile, memory, policy):
    """The id of a plan that the service makes."""
    asked = served.http.post("/v1/plans", json={"profile": profile, "memory": memory, "policy": policy}).json()
    return served.wait(asked)["result"]["plan"]


@pytest.fixture(scope="module")
def peak():
    """Bytes that the rule mebp needs."""
    return solve(decoder_like(2), 1 << 40, policy="mebp").peak_bytes


@pytest.fixture(scope="module")
def plan(served, decoder, peak):
    """By a rule, which is planned at once: it reads weights, and makes activations again."""
    return planned(served, decoder, int(peak * 1.02), "mebp")


@pytest.fixture(scope="module")
def misfit(served, decoder, peak):
    return planned(served, decoder, int(peak * 0.5), "mebp")


@pytest.fixture
def page(browser, served, plan):
    with tab(browser, at(served, f"plans/{plan}")) as opened:
        expect(opened.locator(".step-frame")).to_be_visible()
        yield opened


@pytest.mark.slow
def test_what_it_does_is_told_first(page, served, plan):
    sentences = page.locator(".plain-words li").all_inner_texts()
    assert sentences[0].startswith("One step takes ")
    assert any(sentence.startswith("Frozen weights: ") for sentence in sentences)
    assert sentences[-1].startswith("What little memory costs of a step by the model: ")
    assert not re.search(r"--|=True|tightfit ", page.locator("main").inner_text())
    # A word that needs it is explained where it stands.
    page.get_by_role("button", name="computed again").hover()
    word, meaning = page.get_by_role("button", name="computed again"), page.get_by_text("the same numbers, bit for bit")
    expect(meaning).to_be_visible()
    page.keyboard.press("Escape")
    expect(meaning).to_be_hidden()
    # A click leaves it open until the next one, wherever the pointer goes.
    page.mouse.move(0, 0)
    word.click()
    page.mouse.move(0, 0)
    page.wait_for_timeout(100)
    expect(meaning).to_be_visible()
    word.click()
    page.mouse.move(0, 0)
    expect(meaning).to_be_hidden()
    word.click()
    page.locator("h1").click()
    expect(meaning).to_be_hidden()
    # What has more figures is folded, and names no option either.
    own = page.locator("details", has_text="With more figures")
    expect(own.locator("li").first).to_be_hidden()
    own.locator("summary").click()
    assert own.locator("li").count() > 2
    assert not re.search(r"--\w|what_if", own.inner_text())
    view = served.http.get(f"/v1/plans/{plan}/view").json()
    assert view["gist"] == [re.sub(r"\s+", " ", sentence) for sentence in sentences]


def test_the_peaks_parts_add_up_and_layers_and_channels_are_listed(page):
    fills = page.locator("section", has_text="What fills the memory")
    sizes = [
        number(row[2]) * {"KiB": 1 / 1024, "MiB": 1}[row[2].split()[1]]
        for row in rows(page, "section:has(> h2:text-is('What fills the memory')) > .scroll")
    ]
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=0.2)
    assert fills.locator("caption").first.inner_text().startswith("At the fullest moment, instruction ")
    busy = {row[0]: number(row[2]) for row in rows(page, "section:has(> h2:text-is('Who is busy'))")}
    assert set(busy) == {"cores compute", "read", "write", "cores wait"}
    assert 0 < busy["cores compute"] <= 100.5
    layers = page.locator("section", has_text="The layers")
    layers.locator("summary").click()
    assert layers.locator("tbody th").all_inner_texts() == ["stem", "layer0", "layer1", "head"]


def test_a_layer_and_a_band_tell_their_tensors_and_why(page):
    frame, detail = page.locator(".step-frame"), page.locator(".step-detail")
    box = frame.bounding_box()
    # The lane of layers lies under the memory; the first layer with a name is near the left.
    frame.click(position={"x": 62 + (box["width"] - 76) * 0.1, "y": 24 + 250 + 18})
    expect(detail.locator("h3")).to_have_text(re.compile(r"^Layer (stem|layer0|layer1)$"))
    told = detail.inner_text()
    assert "read at each use" in told or "made again" in told
    assert re.search(r"is read from disk for each use and given up after it: [\d.]+ (µ)?s of the channel", told)
    assert re.search(r"is given up and made again when it is needed: [\d.]+ (µ)?s of the cores per step", told)
    assert "% of the step" in told
    page.get_by_role("button", name="Fullest moment").click()
    expect(detail.locator("h3")).to_contain_text("Instruction ")


def test_the_table_has_about_forty_moments(page):
    numbers = page.locator(".step details")
    numbers.locator("summary").click()
    found = rows(page, ".step details")
    assert 20 < len(found) <= 41
    assert sum("(fullest)" in row[0] for row in found) == 1
    largest = max(number(row[-1]) for row in found)
    assert number(next(row[-1] for row in found if "(fullest)" in row[0])) == pytest.approx(largest, rel=0.2)


def test_it_is_named_noted_and_found_again(browser, page, served, plan):
    page.get_by_label("Change: name of the plan").click()
    page.keyboard.type("for the phone")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_contain_text("for the phone")
    page.locator("textarea.note").fill("asked by Ada")
    page.locator("textarea.note").blur()
    expect(page.get_by_text("note saved")).to_be_attached()
    page.reload()
    expect(page.locator("h1")).to_contain_text("for the phone")
    expect(page.locator("textarea.note")).to_have_value("asked by Ada")
    page.get_by_role("link", name="Plans", exact=True).click()
    page.get_by_label("Search plans").fill("for the phone")
    expect(page.locator(".listing tbody tr")).to_have_count(1)
    expect(page.locator(".listing tbody")).to_contain_text("asked by Ada")
    page.locator(".listing tbody a").click()
    expect(page.locator("h1")).to_contain_text("for the phone")
    served.http.patch(f"/v1/plans/{plan}", json={"title": None, "note": None})


def test_why_it_does_not_fit(browser, served, misfit):
    with tab(browser, at(served, f"plans/{misfit}")) as page:
        expect(page.locator("h2").first).to_have_text("Why it does not fit")
        told = page.locator(".plain-words").inner_text()
        assert "does not fit" in told
        assert "Its smallest feasible budget is" in told
        expect(page.locator(".step-frame")).to_have_count(0)
        page.get_by_role("button", name="Choose another budget").click()
        expect(page).to_have_url(re.compile(r"#/models/\w+\?budget=\d+"))


@pytest.mark.slow
def test_the_list_sorts_compares_and_deletes(browser, served, decoder, plan, misfit, peak):
    spare = planned(served, decoder, int(peak * 3), "mebp")
    with tab(browser, at(served, "plans")) as page:
        expect(page.locator(f"tr[data-id='{plan}']")).to_be_visible()
        page.get_by_role("button", name="Budget").click()
        budgets = [number(row[3]) for row in rows(page, ".listing")]
        assert budgets == sorted(budgets)
        expect(page.locator(f"tr[data-id='{misfit}']")).to_contain_text("does not fit")
        for one in (plan, spare):
            page.locator(f"tr[data-id='{one}'] input").check()
        page.get_by_role("button", name="Compare 2").click()
        expect(page.locator("h1")).to_have_text("Plans side by side")
        page.go_back()
        page.locator(f"tr[data-id='{spare}'] input").check()
        page.get_by_role("button", name="Delete", exact=True).click()
        page.locator("dialog").get_by_role("button", name="Delete").click()
        expect(page.locator(f"tr[data-id='{spare}']")).to_have_count(0)
        assert served.http.get(f"/v1/plans/{spare}").status_code == 404


def test_colours_follow_the_theme(page):
    at_start = page.locator(".step-frame canvas").first.evaluate("canvas => canvas.toDataURL()")
    page.locator("#theme").click()
    page.wait_for_timeout(200)
    assert page.locator(".step-frame canvas").first.evaluate("canvas => canvas.toDataURL()") != at_start
    page.locator("#theme").click()


@pytest.mark.slow
def test_a_graph_of_many_operators(browser, served):
    """Its table comes in parts."""
    graph = graph_profile(layered(900, training=True))
    least = solve(graph, 1 << 50, policy="keep-all").peak_bytes
    plan = planned(served, served.upload(graph), int(least * 1.1), "keep-all")
    with tab(browser, at(served, f"plans/{plan}")) as page:
        expect(page.locator(".step-frame")).to_be_visible()
        page.locator("section", has_text="The operators").locator("summary").click()
        expect(page.locator("section", has_text="The operators").locator("tbody tr")).to_have_count(60)
        page.get_by_role("button", name="Show more of").click()
        expect(page.locator("section", has_text="The operators").locator("tbody tr")).to_have_count(240)
        page.locator(".step-frame").focus()
        page.keyboard.press("Home")
        expect(page.locator(".step .reading")).to_contain_text("(forward)")


@pytest.mark.slow
def test_nothing_hinders_people(page, pictures):
    page.locator(".step-frame").focus()
    page.keyboard.press("Enter")
    for fold in page.locator("details > summary").all():
        fold.click()
    nothing_hinders(page, pictures, "plan")
