"""A plan in three sentences of plain English."""

from __future__ import annotations

import re

from bare_graphs import graph_of
from sample_plans import infeasible_plan, sample_plan
from synthetic import decoder_like, small_chain

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import plan as solve
from tightfit.planner.report.explanation import Remedy, explanation_of
from tightfit.planner.report.plain_words import plain_words
from tightfit.runtime.common.units import MIB


def test_three_sentences_without_a_word_of_the_command_line():
    sentences = plain_words(solve(decoder_like(2), 1 << 40, policy="mebp"))
    assert len(sentences) == 3
    assert all(sentence.endswith(".") for sentence in sentences)
    assert not re.search(r"--|what_if|instruction \d|class", " ".join(sentences))
    tensors, limits, nearness = sentences
    assert re.match(
        r"The frozen weights \([\d.]+ MiB, [\d.]+ MiB packed\) are read from disk for each use; the activations",
        tensors,
    )
    assert "computed again" in tensors
    assert re.search(r"of the [\d.]+ s of a step by the model, [\d.]+% into computing again what was given up", limits)
    assert nearness.startswith("It follows a fixed rule, mebp: searching could save at most ")


def test_shares_of_one_sort_are_told_largest_first():
    plan = sample_plan(decisions={"a/x": "kept"})
    assert plain_words(plan)[0] == "The activations (0 B) stay in memory until the backward needs them."


def test_what_is_proven_is_said():
    assert plain_words(sample_plan())[2] == (
        "It is proven to be the fastest plan of its kind in this memory; no schedule whatever could save more than 20.00% of its time."
    )
    assert plain_words(sample_plan(status="feasible", gap=0.0312))[2].startswith(
        "A faster plan of its kind could save at most 3.12% of its time, which is proven"
    )


def test_time_that_is_not_lost_is_not_told():
    lost = sample_plan()
    free = lost.model_copy(
        update={
            "train": lost.train.model_copy(update={"recompute_seconds": 0, "unpack_seconds": 0, "stall_seconds": 0})
        }
    )
    assert plain_words(lost)[1].endswith(": that is what little memory costs.")
    assert plain_words(free)[1].endswith("; no time is lost to the lack of memory.")


def test_what_does_not_fit():
    assert plain_words(infeasible_plan("keep-all", 250 * MIB, 300 * MIB)) == [
        "The rule keep-all does not fit 250.0 MiB: the smallest budget that is enough is 300.0 MiB, 50.0 MiB more."
    ]


def test_what_is_in_the_way_and_what_would_help():
    planner = ModelPlanner(small_chain(5, layers=2))
    plan = planner.plan(20_000, time_limit=20)
    explanation = explanation_of(planner, plan, time_limit=20)
    missing, filled, *others = plain_words(plan, explanation)
    assert missing.startswith("It does not fit 19.5 KiB: the smallest budget that is enough")
    assert filled.startswith("Even then memory is full at ")
    assert others == []  # a batch of one and no adapter: nothing can be halved
    shortfall = explanation.shortfall.model_copy(
        update={"remedies": [Remedy(change="a batch of 4 instead of 8", saves_bytes=MIB)]}
    )
    helped = plain_words(plan, explanation.model_copy(update={"shortfall": shortfall}))
    assert helped[2] == "What would lower it: a batch of 4 instead of 8 (up to 1.0 MiB)."


def test_a_bare_graph_has_outputs_and_no_backward():
    operators = [
        {"name": name, "seconds": 1, "output_bytes": 10, "inputs": inputs}
        for name, inputs in (("a", []), ("b", ["a"]), ("c", ["a", "b"]))
    ]
    first = plain_words(solve(graph_of(operators), 1000, policy="keep-all"))[0]
    assert "backward" not in first
    assert "activations" not in first
