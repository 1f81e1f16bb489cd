"""A profile in figures."""

from __future__ import annotations

import json

import pytest
from damage import CONFIG
from sample_plans import sample_plan

from tightfit.planner.report.summary import plan_summary, profile_summary
from tightfit.profiles.api import profile


@pytest.mark.parametrize("tied", [True, False])
def test_no_weight_is_counted_twice(tmp_path, tied):
    """The head is read slice by slice, and by the rows of the labels as a whole."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | {"tie_word_embeddings": tied}))
    made = profile(str(path), seq=16, device="zen4-2core")
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    whole = [t for t in made.tensors if t.kind == "weight" and "[" not in t.name]
    slices = [t for t in made.tensors if t.name.startswith(f"{head}[")]
    assert slices
    assert head in {t.name for t in whole}
    told = profile_summary(made)
    assert told["weight_bytes"] == sum(t.bytes for t in whole)
    assert told["packed_bytes"] == sum(t.packed_bytes for t in whole)


@pytest.mark.parametrize("deterministic", [True, False, None])
def test_a_plan_says_whether_another_run_may_find_another(deterministic):
    assert plan_summary(sample_plan(deterministic=deterministic))["deterministic"] is deterministic
