"""Runs on the page: data looked at before, followed live, cancelled and gone on with, laid over each other, found again."""

from __future__ import annotations

import json
import re
import tarfile

import pytest
from damage import SEQ
from places_of_the_page import at, nothing_hinders, number, rows, tab
from playwright.sync_api import expect

from tightfit.planner.service.wire.schema import DIGEST, PLAN_JOB
from tightfit.runtime.supervision.progress import stage_of

STEPS = 12


@pytest.fixture
def planned(measuring):
    """The id of a plan of the tiny model that can be run there."""
    profile = measuring.result("/v1/profiles", path="model", seq=SEQ, batch=2, lora_rank=4)["profile"]
    return measuring.result("/v1/plans", profile=profile, memory="400MiB")["plan"]


def wait_until(page, text):
    expect(page.locator("#run-state")).to_contain_text(text)


@pytest.mark.slow
def test_a_run_from_its_data_to_its_adapter(browser, measuring, planned, pictures):
    with tab(browser, at(measuring, f"runs?new=1&plan={planned}"), expected=("422",)) as page:
        # The only data there are chosen already, and shown as they are read: what is learnt is marked.
        data = page.get_by_label("Data to learn from")
        expect(data).to_contain_text("data.jsonl")
        first = page.locator(".samples li").first
        expect(first.locator("mark")).to_contain_text("positive")
        expect(first.locator("p span.soft")).to_have_text("Is the fox quick? ")
        expect(page.get_by_text("of the places are padding")).to_be_visible()
        page.get_by_label("Held-out data").click()
        page.get_by_role("dialog").get_by_role("button", name="data.jsonl").click()
        # What is wrong with a field is told beside it.
        page.get_by_label("or steps").fill(str(STEPS))
        page.get_by_text("More options").click()
        page.fill("#run-form [name=eval_every]", "6")
        page.check("#run-form [name=keep_best]")
        page.check("#run-form [name=packing]")
        page.fill("#run-form [name=min_lr_ratio]", "0.5")
        page.get_by_role("button", name="Start fine-tuning").click()
        expect(page.locator("#run-form .wrong").first).to_contain_text("the constant schedule does not")
        nothing_hinders(page, pictures, "new-run")
        page.select_option("#run-form [name=schedule]", "linear")
        page.get_by_role("button", name="Start fine-tuning").click()
        page.wait_for_url(re.compile("#/runs/job-"))
        expect(page.locator("h1")).to_contain_text("model on data.jsonl in 400")
        wait_until(page, "done")
        page.get_by_text("In numbers").click()
        steps = rows(page, "[aria-label=Steps]")
        assert [int(row[0]) for row in steps] == list(range(1, STEPS + 1))
        assert all(re.fullmatch(r"\d+ %", row[4]) for row in steps)
        identity = page.url.rsplit("/", 1)[1]
        request = measuring.http.get(f"/v1/jobs/{identity}").json()["request"]
        assert (request["schedule"], request["keep_best"], request["packing"]) == ("linear", True, True)
        told = {row[0]: row[1:] for row in rows(page, "[aria-label='Predicted beside measured']")}
        training = number(told["– training, MiB"][1])
        whole = number(told["peak of its processes, MiB"][1])
        assert whole == pytest.approx(training + number(told["– supervisor, MiB"][1]), abs=0.2)
        assert training == pytest.approx(max(number(row[-1]) for row in steps), abs=1)
        assert page.locator("[data-chart='Memory of the process that trains'] svg .cap").count() == 1
        assert (
            page.locator("[data-chart=Loss] svg .dot-mark").count() == 3
        )  # evaluations before, in the middle, at the end
        with page.expect_download() as caught:
            page.get_by_role("button", name="Download the adapter").click()
        with tarfile.open(caught.value.path()) as archive:
            assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= set(archive.getnames())
            assert json.load(archive.extractfile("adapter/adapter_config.json"))["r"] == 4
        with page.expect_download() as caught:
            page.get_by_role("button", name="All steps as CSV").click()
        assert len(caught.value.path().read_text().splitlines()) == STEPS + 1
        nothing_hinders(page, pictures, "run")


@pytest.mark.slow
def test_a_run_is_cancelled_goes_on_and_is_found_again(browser, measuring, planned):
    endless = {"plan": planned, "data": "data.jsonl", "steps": 1_000_000}
    run = measuring.ask("/v1/runs", **endless)["id"]
    with tab(browser, at(measuring, f"runs/{run}"), expected=("429",)) as page:
        expect(page.locator("#run-state")).to_contain_text(re.compile(r"training, \d+ of 1000000"))
        expect(page.locator(".cards")).to_contain_text("time left")
        page.reload()  # nothing is lost
        expect(page.locator("#run-state")).to_contain_text(re.compile(r"training, \d+ of 1000000"))
        page.get_by_role("button", name="Cancel").click()
        wait_until(page, "cancelled")
        saved = len(measuring.http.get(f"/v1/runs/{run}/metrics").json()["steps"])
        refusal = {"error": {"code": "busy", "message": "1000 jobs are waiting already", "fields": []}}
        page.route("**/resume", lambda route: route.fulfill(status=429, json=refusal))
        page.get_by_role("button", name="Go on with it").click()
        expect(page.locator("#problem")).to_contain_text("1000 jobs are waiting already")
        page.unroute("**/resume")
        page.get_by_role("button", name="Go on with it").click()
        page.wait_for_function(
            "saved => Number((document.querySelector('#run-state').innerText.match(/training, (\\d+) of/) || [])[1]) > saved",
            arg=saved,
        )
        # It is under way wherever one looks, and can be ended from there.
        page.goto(at(measuring, "devices"))
        expect(page.locator("#activity")).to_have_text("1 under way")
        page.locator("#activity").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("dialog")).to_contain_text("Nothing is under way")
        page.keyboard.press("Escape")
        page.goto(at(measuring, "runs"))
        page.get_by_role("link", name="model on data.jsonl").click()
        wait_until(page, "cancelled")
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(page.locator(".empty")).to_contain_text("Nothing was fine-tuned yet")


def test_a_run_that_fails_says_nothing_beside_another(browser, served):
    """Two runs of which the one that was left ends badly, while the other is looked at."""
    left, other = (
        PLAN_JOB
        | {
            "id": f"job-{digit * 16}",
            "kind": "run",
            "request": {"plan": DIGEST, "data": "random", "steps": 3, "lr": 1e-4},
        }
        for digit in "ab"
    )
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
    metrics = {"budget_bytes": 1 << 30, "places_per_step": None, "steps": [], "evaluations": []}
    held = []
    with tab(browser, at(served, "runs"), expected=("404",)) as page:
        page.route("**/v1/jobs?kind=run*", lambda route: route.fulfill(json={"jobs": [left, other], "next": None}))
        page.route("**/metrics", lambda route: route.fulfill(json=metrics))
        page.route("**/report", lambda route: route.fulfill(json=report))
        for job in (left, other):
            page.route(f"**/v1/runs/{job['id']}", lambda route, request, job=job: route.fulfill(json=job))
        page.route("**/events", lambda route: held.append(route))  # noqa: PLW0108  playwright marks what it is given, a method cannot be
        with page.expect_request("**/events"):
            page.goto(at(served, f"runs/{left['id']}"))
        page.goto(at(served, f"runs/{other['id']}"))
        expect(page.locator("#run-state")).to_contain_text("done")
        held[0].fulfill(content_type="text/event-stream", body=f"event: job\ndata: {json.dumps(failed)}\n\n")
        page.wait_for_timeout(500)
        expect(page.locator("#problem")).to_be_hidden()
        expect(page.locator("#run-state")).to_contain_text("done")
        expect(page.get_by_text("the disk is full")).to_have_count(0)


def test_a_run_of_ten_thousand_steps_stays_fluid(browser, served):
    """Drawn thinned: every part of the line is a point of the run, its lowest and highest loss among them."""
    with tab(browser, at(served, "runs")) as page:
        drawn = page.evaluate(
            """async () => {
              const { thinned, smoothed } = await import("./lines.js");
              const points = Array.from({ length: 10000 }, (_, i) => [i + 1, Math.sin(i / 50) + (i === 7777 ? 9 : i === 3333 ? -9 : 0)]);
              const kept = thinned(points, 500), all = new Set(points.map(String));
              const flat = smoothed(points.map(([x]) => [x, 2]));
              return { count: kept.length, own: kept.every((one) => all.has(String(one))), least: Math.min(...kept.map((one) => one[1])), most: Math.max(...kept.map((one) => one[1])),
                       first: kept[0][0], last: kept.at(-1)[0], ordered: kept.every((one, i) => !i || one[0] > kept[i - 1][0]), flat: flat.every(([, y]) => Math.abs(y - 2) < 1e-9) };
            }"""
        )
    assert drawn["own"]
    assert drawn["ordered"]
    assert drawn["flat"]
    assert drawn["count"] <= 2000
    assert (drawn["first"], drawn["last"]) == (1, 10000)
    assert drawn["least"] < -9 + 1.01
    assert drawn["most"] > 9 - 1.01


@pytest.mark.parametrize(
    ("losses", "held", "words"),
    [
        ([2.0] * 5 + ["NaN"], [], "The loss is no number since step 6"),
        ([1.0] * 60 + [1.5] * 40, [], "The loss has risen from 1.000 to 1.500"),
        ([1.0] * 100, [2.0, 1.5, 1.6, 1.7], "The held-out loss rises since step 20"),
        ([1.0] * 100, [2.0, 1.5, 1.6], None),
        ([2.0] * 50 + [1.0] * 50, [2.0, 1.5, 1.4], None),
    ],
)
def test_warnings_in_words(browser, served, losses, held, words):
    with tab(browser, at(served, "runs")) as page:
        said = page.evaluate(
            """async ([losses, held]) => {
              const { warnings } = await import("./warnings.js");
              return warnings(losses.map((loss, i) => ({ step: i + 1, loss: Number(loss) })), held.map((loss, i) => ({ step: (i + 1) * 10, eval_loss: loss })));
            }""",
            [losses, held],
        )
    assert len(said) == (words is not None)
    assert words is None or words in said[0]


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ("reading the data …", {"stage": "reading the data"}),
        ("packing random weights: 3 of 32", {"stage": "packing random weights", "done": 3, "total": 32}),
        ("step 3/12: loss 1.2, 30 tokens/s", None),
        ("evaluated after step 6: loss 5.1", None),
    ],
)
def test_a_run_s_lines_tell_its_stage(line, stage):
    assert stage_of(line + "\n") == stage
