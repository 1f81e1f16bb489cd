"""Runs on the page: data looked at before, followed live, cancelled and gone on with, laid over each other, found
again.
"""

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
        # How long it takes is told before it starts, with what evaluations add to it, as fields change.
        expect(page.locator("#takes")).to_have_text(
            re.compile(r"^Takes about .*: \d+ steps? of [\d.]+ s, .* in all\.$")
        )
        page.get_by_label("or steps").fill("3")
        expect(page.locator("#takes")).to_contain_text(": 3 steps of")
        page.get_by_label("or steps").fill("")
        first = page.locator(".samples li").first
        expect(first.locator("mark")).to_contain_text("positive")
        expect(first.locator("p span.soft")).to_have_text("Is the fox quick? ")
        expect(page.get_by_text("of the places are padding")).to_be_visible()
        page.get_by_label("Held-out data").click()
        page.get_by_role("dialog").get_by_role("button", name="data.jsonl").click()
        expect(page.locator("#takes")).to_contain_text("; evaluation before and after, ")
        # Where one step is judged by two evaluations, that is warned of, with what can be done.
        page.get_by_label("or steps").fill("1")
        expect(page.locator("#heavy")).to_contain_text("Evaluating takes longer than the steps that it judges.")
        page.get_by_role("button", name="Leave held-out data out").click()
        expect(page.locator("#heavy")).to_be_hidden()
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


@pytest.mark.slow
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
        "step_seconds": figures | {"predicted_by": "rehearsal"},
        "evaluation": {},
        "enforced_by": "meter",
        "loss": [1.0] * 3,
    }
    metrics = {"budget_bytes": 1 << 30, "places_per_step": None, "steps": [], "evaluations": []}
    held = []
    with tab(browser, at(served, "runs"), expected=("404",)) as page:
        page.route("**/v1/runs?*", lambda route: route.fulfill(json={"items": [left, other], "next": None}))
        page.route("**/metrics", lambda route: route.fulfill(json=metrics))
        page.route("**/report", lambda route: route.fulfill(json=report))
        for job in (left, other):
            page.route(f"**/v1/jobs/{job['id']}", lambda route, request, job=job: route.fulfill(json=job))
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


# --- how long it takes, before and while it goes on -------------------------------------------------------------------

SUMMARY = {"expected_seconds": 2.0, "accumulate": 1, "evaluate": {"seconds": 1.0}}
"""of a plan"""
LEARN = {"epoch_steps": 10.5, "evaluation_batches": 11, "whole": True}
HELD = {"epoch_steps": 400, "evaluation_batches": 400, "whole": True}


@pytest.mark.parametrize(
    ("summary", "asked", "words"),
    [
        (
            SUMMARY,
            {"steps": 15, "held": HELD},
            "Takes about 13 min 50 s: 15 steps of 2 s, 30 s in all; evaluation before and after, 13 min 20 s.",
        ),
        (SUMMARY, {"epochs": 2, "held": None}, "Takes about 42 s: 21 steps of 2 s, 42 s in all."),
        (
            SUMMARY,
            {"steps": 15, "every": "5", "held": HELD},
            "Takes about 27 min 10 s: 15 steps of 2 s, 30 s in all; 4 evaluations, 26 min 40 s.",
        ),
        (
            SUMMARY,
            {"epochs": 2, "every": "1 epoch", "held": HELD},
            "Takes about 20 min 42 s: 21 steps of 2 s, 42 s in all; 3 evaluations, 20 min.",
        ),
        (SUMMARY | {"accumulate": 4}, {"epochs": 1, "held": None}, "Takes about 24 s: 12 steps of 2 s, 24 s in all."),
        (
            SUMMARY,
            {"epochs": 1, "learn": LEARN | {"whole": False}, "held": None},
            "Takes at least about 22 s: 11 steps of 2 s, 22 s in all.",
        ),
        (SUMMARY, {"epochs": 1, "learn": None, "held": None}, ""),
    ],
)
def test_how_long_a_run_takes_is_told_in_words(browser, served, summary, asked, words):
    with tab(browser, at(served, "runs")) as page:
        said, heavy = page.evaluate(
            """async ([summary, asked]) => {
              const { durationOf, durationWords, outweighs } = await import("./duration.js");
              const time = durationOf(summary, asked);
              return [durationWords(time), outweighs(time)];
            }""",
            [summary, {"learn": LEARN} | asked],
        )
    assert re.sub(r"(\d)\.?0* s,", r"\1 s,", said) == words
    assert heavy == ("evaluation" in words)


def test_what_is_left_of_a_stage_is_told_by_two_moments_or_by_its_beginning(browser, served):
    """Never by what was done before somebody looked."""
    with tab(browser, at(served, "runs")) as page:
        said = page.evaluate(
            """async () => {
              const { progress } = await import("./components.js"), real = Date.now;
              let now = 0;
              Date.now = () => now * 1000;
              const bar = progress("This run"), told = [];
              const hear = (seconds, figures) => { now = seconds; bar.update(figures); told.push(bar.textContent); };
              const stage = "evaluating before";
              hear(100, { stage, done: 382, total: 400 });
              hear(110, { stage, done: 391, total: 400 });
              hear(111, { stage: "evaluating after", done: 1, total: 400 });
              hear(112, { stage: "evaluating after", done: 2, total: 400 });
              hear(200, { stage, done: 101, total: 401, clock: { began: 5000, at: 5100 } });
              Date.now = real;
              return told;
            }"""
        )
    assert said == [
        "This run: evaluating before, 382 of 400",
        "This run: evaluating before, 391 of 400, about 10 s left",
        "This run: evaluating after, 1 of 400",
        "This run: evaluating after, 2 of 400",
        "This run: evaluating before, 101 of 401, about 5 min left",
    ]


@pytest.mark.parametrize(
    ("request_", "latest", "known", "left"),
    [
        # Half of the evaluation before, the steps, and the evaluation after.
        (
            {"eval_data": "h"},
            {"stage": "evaluating before", "done": 51, "total": 101, "clock": {"began": 0, "at": 50}},
            {"total": 10},
            {"steps": 20, "evaluations": 151},
        ),
        (
            {"eval_data": "h"},
            {"stage": "training"},
            {"step": 4, "total": 10, "evaluation": 100},
            {"steps": 12, "evaluations": 100},
        ),
        (
            {"eval_data": "h", "eval_every": 3},
            {"stage": "evaluated"},
            {"step": 3, "total": 10, "evaluation": 100},
            {"steps": 14, "evaluations": 300},
        ),
        ({"eval_data": "h"}, {"stage": "training"}, {"step": 4, "total": 10}, {"steps": 12, "evaluations": None}),
        (
            {"eval_data": "h"},
            {"stage": "evaluating after", "done": 11, "total": 101, "clock": {"began": 0, "at": 20}},
            {"step": 10, "total": 10},
            {"steps": 0, "evaluations": 180},
        ),
        ({"eval_data": None}, {"stage": "training"}, {"step": 9, "total": 10}, {"steps": 2, "evaluations": 0}),
        ({"eval_data": None}, {"stage": "preparing"}, {"total": 10}, {"steps": None, "evaluations": None}),
    ],
)
def test_what_is_left_of_a_run_has_its_evaluations(browser, served, request_, latest, known, left):
    with tab(browser, at(served, "runs")) as page:
        found = page.evaluate(
            """async ([request, known]) => (await import("./phases.js")).leftInRun(request, known)""",
            [request_, {"latest": latest, "step": 0, "pace": 2, "evaluation": None} | known],
        )
    assert found == pytest.approx(left, abs=1) if None not in left.values() else found == left


def fake_run(page, job, metrics, *, report=None, summary=None):
    """Answer for the service what it would say of a run."""
    page.route("**/v1/runs?*", lambda route: route.fulfill(json={"items": [job], "next": None}))
    page.route("**/metrics", lambda route: route.fulfill(json=metrics))
    page.route("**/report", lambda route: route.fulfill(json=report))
    page.route(f"**/v1/jobs/{job['id']}", lambda route: route.fulfill(json=job))
    plan = {
        "id": DIGEST,
        "profile": DIGEST,
        "summary": summary,
        "label": "tiny",
        "title": None,
        "note": None,
        "created": 1.0,
    }
    page.route("**/v1/plans/*", lambda route: route.fulfill(json=plan))


STEP = {"loss": 2.0, "seconds": 3.2, "resident_bytes": 1 << 26, "peak_bytes": 1 << 26, "tokens": 40.0}


def test_a_run_under_way_says_at_once_where_it_is_and_why_it_is_slow(browser, served):
    clock = {"at": 130.0, "began": 100.0, "evaluation_seconds": 60.0, "others_cores": 1.4}
    steps = [STEP | {"step": number} for number in range(1, 13)]
    job = PLAN_JOB | {
        "id": "job-" + "c" * 16,
        "kind": "run",
        "state": "running",
        "result": None,
        "request": {"plan": DIGEST, "data": "random", "eval_data": "held.jsonl", "steps": 15, "lr": 1e-4},
        "progress": {"stage": "training", **steps[-1], "clock": clock},
    }
    metrics = {"budget_bytes": 1 << 30, "places_per_step": 64, "steps": steps, "evaluations": []}
    with tab(browser, at(served, "runs")) as page:
        fake_run(page, job, metrics, summary={"budget_bytes": 1 << 30, "expected_seconds": 0.79})
        page.route("**/events", lambda route: None)  # nothing comes for a while
        page.goto(at(served, f"runs/{job['id']}"))
        expect(page.locator("#run-state")).to_contain_text("training, 12 of 15")
        expect(page.locator(".phases [aria-current]")).to_have_text("training")
        expect(page.locator(".cards")).to_contain_text("time left1 min 10 s10 s of steps, 1 min of evaluating")
        expect(page.locator(".warnings")).to_contain_text(
            "Planned 0.790 s a step, takes 3.20 s: other programs use 1.4 of the cores"
        )


def test_a_run_that_is_done_shows_first_what_it_has_learnt(browser, served):
    figures = {"predicted": 1.0, "measured": 90 << 20}
    evaluation = {"before": {"loss": 2.5, "accuracy": 0.43}, "after": {"loss": 1.25, "accuracy": 0.61}}
    report = {
        "peak_bytes": figures,
        "step_seconds": figures | {"predicted_by": "rehearsal"},
        "evaluation": evaluation,
        "enforced_by": "meter",
        "loss": [3.0, 2.0],
    }
    job = PLAN_JOB | {
        "id": "job-" + "d" * 16,
        "kind": "run",
        "request": {"plan": DIGEST, "data": "random", "eval_data": "held.jsonl", "steps": 2, "lr": 1e-4},
        "result": {"report": report | {"steps": 2}},
    }
    metrics = {
        "budget_bytes": 100 << 20,
        "places_per_step": 64,
        "steps": [STEP | {"step": 1, "loss": 3.0}, STEP | {"step": 2}],
        "evaluations": [],
    }
    cancelled = job | {"id": "job-" + "e" * 16, "state": "cancelled", "result": None}
    with tab(browser, at(served, "runs")) as page:
        fake_run(page, job, metrics, report=report, summary={"budget_bytes": 100 << 20, "expected_seconds": 0.79})
        page.goto(at(served, f"runs/{job['id']}"))
        tiles = page.locator(".cards .card")
        expect(tiles.nth(0)).to_have_text("held-out loss2.5000 → 1.2500before → after")
        expect(tiles.nth(1)).to_have_text("held-out accuracy43.0 % → 61.0 %before → after")
        expect(tiles.nth(2)).to_contain_text("2.0000")
        expect(page.locator(".cards")).to_contain_text("90.0 MiBof 100.0 MiB")
        # The list has the same figures, also of one that did not come to its end.
        page.route("**/v1/runs?*", lambda route: route.fulfill(json={"items": [job, cancelled], "next": None}))
        page.goto(at(served, "runs"))
        expect(page.locator(".listing tbody tr")).to_have_count(2)
        told = [row[2:7] for row in rows(page, ".listing")]
        assert [row[1:] for row in told] == [["2", "2.0000", "1.2500", "90.0"], ["2", "2.0000", "–", "–"]]


def test_plans_to_choose_from_are_those_that_were_asked_for_by_model(browser, served):
    def plan(identity, profile, budget, **more):
        summary = {
            "status": "feasible",
            "policy": "solver",
            "budget_bytes": budget << 20,
            "expected_seconds": 0.5,
            "optimizer": "adamw",
            "elsewhere": None,
        }
        return {
            "id": identity * 64,
            "profile": profile * 64,
            "label": "tiny",
            "title": None,
            "created": 1.0,
            "summary": summary | more,
        }

    def model(identity, rank, origin="made", title=None):
        summary = {"batch": 4, "seq": 64, "lora": {"rank": rank}, "accumulate": 1}
        return {
            "id": identity * 64,
            "origin": origin,
            "label": f"tiny, LoRA rank {rank}, batch 4, sequence 64",
            "title": title,
            "name": "tiny",
            "summary": summary,
        }

    plans = [
        plan("1", "b", 300),
        plan("2", "a", 400),
        plan("3", "a", 200),
        plan("4", "a", 400),
        plan("5", "c", 100),
        plan("6", "a", 100, status="infeasible"),
        plan("7", "a", 90, elsewhere="phone"),
        plan("8", "a", 400, optimizer="sgd"),
    ]
    models = [model("a", 8, title="my model"), model("b", 4), model("c", 8, origin="uploaded")]
    with tab(browser, at(served, "runs")) as page:
        page.evaluate("id => sessionStorage.setItem('tightfit-model', id)", "a" * 64)
        page.route("**/v1/plans?*asked=true*", lambda route: route.fulfill(json={"items": plans}))
        page.route("**/v1/profiles?*", lambda route: route.fulfill(json={"items": models}))
        page.goto(at(served, "runs?new=1"))
        choice = page.get_by_label("Plan", exact=True)
        expect(choice).to_have_value("2" * 64)  # the latest of the model that one comes from
        groups = choice.evaluate(
            "one => [...one.children].map((group) => [group.label, [...group.children].map((option) => option.text)])"
        )
        assert groups == [
            ["tiny, LoRA rank 4, batch 4, sequence 64", ["300.0 MiB, 0.500 s a step"]],
            [
                "my model, LoRA rank 8, 4 × 64 tokens",
                ["200.0 MiB, 0.500 s a step", "400.0 MiB, 0.500 s a step", "400.0 MiB, 0.500 s a step, sgd"],
            ],
        ]
        expect(page.get_by_text("Of my model, LoRA rank 8, 4 × 64 tokens.")).to_be_visible()


def test_shorter_lengths_are_told_with_what_they_cut(browser, served):
    longer = [[16, 90], [24, 60], [32, 30], [48, 4], [64, 0], [96, 0]]
    with tab(browser, at(served, "runs")) as page:
        found = page.evaluate(
            """async (longer) => { const { shorterLengths } = await import("./data.js"); return [shorterLengths({ longer, counted: 101, refused_count: 1 }), shorterLengths({ longer: longer.slice(0, 3), counted: 100 }), shorterLengths({ counted: 3 })]; }""",
            longer,
        )
    assert found == [[{"seq": 64, "cuts": 0, "of": 100}, {"seq": 48, "cuts": 4, "of": 100}], [], []]
