"""A run's report as a page of its own, as text and in a real browser."""

from __future__ import annotations

import json
import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from html_page import Page
from playwright.sync_api import expect
from sample_plans import sample_plan
from typer.testing import CliRunner

from tightfit.planner.io import save_plan
from tightfit.planner.plan_result import sealed
from tightfit.planner.report.run_html import run_page
from tightfit.runtime.cli.main import app
from tightfit.runtime.common.units import MIB

STEPS = [
    {"step": n, "loss": 3 / n, "seconds": 1.25, "resident_bytes": 330 * MIB, "peak_bytes": 335 * MIB, "lr": 1e-4}
    for n in range(1, 501)
]
EVALUATED = [{"step": 0, "eval_loss": 3.5, "eval_seconds": 1.0}, {"step": 500, "eval_loss": 0.4, "eval_seconds": 1.0}]


def report_of(plan):
    return {
        "budget_bytes": plan.budget_bytes,
        "enforced_by": "cgroup",
        "peak_bytes": {"predicted": plan.peak_bytes, "measured": 335 * MIB},
        "processes": {"training": {"predicted": plan.peak_bytes, "measured": 335 * MIB}},
        "stage_bytes": {"planning": {"predicted": None, "measured": 90 * MIB}},
        "step_seconds": {"predicted": 1.25, "measured": 1.31},
        "phases": {
            "train": {"predicted_seconds": {"compute": 1.0, "stall": 0.05}, "measured_seconds": {"compute": 1.1}}
        },
        "tokens": {"per_second": 111.4, "padding_share": 0.06},
        "evaluation": {"before": {"loss": 3.5, "accuracy": None}, "after": {"loss": 0.4, "accuracy": 0.88}},
        "plan_fingerprint": plan.fingerprint,
    }


@pytest.fixture(scope="module")
def text():
    plan = sample_plan()
    return run_page("reviews <1>", report_of(plan), [*STEPS, *EVALUATED], plan)


def test_what_was_predicted_stands_beside_what_was_measured(text):
    page = Page(text)
    assert "<title>Tiny &lt;model&gt;: reviews &lt;1&gt; – a run</title>" in text
    cells = [element["text"] for element in page.elements if element["tag"] in {"th", "td"}]
    rows = {cells[i]: cells[i + 1 : i + 3] for i in range(len(cells) - 2)}
    assert rows["peak of its processes"] == ["340.0 MiB", "335.0 MiB"]
    assert rows["stage before: planning"] == ["–", "90.0 MiB"]
    assert rows["one step"] == ["1.250 s", "1.310 s"]
    assert rows["– computing"] == ["1.000 s", "1.100 s"]
    assert rows["– waiting for transfers"] == ["0.050 s", "–"]
    assert rows["held-out loss after"] == ["–", "0.4000"]
    assert rows["accuracy after"] == ["–", "0.880"]
    assert "The cap was enforced by the kernel" in text


def test_many_steps_are_listed_evenly(text):
    listed = [int(step) for step in re.findall(r'<th scope="row">(\d+)</th>', text)]
    assert listed[0] == 1
    assert listed[-1] == 500
    assert len(listed) == 168
    drawn = json.loads(Page(text).find("script", id="drawn")[0]["text"])
    assert len(drawn["steps"]) == 500
    assert [one["step"] for one in drawn["evaluations"]] == [0, 500]


def test_without_a_plan_and_without_steps():
    plan = sample_plan()
    text = run_page("bare", report_of(plan), [])
    assert "<title>bare – a run</title>" in text
    assert "One step, as planned" not in text
    assert "Predicted beside measured" in text


def test_it_is_drawn_without_a_server(browser, text, tmp_path):
    file = tmp_path / "run.html"
    file.write_text(text)
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    wrong, asked = [], []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    expect(page.locator("#loss svg .line")).to_have_count(2)
    expect(page.locator("#loss svg .dot-mark")).to_have_count(2)  # evaluations
    expect(page.locator("#memory svg .cap-label")).to_have_text("cap 350.0 MiB")
    expect(page.locator(".step-frame")).to_be_visible()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        assert [(one["id"], [node["html"][:100] for node in one["nodes"]]) for one in found] == [], scheme
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert wrong == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    page.close()


@pytest.fixture
def output(tmp_path):
    """The folder of a run, with its plan beside it as `plan.json` of `tightfit train` would be."""
    plan, out = sample_plan(), tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text(json.dumps(report_of(plan)))
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in STEPS[:3]))
    return out


def invoke(*words):
    return CliRunner().invoke(app, ["report", *(str(word) for word in words)])


def test_the_command_writes_it(output, tmp_path):
    result = invoke(output, "--html", tmp_path / "run.html")
    assert result.exit_code == 0, result.output
    assert "<title>out – a run</title>" in (tmp_path / "run.html").read_text()


def test_the_command_refuses_what_is_no_report_of_a_run(output, tmp_path):
    assert "name the page to write as well" in str(invoke(output, "--to", "wandb", "--plan", "p.json").exception or "")
    both = invoke(output, "--to", "wandb", "--html", tmp_path / "x.html")
    assert "--html FILE" in str(both.exception)
    gone = invoke(tmp_path / "nowhere", "--html", tmp_path / "x.html")
    assert "name the output folder of a run that has ended" in str(gone.exception)


def test_the_plan_must_be_the_one_that_ran(output, tmp_path):
    save_plan(sealed(sample_plan(seconds=2.0)), tmp_path / "other.json")
    result = invoke(output, "--html", tmp_path / "run.html", "--plan", tmp_path / "other.json")
    assert "is not the plan that" in str(result.exception)
    assert not (tmp_path / "run.html").exists()
