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
from chromium import PATIENCE
from damage import SEQ
from playwright.sync_api import expect
from served import Served
from synthetic import decoder_like

from tightfit.planner.plan import minimum_budget
from tightfit.planner.service.client import connect
from tightfit.planner.service.wire.remote_devices import PhaseMemory, RemoteDevice, RunReport
from tightfit.planner.service.wire.schema import PLAN_JOB


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


def number(text):
    return float(re.search(r"[\d.]+", text.replace(",", ""))[0])


def test_the_plan_is_told_and_drawn(page, served):
    peak = rows(page, "#peak")
    together = next(number(row[2]) for row in peak if row[0] == "together")
    parts = [number(row[2]) for row in peak if row[0] != "together"]
    assert sum(parts) == pytest.approx(together, abs=0.15 + 0.06 * len(parts))
    # The chart reads itself out under the arrow keys.
    page.locator("#timeline svg").focus()
    reading = page.locator("#reading")
    at_peak = reading.inner_text()
    page.keyboard.press("Home")
    assert reading.inner_text() != at_peak
    page.keyboard.press("End")
    assert re.fullmatch(r"[\d.]+ s: [\d.]+ MiB = .*", reading.inner_text())
    assert page.locator("#timeline svg .cap-label").inner_html().startswith("cap ")
    assert page.locator("#timeline svg .peak-label").inner_html().startswith("instruction ")
    kinds = page.locator("#timeline svg path[data-kind]").count()
    assert kinds == page.locator("#timeline-legend li").count() > 4
    assert any("(fullest)" in row[0] for row in rows(page, "#timeline-table"))
    assert [row[0] for row in rows(page, "#layers-table")] == ["stem", "layer0", "layer1", "head"]
    assert page.locator("#layers svg rect").count() >= 12
    channels = {row[0]: number(row[2]) for row in rows(page, "#channels-table")}
    assert set(channels) == {"compute", "read", "write", "waiting"}
    assert 0 < channels["compute"] <= 100.5


def test_compare(page, served, pictures):
    page.select_option("#left", index=0)
    page.locator("#compare-form button").click()
    expect(page.locator("#figures table")).to_be_visible()
    for side in ("left", "right"):
        assert page.locator(f"#{side}-memory svg path[data-kind]").count() > 4
        assert page.locator(f"#{side}-name").inner_text().startswith("solver at ")
    figures = {row[0]: row[1:] for row in rows(page, "#figures")}
    budgets = [number(text) for text in figures["budget, MiB"]]
    assert budgets[0] < budgets[1]
    assert number(figures["step, s"][0]) > number(figures["step, s"][1])
    totals = rows(page, "#totals")
    assert any("kept" in row[0].split("→")[1] for row in totals)
    changes = rows(page, "#changes")
    assert sum(int(row[1]) for row in totals) == len(changes)
    page.locator("#compare").screenshot(path=pictures / "compare.png")


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
