from __future__ import annotations

import base64
import gzip
import json
import re

import pytest
from html_page import Page
from sample_plans import infeasible_plan, sample_plan, sample_plans
from synthetic import decoder_like

from tightfit.planner.compare import compare
from tightfit.planner.plan import plan as solve
from tightfit.planner.report.comparison_words import verdicts
from tightfit.planner.report.html import comparison_page, facts
from tightfit.profiles.graph_input import BareGraph, BareOperator, graph_profile
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.units import MIB

SMALL = (("a", 100, []), ("b", 300, ["a"]), ("c", 200, ["b"]), ("d", 50, ["a", "c"]))


@pytest.fixture(scope="module")
def text():
    return comparison_page(sample_plans())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def drawn(page):
    """The data of the page's charts."""
    return json.loads(page.find("script", id="drawn")[0]["text"])


def steps(page):
    """What its timelines draw."""
    return [json.loads(gzip.decompress(base64.b64decode(packed))) for packed in drawn(page)["timelines"]]


def modules(page):
    """The scripts that the page has within itself: name -> text."""
    imports = json.loads(page.find("script", type="importmap")[0]["text"])["imports"]
    assert all(url.startswith("data:text/javascript;base64,") for url in imports.values())
    return {name: base64.b64decode(url.partition(",")[2]).decode() for name, url in imports.items()}


def without_modules(text):
    return re.sub(r'<script type="importmap">.*?</script>', "", text)


def test_nothing_is_fetched(text, page):
    within = modules(page)
    for script in (without_modules(text), *within.values()):
        assert set(re.findall(r'^import .* from "([^"]+)";$', script, re.MULTILINE)) <= within.keys()
        rest = re.sub(r"^import .*$", "", script.replace("http://www.w3.org/2000/svg", ""), flags=re.MULTILINE)
        assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]|@import|url\(|\bimport\b|\bfetch\(", rest, re.IGNORECASE)
    for element in page.elements:
        assert element["tag"] not in ("link", "img", "iframe", "object", "embed")
        assert "src" not in element
        assert "href" not in element


def test_names_are_escaped(text):
    assert "<model>" not in text
    assert "<title>Tiny &lt;model&gt; on cpu-test – memory against time</title>" in text


def test_every_chart_has_a_table_beside_it(page):
    feasible = [plan for plan in sample_plans() if plan.fits]
    assert len(page.find("article")) == len(feasible)
    assert len(page.find("div", **{"class": "step chart-box"})) == len(feasible)
    assert len(page.find("div", **{"class": "chart-box"})) == 1
    assert len(page.find("noscript")) == len(feasible) + 1  # without a script the tables say it
    # The curve's; per plan what lies at the peak, the facts, the largest tensors and the chart's numbers; the diff's
    # two.
    assert len(page.find("table")) == 1 + 4 * len(feasible) + 2
    assert len(page.find("caption")) == 1 + 3 * len(feasible) + 1


def test_the_curve_table_says_what_is_needed(page):
    cells = [element["text"] for element in page.find("td", **{"class": "none"})]
    assert cells == ["needs 640.0 MiB", "needs 262.0 MiB", "needs 640.0 MiB", "needs 640.0 MiB"]


def test_the_choices(page):
    radios = page.find("input", type="radio")
    assert [e["value"] for e in radios if e["name"] == "policy"] == ["solver", "keep-all", "mebp"]
    assert [int(e["value"]) // MIB for e in radios if e["name"] == "budget"] == [250, 350, 500, 800]


def test_both_grounds_have_a_colour_for_every_kind_and_policy(text, page):
    for kind in ("floor", "packed", "weight", "trainable", "optimizer", "activation", "gradient", "workspace"):
        assert len(re.findall(rf"--kind-{kind}: #", text)) == 3  # light, dark by preference, dark by choice
    for slot in range(int(re.search(r"POLICY_COLOURS = (\d+)", modules(page)["tightfit/charts.js"])[1])):
        assert len(re.findall(rf"--policy-{slot}: #", text)) == 3
    assert "prefers-color-scheme: dark" in text


def test_what_the_curve_draws(page):
    (curve,) = drawn(page)["curves"]
    assert [(one["name"], one["slot"]) for one in curve] == [("solver", 0), ("keep-all", 1), ("mebp", 2)]
    assert [len(one["points"]) for one in curve] == [4, 1, 3]
    assert curve[1]["misfits"] == [{"budget": budget * MIB, "needs": 640 * MIB} for budget in (250, 350, 500)]
    assert curve[1]["points"] == [{"budget": 800 * MIB, "step": 0.95, "bound": 0.95, "peak": 640 * MIB}]
    assert [point["budget"] // MIB for point in curve[2]["points"]] == [350, 500, 800]


def test_what_the_timelines_draw(page):
    feasible = [plan for plan in sample_plans() if plan.fits]
    articles = page.find("article")
    assert len(steps(page)) == len(articles) == len(feasible)
    for step, article in zip(steps(page), articles, strict=True):
        (plan,) = [
            plan
            for plan in feasible
            if (plan.policy, str(plan.budget_bytes)) == (article["data-policy"], article["data-budget"])
        ]
        assert (step["policy"], step["budget"]) == (plan.policy, plan.budget_bytes)
        assert step["peak"]["instruction"] == 23
        assert len(step["instructions"]["what"]) == len(plan.train.instructions) == 48
        assert step["kinds"][0] == {"name": "floor", "label": "Python and PyTorch"}


def test_the_numbers_under_a_chart_are_the_charts(page):
    plan = sample_plans()[0]
    tables = [
        e["text"]
        for e in page.find("div", **{"aria-label": "Memory over the step"})
        if "MiB in the fullest" in e["text"]
    ]
    assert len(tables) == len(page.find("article"))
    highest = max(point.bytes for point in plan.timeline) / MIB
    assert f"{highest:.1f}" in tables[0]


def test_a_plan_explains_itself(page):
    words = [element["text"] for element in page.find("li") if element["text"].startswith("One step takes")]
    assert len(words) == len(page.find("article"))
    assert words[0] == (
        "One step takes 1.280 s by the model and peaks at 246.0 MiB of 250.0 MiB for the whole process, Python and PyTorch included (4.0 MiB spare)."
    )


def test_the_times_of_a_step_add_up_to_it():
    made = solve(decoder_like(2), 1 << 40, policy="mebp")
    told = {name: float(value.removesuffix(" s")) for name, value in facts(made) if value.endswith(" s")}
    parts = ("forward and backward", "recomputation", "unpacking", "waiting for the disk")
    assert told["recomputation"] > 0
    assert sum(told[name] for name in parts) == pytest.approx(told["step, by the model"], abs=0.003)


def test_each_device_has_its_curve_table_and_plans():
    card = sample_plan().device.model_copy(update={"name": "card <1>", "kind": "cuda", "measured": False})
    plans = sample_plans() + [plan.model_copy(update={"device": card}) for plan in sample_plans()]
    text = comparison_page(plans)
    page = Page(text)
    assert "<title>Tiny &lt;model&gt; on 2 devices" in text
    feasible = [plan for plan in plans if plan.fits]
    assert len(drawn(page)["curves"]) == 2
    assert len(drawn(page)["timelines"]) == len(feasible)
    headings = [e["text"] for e in page.find("h3")][:2]
    assert headings == ["2 threads of cpu-test, times measured", "card <1>, times estimated, not measured"]
    assert "the CUDA context (220.0 MiB) is inside" in text
    radios = [e["value"] for e in page.find("input", type="radio", name="device")]
    assert radios == ["cpu-test", "card <1>"]
    assert {e["data-device"] for e in page.find("article")} == set(radios)
    assert "solver at 250.0 MiB on card &lt;1&gt;" in text


def test_only_infeasible_plans_still_make_a_page():
    page = Page(comparison_page([infeasible_plan("keep-all"), infeasible_plan("solver")]))
    assert page.find("article") == []
    assert "needs 412.4 MiB" in page.find("tbody")[0]["text"]


def test_no_plans():
    with pytest.raises(InputError) as caught:
        comparison_page([])
    assert str(caught.value) == "there are no plans to compare; name at least one budget and one policy"


def test_verdicts():
    said = verdicts(sample_plans())
    assert (
        said[0]
        == "250.0 MiB: 1.280 s per step, proven optimal among plans of its class; no fixed rule compared here fits."
    )
    assert said[1].endswith("mebp, the fastest fixed rule that fits, needs 1.49 × as long.")
    assert len(said) == 4
    # What is not proven is said, and what ended the search.
    for ended, why in (
        ("time limit", ", where the time limit ended the search"),
        ("gap", ", as near as was asked for"),
    ):
        cut = sample_plan(status="feasible", gap=0.0012, ended_by=ended)
        assert verdicts([cut]) == [f"350.0 MiB: 1.250 s per step, within 0.12% of the best plan of its class{why}."]
    faster = sample_plan("mezo", 350 * MIB, seconds=0.1, optimizer={"name": "mezo", "state_tensors": 0})
    assert verdicts([*sample_plans(), faster]) == said  # it learns less in a step: no rule to be measured against


def test_rules_that_fit_without_the_exact_gradient_are_not_said_to_fail():
    mezo = sample_plan("mezo", seconds=0.1, optimizer={"name": "mezo", "state_tensors": 0})
    solved = "350.0 MiB: 1.250 s per step, proven optimal among plans of its class"
    assert verdicts([sample_plan(), mezo, mezo.model_copy(update={"policy": "lcsb"})]) == [
        f"{solved}; mezo and lcsb fit but do not follow the exact gradient, so their times are no measure."
    ]
    assert verdicts([sample_plan(), mezo, infeasible_plan("mebp", 350 * MIB)]) == [
        f"{solved}; mezo fits but does not follow the exact gradient, so its time is no measure."
    ]
    assert verdicts([sample_plan()]) == [f"{solved}."]


def test_rules_that_were_not_planned_are_not_said_to_fail():
    interrupted = [plan for plan in sample_plans() if plan.policy == "solver" or plan.budget_bytes == 250 * MIB]
    said = verdicts(interrupted)
    assert said[0].endswith("; no fixed rule compared here fits.")
    assert said[1].endswith("of its class; keep-all, mebp not planned.")
    interrupted.append(sample_plan("mebp", 350 * MIB, seconds=1.7))
    assert "; mebp, the fastest fixed rule that fits (keep-all not planned), needs" in verdicts(interrupted)[1]


def test_a_graph_of_a_few_bytes_is_told_in_bytes():
    made = [BareOperator(name=name, seconds=1, output_bytes=size, inputs=inputs) for name, size, inputs in SMALL]
    text = comparison_page(compare(graph_profile(BareGraph(format="tightfit-graph", operators=made)), [500, 600]).plans)
    page = Page(text)
    assert "MiB" not in without_modules(text).partition('<script type="module">')[0]
    assert "Python and PyTorch (" not in text
    tables = [e["text"].split() for e in page.find("div", **{"aria-label": "Memory at the peak"})]
    assert [table[-1] for table in tables] == ["together500", "together600", "together600"]
    assert not page.find("p", id="diff-pair")[0]["text"].endswith(": the same")
    changes = page.find("tbody", id="diff-rows")[0]["text"]
    assert "100" in changes


def test_the_moments_of_a_step_of_microseconds_are_told_apart():
    made = [
        BareOperator(name=name, seconds=1e-6 * (i + 1), output_bytes=size, inputs=inputs)
        for i, (name, size, inputs) in enumerate(SMALL)
    ]
    plans = compare(graph_profile(BareGraph(format="tightfit-graph", operators=made)), [500, 600]).plans
    page = Page(comparison_page(plans))
    assert all(" µs per step" in sentence for sentence in verdicts(plans))
    for step in steps(page):
        works = step["instructions"]["work"]
        assert sum(works) * step["tick"] == pytest.approx(step["seconds"])
        assert len([work for work in works if work]) >= len(made)
    text = page.find("div", **{"aria-label": "Memory over the step"})[0]["text"]
    assert "0.00000275" in text


def test_equal_plans_are_called_the_same():
    plan = sample_plan()
    other = plan.model_copy(update={"budget_bytes": plan.budget_bytes + MIB})
    same = Page(comparison_page([plan, other]))
    assert same.find("p", id="diff-pair")[0]["text"].endswith(": the same")
