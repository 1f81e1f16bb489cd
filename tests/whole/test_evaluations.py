"""Evaluations between the steps of a run, as a person asks for them."""

from __future__ import annotations

import json


def test_a_run_that_evaluates_between_its_steps_keeps_its_word(tightfit, work, tmp_path):
    """What it holds is predicted, it ends when nothing gets better, and it says so when it is asked to go on."""
    out = tmp_path / "out"
    words = [
        "run",
        work / "plan.json",
        "--data",
        work / "data.jsonl",
        "--eval",
        work / "data.jsonl",
        "-o",
        out,
        "--lr",
        0,
    ]
    words += ["--epochs", 100, "--eval-every", 2, "--keep-best", "--early-stopping", 3]
    code, printed, said = tightfit(*map(str, words), "--json")
    assert code == 0, said
    report = json.loads(printed)
    assert report["peak_bytes"]["measured"] <= report["peak_bytes"]["predicted"]
    # Without a learning rate the first is the best for ever.
    assert (report["best"]["step"], report["stopped_early"]) == (2, 8)
    assert [one["step"] for one in report["evaluations"]] == [0, 2, 4, 6, 8]
    assert len(report["loss"]) == 8
    assert (out / "best" / "adapter_model.safetensors").exists()
    told = [line for line in said.splitlines() if line.startswith("evaluated after step")]
    best = f"loss {report['best']['loss']:.4f}"
    assert told == [
        f"evaluated after step 2: {best}, the best so far",
        f"evaluated after step 4: {best}",
        f"evaluated after step 6: {best}",
        f"evaluated after step 8: {best}; the run ends, since none was better for as long as it was to wait",
    ]
    code, printed, said = tightfit(*map(str, words), "--resume", "--json")
    assert (code, json.loads(printed)) == (0, report)
    assert said.endswith(
        f"already done: {out} ended early after step 8, since 3 evaluations in a row were no better than that after step 2;"
        " give a larger --early-stopping, or none, to go on\n"
    )
