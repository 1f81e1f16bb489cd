"""What a run says where samples were to share rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_plans import decoder_profile, naive_plan

from tightfit.runtime.session.options import DataOptions
from tightfit.runtime.session.settings import packing_note


def test_a_model_that_cannot_pack_says_that_each_sample_is_padded(tmp_path: Path) -> None:
    made = decoder_profile(tmp_path)
    why = "its code takes no positions"
    plan = naive_plan(made.model_copy(update={"model": made.model.model_copy(update={"rows_apart": why})}))
    settings = {"data": "train.records", "packing": False}
    told = {"on": False, "refused": why}
    assert packing_note(plan, settings, DataOptions()) == told
    with pytest.warns(UserWarning, match=f"cannot share rows, since {why}; each is padded to {plan.seq} tokens"):
        assert packing_note(plan, settings, DataOptions(packing=True)) == told
