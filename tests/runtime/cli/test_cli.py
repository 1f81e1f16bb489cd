"""What the door itself owns: exit codes, literal messages, and a stdout that holds results alone."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from sample_plans import infeasible_plan, sample_plan, sample_plans
from synthetic import SLICE, tables

from tightfit.planner.io import load_plan
from tightfit.profiles.io import save_profile
from tightfit.runtime.cli import answers, main
from tightfit.runtime.common.errors import CapError, InfeasibleError, InputError, RunError
from tightfit.runtime.common.strict_json import to_json
from tightfit.runtime.common.units import MIB
from tightfit.runtime.supervision import printing, report_text

FORMS = "write plain bytes (367001600), 350MB, 1.5GB (powers of 1000) or 350MiB, 1.5GiB (powers of 1024)"


@pytest.fixture
def planned(monkeypatch):
    """Let `plan` load any profile and answer with a given plan; the solver itself, and rehearsals, have their own
    tests.
    """
    from tightfit.planner import plan as planner_plan
    from tightfit.profiles import io as profiles_io
    from tightfit.runtime.cli import plan as plan_command
    from tightfit.runtime.session import rehearsal

    def answer(plan, smallest=None):
        class Planner:
            interrupted = False

            def __init__(self, profile):
                pass

            def plan(self, budget, **options):
                answer.asked = options
                return plan

            def neighbour_bytes(self, budget):
                return 50 * MIB

            def smallest_plan(self, **options):
                return sample_plan(peak=plan.minimum_budget_bytes if smallest is None else smallest)

            def bound(self, budget, **options):
                return plan.bound_seconds - (budget - plan.budget_bytes) / MIB / 1000

        monkeypatch.setattr(profiles_io, "load_profile", lambda path: None)
        monkeypatch.setattr(planner_plan, "planner_of", Planner)
        monkeypatch.setattr(plan_command, "check_planning", lambda *_: None)
        monkeypatch.setattr(rehearsal, "figures_id", lambda profile: "none")
        monkeypatch.setattr(rehearsal, "why_not", lambda plan: "it has tests of its own")

    return answer


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "p.json"], "Missing option '--memory'; try 'tightfit plan --help'"),
        (["plan", "--memory", "1GB"], "Missing argument 'PROFILE'; try 'tightfit plan --help'"),
        (["teach"], "No such command 'teach'; try 'tightfit --help'"),
        (["plan", "p.json", "--memory", "350M"], f"'350M' is not a size; {FORMS}"),
        (["plan", "p.json", "--memory", "0"], f"'0' is no memory at all; {FORMS}"),
        (["compare", "p.json", "--memory", "1GB,,2GB"], f"'' is not a size; {FORMS}"),
        (["plan", "p.json", "--memory", "1GB", "--time-limit", "-1"], "--time-limit -1.0: it should be greater than 0"),
        (
            ["compare", "p.json", "--memory", "1GB", "--gap", "-1"],
            "--gap -1.0: it should be greater than or equal to 0",
        ),
        (["profile", "m", "--seq", "0"], "--seq 0: it should be greater than or equal to 1"),
        (["profile", "m", "--batch", "-3"], "--batch -3: it should be greater than or equal to 1"),
        (["profile", "m", "--lora-rank", "0"], "--lora-rank 0: it should be greater than or equal to 1"),
        (
            ["run", "p.json", "--data", "random", "--steps", "0", "-o", "o"],
            "--steps 0: it should be greater than or equal to 1",
        ),
        (
            ["run", "p.json", "--data", "random", "--steps", "1", "-o", "o", "--lr", "nan"],
            "--lr nan: it should be a finite number",
        ),
        (
            ["run", "p.json", "--data", "random", "--steps", "1", "-o", "o", "--seed", "9" * 20],
            "--seed 99999999999999999999: it should be less than or equal to 1000000000000",
        ),
        (
            ["run", "p.json", "--data", "random", "-o", "o"],
            "--steps is missing: give the number of steps, or --epochs",
        ),
        (
            ["run", "p.json", "--data", "random", "-o", "o", "--steps", "2", "--epochs", "1"],
            "--steps 2 and --epochs 1.0: give one of them",
        ),
        (
            ["run", "p.json", "--data", "random", "-o", "o", "--steps", "2", "--eval-every", "half"],
            "--eval-every 'half': give a number of steps, at least 1, or of epochs as in '0.5 epochs'",
        ),
        (["report", "o", "--to", "mlflow"], "tracker 'mlflow' is not known; choose one of tensorboard, wandb"),
        (["serve", "--keep-days", "nan"], "--keep-days nan: give a number of at least 0"),
        (
            ["fleet", "plan", "f.toml", "-o", "o", "--start", "nan"],
            "--start nan: it should be a finite number",
        ),
        (
            ["generate", "m", "--prompt", "a", "--stream"],
            "--stream: without --json the text is printed as it comes; give both, or neither",
        ),
        (
            ["generate", "m", "--prompt", "a", "--temperature", "1e300"],
            "--temperature 1e+300: it should be less than 4294967296",
        ),
        (
            ["serve", "--port", "99999"],
            "Invalid value for '--port': 99999 is not in the range 0<=x<=65535; try 'tightfit serve --help'",
        ),
        (["serve", "--memory", "1KiB"], "--memory 1KiB: no plan is solved in less than 256.0 MiB; give as much"),
        (
            ["run", "p.json", "--data", "random", "--steps", "1", "-o", "o", "--resume", "--overwrite"],
            "--resume goes on from what lies in the folder, --overwrite replaces it: give one of them",
        ),
    ],
)
def test_a_wrong_command_line(tightfit, words, message):
    assert tightfit(*words) == (2, "", f"tightfit: {message}\n")


def test_an_option_that_is_not_there(tightfit):
    """Versions of click write its name with a colon or in quotes."""
    code, out, told = tightfit("plan", "p.json", "--memory", "1GB", "--quickly")
    assert (code, out) == (2, "")
    assert told.startswith("tightfit: No such option")
    assert told.endswith("try 'tightfit plan --help'\n")
    assert "--quickly" in told


@pytest.mark.parametrize("words", ["prompt", "prompt=", "prompt=question,"])
def test_columns_are_named_in_pairs(tightfit, planned, work, words):
    told = tightfit("run", work / "plan.json", "--data", "random", "--steps", 1, "-o", "o", "--columns", words)
    example = "give NAME=COLUMN,..., for example prompt=question,completion=answer"
    assert told == (2, "", f"tightfit: --columns {words.removeprefix('prompt=question,')!r}: {example}\n")


def test_a_wrong_command_line_as_json(tightfit):
    code, out, err = tightfit("plan", "p.json", "--memory", "350M", "--json")
    assert code == 2
    assert json.loads(out) == {
        "error": {"kind": "InputError", "message": f"'350M' is not a size; {FORMS}", "exit_code": 2}
    }
    assert err == f"tightfit: '350M' is not a size; {FORMS}\n"


def test_a_missing_profile(tightfit, tmp_path):
    path = tmp_path / "profile.json"
    message = f"{path}: No such file or directory; make a profile with `tightfit profile MODEL -o {path}`"
    code, out, err = tightfit("plan", path, "--memory", "1GB", "-o", tmp_path / "plan.json")
    assert (code, out, err) == (2, "", f"tightfit: {message}\n")
    code, out, err = tightfit("compare", path, "--memory", "1GB,2GB")
    assert (code, out, err) == (2, "", f"tightfit: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_plan(tightfit, tmp_path):
    path = tmp_path / "plan.json"
    code, out, err = tightfit("run", path, "--data", "random", "--steps", "1", "-o", tmp_path / "out")
    message = f"{path}: no such plan; make one with `tightfit plan profile.json --memory SIZE`"
    assert (code, out, err) == (2, "", f"tightfit: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_written_and_told(tightfit, planned, tmp_path):
    planned(sample_plan())
    path = tmp_path / "plan.json"
    code, out, err = tightfit("plan", "profile.json", "--memory", "350MiB", "-o", path, "--json")
    assert code == 0
    told = json.loads(out)
    assert out.count("\n") == 1
    assert (planned.asked["gap"], planned.asked["time_limit"]) == (0.0, None)
    tightfit("plan", "profile.json", "--memory", "350MiB", "-o", path, "--gap", 0.002)
    assert planned.asked["gap"] == 0.002
    for name, value in {
        "status": "optimal",
        "budget_bytes": 350 * MIB,
        "floor_bytes": 220 * MIB,
        "peak_bytes": 340 * MIB,
        "step_seconds": 1.25,
        "gap": 0.0,
        "any_schedule_gap": 0.2,
        "solve_seconds": 1.5,
        "plan": str(path),
        "decisions": {"streamed": 1, "recomputed": 1, "kept": 1},
    }.items():
        assert told[name] == value, name
    assert told["train"]["peak"]["text"] == "layer 5: aten.mm.default"
    why = told["explanation"]
    assert why["peak"]["bytes"] == 340 * MIB
    assert [use["name"] for use in why["channels"]] == ["compute", "read", "write"]
    beside = {worth["change_bytes"] // MIB: worth for worth in why["neighbours"]}
    assert [beside[change]["price_seconds"] for change in (-50, 50)] == pytest.approx([0.05, -0.05])
    assert [beside[change]["step_seconds"] for change in (-50, 50)] == [None, None]
    assert err.endswith(f"plan written to {path}; next: tightfit run {path} --data FILE.jsonl --steps N -o out\n")
    assert json.loads(path.read_text())["fingerprint"] == "f" * 64


def test_the_next_command_is_one_that_works(tightfit, planned, tmp_path):
    made = sample_plan()
    path = tmp_path / "plan.json"
    words = ("plan", "p.json", "--memory", "350MiB", "-o", path)
    planned(made.model_copy(update={"model": made.model.model_copy(update={"kind": "module"})}))
    assert tightfit(*words)[2].endswith(f"; next: tightfit run {path} --data random --steps N -o out\n")
    for changes in ({"measured": False}, {"kind": "cuda"}):
        planned(made.model_copy(update={"device": made.device.model_copy(update=changes)}))
        assert tightfit(*words)[2].endswith(f"plan written to {path}\n")


def test_paths_are_printed_as_they_are(tightfit, planned, tmp_path):
    planned(sample_plan())
    path = tmp_path / "sp ace é [b]" / "plan[/x]:bug:.json"
    code, _, err = tightfit("plan", "p [i].json", "--memory", "350MiB", "-o", path)
    assert code == 0
    assert f"plan written to {path}; next: tightfit run '{path}' --data" in err
    assert path.exists()


def test_facts_are_printed_as_they_are(capsys):
    printing.answer({}, report_text.facts_table([("adapter", "out [b]/a[/x] :bug:")]), as_json=False)
    assert "out [b]/a[/x] :bug:" in capsys.readouterr().out


def test_what_memory_is_worth_can_be_planned(tightfit, planned, tmp_path):
    planned(sample_plan())
    words = ["plan", "profile.json", "--memory", "350MiB", "-o", tmp_path / "plan.json"]
    code, out, _ = tightfit(*words)
    assert code == 0
    said = " ".join(out.split())
    assert "50.0 MiB more (400.0 MiB): 0.050 s (4.0%) faster, by the model's prices (--what-if plans it)" in said
    code, out, _ = tightfit(*words, "--what-if", "--json")
    assert code == 0
    assert [worth["step_seconds"] for worth in json.loads(out)["explanation"]["neighbours"]] == [1.25, 1.25]


def test_the_optimizer_and_the_largest_norm_are_asked_for_on_the_command_line(tightfit, tmp_path):
    made = tmp_path / "profile.json"
    save_profile(tables(2), made)
    said = ("plan", str(made), "--memory", "1GiB", "-o", str(tmp_path / "plan.json"), "--json")
    code, out, _ = tightfit(*said, "--optimizer", "lion", "--max-grad-norm", "0.5")
    told = json.loads(out)
    assert code == 0
    assert (told["optimizer"], told["max_grad_norm"]) == ("lion", 0.5)
    assert told["explanation"]["clipping"]["sum_bytes"] == 2 * SLICE
    assert load_plan(tmp_path / "plan.json").update is not None
    code, out, _ = tightfit(*said, "--max-grad-norm", "-1")
    assert code == 2
    assert json.loads(out)["error"]["message"] == "--max-grad-norm -1.0: it should be greater than 0"
    assert tightfit(*said, "--optimizer", "adagrad")[0] == 2


def test_an_infeasible_budget(tightfit, planned, tmp_path):
    plan = infeasible_plan("solver", minimum=int(412.34 * MIB))
    planned(plan)
    code, out, err = tightfit("plan", "profile.json", "--memory", "250MiB", "-o", tmp_path / "plan.json", "--json")
    assert code == 3
    told = json.loads(out)
    assert told["status"] == "infeasible"
    assert told["minimum_budget_bytes"] == int(412.34 * MIB)
    assert told["train"] is None
    assert err.startswith(
        "tightfit: no plan fits 250.0 MiB for the whole process, Python and PyTorch included; "
        "the smallest feasible budget is 412.4 MiB (432369827 bytes), 162.4 MiB more; the peak is set in training by"
    )
    why = told["explanation"]["shortfall"]
    assert (why["minimum_budget_bytes"], why["missing_bytes"]) == (432369827, 432369827 - 250 * MIB)
    assert why["peak"]["text"] == "layer 5: aten.mm.default"
    assert list(tmp_path.iterdir()) == []


def test_an_infeasible_budget_for_a_person(tightfit, planned, tmp_path):
    planned(infeasible_plan("solver"))
    code, out, err = tightfit("plan", "profile.json", "--memory", "250MiB", "-o", tmp_path / "plan.json")
    assert (code, out) == (3, "")
    assert "the smallest feasible budget is 412.4 MiB" in err


def test_a_smallest_budget_that_was_lowered_since_is_one_figure(tightfit, planned, tmp_path):
    unknown = {"status": "unknown", "ended_by": "time limit", "minimum_bound_bytes": 240 * MIB, "deterministic": False}
    planned(infeasible_plan("solver").model_copy(update=unknown), smallest=400 * MIB)
    words = ["plan", "profile.json", "--memory", "250MiB", "-o", tmp_path / "plan.json"]
    code, out, err = tightfit(*words, "--json")
    assert code == 3
    assert json.loads(out)["minimum_budget_bytes"] == 400 * MIB
    assert "no plan was found that fits 250.0 MiB" in err
    assert (
        "the smallest feasible budget lies between 240.0 MiB, which is proven, and 400.0 MiB (419430400 bytes), the"
        " smallest found, 150.0 MiB more; a longer --time-limit may find a plan" in err
    )
    assert "412.4" not in out + err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("a: bad"), 2),
        (InfeasibleError("b: too small", 7), 3),
        (RunError("c: died"), 4),
        (CapError("d: passed"), 5),
    ],
)
def test_every_error_has_its_exit_code(tightfit, monkeypatch, error, code):
    from tightfit.profiles import io as profiles_io

    def fail(path):
        raise error

    monkeypatch.setattr(profiles_io, "load_profile", fail)
    assert tightfit("plan", "p.json", "--memory", "1GB") == (code, "", f"tightfit: {error}\n")
    found, out, err = tightfit("plan", "p.json", "--memory", "1GB", "--json")
    told = json.loads(out)["error"]
    assert (found, told["kind"], told["message"], told["exit_code"]) == (code, type(error).__name__, str(error), code)
    assert told.get("minimum_budget_bytes") == (7 if code == 3 else None)
    assert err == f"tightfit: {error}\n"


def test_an_unexpected_error_is_a_line_unless_debugged(tightfit, monkeypatch):
    from tightfit.profiles import io as profiles_io

    def fail(path):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(profiles_io, "load_profile", fail)
    code, out, err = tightfit("plan", "p.json", "--memory", "1GB")
    message = "internal error, ZeroDivisionError: by zero; run again with --debug for its traceback"
    assert (code, out, err) == (4, "", f"tightfit: {message}\n")
    with pytest.raises(ZeroDivisionError):
        main.main(["plan", "p.json", "--memory", "1GB", "--debug"])
    monkeypatch.setenv("TIGHTFIT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main.main(["plan", "p.json", "--memory", "1GB"])


def test_ctrl_c_outside_a_run(tightfit, monkeypatch):
    from tightfit.profiles import io as profiles_io

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(profiles_io, "load_profile", interrupt)
    code, out, err = tightfit("plan", "p.json", "--memory", "1GB")
    assert (code, out, err.strip()) == (4, "", "tightfit: interrupted")


def test_compare_writes_a_page_and_a_picture(tightfit, monkeypatch, tmp_path):
    from tightfit.planner import compare as report_compare
    from tightfit.profiles import io as profiles_io

    class Answer:
        plans = sample_plans()

    asked = {}

    def compare(profile, budgets, policies, **options):
        asked.update(budgets=budgets, policies=policies, devices=[d and d.name for d in options["devices"]])
        asked.update(gap=options["gap"])
        return Answer

    monkeypatch.setattr(profiles_io, "load_profile", lambda path: None)
    monkeypatch.setattr(report_compare, "compare", compare)
    assert tightfit("compare", "p.json", "--memory", "1GB", "--device", "own,tpu9")[0] == 2
    page, picture = tmp_path / "c.html", tmp_path / "c.svg"
    code, out, _ = tightfit(
        "compare", "p.json", "--memory", "250MiB,1GB", "--gap", 0.001, "--html", page, "--picture", picture, "--json"
    )
    assert code == 0
    told = json.loads(out)
    assert [plan["policy"] for plan in told["plans"]] == [plan.policy for plan in sample_plans()]
    assert {(plan["device"], plan["measured"]) for plan in told["plans"]} == {("cpu-test", True)}
    assert [(c["from_budget_bytes"] // MIB, c["to_budget_bytes"] // MIB) for c in told["changes"]] == [
        (250, 350),
        (350, 500),
        (500, 800),
    ]
    assert told["interrupted"] is False
    assert (told["html"], told["picture"]) == (str(page), str(picture))
    assert page.read_text().startswith("<!doctype html>")
    assert picture.exists()
    assert asked == {
        "budgets": [250 * MIB, 10**9],
        "policies": None,
        "devices": [None],
        "gap": 0.001,
    }
    code, out, _ = tightfit("compare", "p.json", "--memory", "250MiB", "--device", "phone,own")
    assert asked["devices"] == ["phone", None]
    assert code == 0
    assert "needs 640.0" in out


def test_a_pipe_has_no_width(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    names = (
        "keep-all",
        "checkpoint-layers",
        "checkpoint-sqrt",
        "mebp",
        "mesp",
        "mezo",
        "lcsb",
        "mobillm",
        "and",
        "others",
    )
    plans = [infeasible_plan(name) for name in names]
    printing.answer({}, answers.comparison_text(plans), as_json=False)
    out = capsys.readouterr().out
    assert next(line.split() for line in out.splitlines() if "  keep-all" in line) == ["budget", *names]
    assert f"250.0 MiB {' needs 412.4' * len(names)}".split() in [line.split() for line in out.splitlines()]
    assert not any(line.endswith(" ") for line in out.splitlines())


@pytest.fixture
def compared(monkeypatch):
    """Let `compare` answer with the sample plans; how often it was asked."""
    from tightfit.planner import compare as report_compare
    from tightfit.profiles import io as profiles_io

    asked = []

    def compare(*words, **options):
        asked.append(words)
        return type("Answer", (), {"plans": sample_plans()})

    monkeypatch.setattr(profiles_io, "load_profile", lambda path: None)
    monkeypatch.setattr(report_compare, "compare", compare)
    return asked


def test_where_files_are_to_go_is_looked_at_before_planning(tightfit, compared, planned, tmp_path):
    words = ("compare", "p.json", "--memory", "1GB")
    picture = tmp_path / "c.gif"
    message = f"tightfit: {picture}: pictures are written as .png or .svg; name such a file\n"
    assert tightfit(*words, "--picture", picture) == (2, "", message)
    assert tightfit(*words, "--html", tmp_path) == (2, "", f"tightfit: {tmp_path}: a directory; name a file\n")
    file = tmp_path / "file"
    file.touch()
    message = f"tightfit: {file}/c.svg: cannot be written ({file} is no folder that takes files); name another place\n"
    assert tightfit(*words, "--picture", file / "c.svg") == (2, "", message)
    assert compared == []
    for command in (("plan", "p.json", "--memory", "1GB"), ("profile", "./nowhere")):
        assert tightfit(*command, "-o", tmp_path) == (2, "", f"tightfit: {tmp_path}: a directory; name a file\n")


def test_the_answer_is_told_where_files_cannot_be_written(tightfit, compared, planned, monkeypatch, tmp_path):
    from tightfit.planner import io as planner_io
    from tightfit.runtime.common import files as common_files

    def full(path, content):
        raise RunError(f"{path}: the disk is full")

    monkeypatch.setattr(common_files, "write_whole", full)
    monkeypatch.setattr(planner_io, "write_whole", full)
    page, path = tmp_path / "c.html", tmp_path / "plan.json"
    code, out, err = tightfit("compare", "p.json", "--memory", "1GB", "--html", page)
    assert (code, err) == (4, f"tightfit: {page}: the disk is full\n")
    assert "needs 640.0" in out
    code, out, err = tightfit("compare", "p.json", "--memory", "1GB", "--html", page, "--json")
    assert (code, err) == (4, f"tightfit: {page}: the disk is full\n")
    told = json.loads(out)
    assert len(told["plans"]) == len(sample_plans())
    assert told["error"] == {"kind": "RunError", "message": f"{page}: the disk is full", "exit_code": 4}
    planned(sample_plan())
    code, out, err = tightfit("plan", "p.json", "--memory", "350MiB", "-o", path)
    assert (code, err) == (4, f"tightfit: {path}: the disk is full\n")
    assert "one step takes 1.250 s by the model" in out


def test_ctrl_c_after_planning_costs_no_plan(tightfit, compared, monkeypatch, tmp_path):
    """What changes between plans takes longer than all else: who does not ask for it does not wait for it."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(answers, "changes", interrupted)
    code, out, _ = tightfit("compare", "p.json", "--memory", "1GB")
    assert (code, "needs 640.0" in out) == (0, True)
    monkeypatch.setattr("tightfit.planner.report.html.comparison_page", interrupted)
    page = tmp_path / "c.html"
    code, out, err = tightfit("compare", "p.json", "--memory", "1GB", "--html", page)
    assert (code, "needs 640.0" in out, err) == (4, True, "tightfit: interrupted\n")
    code, out, err = tightfit("compare", "p.json", "--memory", "1GB", "--html", page, "--json")
    told = json.loads(out)
    assert (code, len(told["plans"]), err) == (4, len(sample_plans()), "tightfit: interrupted\n")
    assert told["error"] == {"kind": "Abort", "message": "interrupted", "exit_code": 4}
    assert not page.exists()


def test_json_has_no_numbers_that_are_none():
    assert to_json({"a": [float("inf"), float("nan"), 1.5], "b": Path("x")}) == '{"a": [null, null, 1.5], "b": "x"}'


def run_process(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "tightfit.runtime.cli.main", *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        cwd=ROOT,
    )


def test_help_is_fast_because_it_imports_nothing_heavy():
    code = "import sys, tightfit.runtime.cli.main; print([m for m in ('torch', 'ortools', 'numpy', 'matplotlib', 'fastapi') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_known_devices(tightfit):
    code, out, err = tightfit("devices", "--json")
    assert (code, err) == (0, "")
    assert "raspberry-pi-5" in [device["name"] for device in json.loads(out)["devices"]]
    assert "rtx-4090" in tightfit("devices")[1]
    shown = " ".join(tightfit("devices", "h100")[1].split())
    assert "690,000 GFLOP/s" in shown
    assert "data sheet: NVIDIA H100" in shown
    code, out, err = tightfit("devices", "abacus")
    assert (code, out) == (2, "")
    assert "one of amx-2core, h100," in err


def test_ctrl_c_while_solving_gives_the_best_plan(tightfit, planned, monkeypatch, tmp_path):
    import signal

    from tightfit.planner import plan as planner_plan

    planned(sample_plan(status="feasible", gap=0.03))
    fake = planner_plan.planner_of
    whole = fake.plan

    def interrupted(self, budget, **options):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return whole(self, budget, **options)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(fake, "plan", interrupted)
    words = ["plan", "profile.json", "--memory", "350MiB", "-o", tmp_path / "plan.json"]
    code, out, err = tightfit(*words, "--json")
    assert code == 0
    assert json.loads(out)["interrupted"] is True
    assert json.loads(out)["explanation"]["neighbours"] == []
    assert "interrupted: this is the best plan found so far, at most 3.00% from the best of its kind" in err
    assert (tmp_path / "plan.json").exists()
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("status", ["feasible", "infeasible"])
def test_ctrl_c_after_the_answer_keeps_it(tightfit, planned, monkeypatch, tmp_path, status):
    from tightfit.planner.report import marginal_value

    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)

    planned(sample_plan(status="feasible") if status == "feasible" else infeasible_plan("solver"))
    monkeypatch.setattr(marginal_value, "neighbours", interrupted)
    monkeypatch.setattr(marginal_value, "shortfall", interrupted)
    code, out, _ = tightfit("plan", "profile.json", "--memory", "350MiB", "-o", tmp_path / "plan.json", "--json")
    told = json.loads(out)
    assert (code, told["status"], told["interrupted"]) == (0 if status == "feasible" else 3, status, True)
    assert (tmp_path / "plan.json").exists() == (status == "feasible")


@pytest.mark.parametrize("command", ["", "train"])
def test_help(command):
    done = run_process(*filter(None, [command]), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: tightfit {command}".rstrip())


def test_help_is_the_same_with_the_typer_that_flower_asks_for():
    """It escaped brackets for rich, and with click 8.5 left out what arguments are."""
    import typer

    def helps(command, name, parent=None):
        context = typer.Context(command, info_name=name, parent=parent)
        yield command.get_help(context)
        for word, other in getattr(command, "commands", {}).items():
            yield from helps(other, word, context)

    told = list(helps(typer.main.get_command(main.app), "tightfit"))
    assert len(told) > 15
    assert not [text for text in told if "\\[" in text]
    assert sum("Where `tightfit fleet plan` put the" in " ".join(text.split()) for text in told) == 4
    assert sum("[default: " in text for text in told) > 5


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_no_exit_code(closed):
    command = shlex.join([sys.executable, "-m", "tightfit.runtime.cli.main", "devices", "tpu9", "--json"])
    done = subprocess.run(["sh", "-c", f"{command} {closed}"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert bool(done.stdout) == (closed == "2>&-")


def test_an_interruption_before_the_command_is_one(monkeypatch, capsys):
    """While Typer builds its commands nothing of it catches Ctrl-C."""

    def starting(**_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(main, "app", starting)
    with pytest.raises(SystemExit) as ended:
        main.main(["plan"])
    assert ended.value.code == 4
    assert capsys.readouterr().err == "tightfit: interrupted\n"


def test_an_interruption_that_c_code_turns_into_an_error_is_one(monkeypatch, capsys):
    """PyTorch, asked for a tensor of a sequence, tells of a shape that it could not determine."""

    def swallowed(**_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(main, "app", swallowed)
    with pytest.raises(SystemExit) as ended:
        main.main(["plan"])
    assert ended.value.code == 4
    assert capsys.readouterr().err == "tightfit: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before
