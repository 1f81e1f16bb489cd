"""A profile in figures."""

from __future__ import annotations

import json

import pytest
import torch
from damage import CONFIG
from decoder_families import FAMILIES, LONG, SHORT
from rich.console import Console
from sample_plans import sample_plan

from tightfit.planner.report.summary import plan_summary, profile_summary
from tightfit.profiles.api import profile
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.models.transformers_decoder import AnyDecoder
from tightfit.runtime.cli import answers


@pytest.mark.slow_but_for("False")
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


def test_decisions_are_counted():
    plan = sample_plan(decisions={"a": "kept", "b": "streamed", "c": "kept"})
    assert plan_summary(plan)["decisions"] == {"kept": 2, "streamed": 1}


PUBLISHED = {name: value for name, value in FAMILIES["Phi-4-mini"].items() if name != "rope_parameters"} | {
    "original_max_position_embeddings": 9,
    "rope_scaling": {"type": "longrope", "short_factor": SHORT[:6], "long_factor": LONG[:6]},
    "partial_rotary_factor": 0.75,
}
"""as the config.json of Phi-4-mini has it"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (PUBLISHED, True),
        (FAMILIES["Llama, longrope scaling, long"], True),
        (FAMILIES["Llama, yarn scaling"], False),
    ],
    ids=["published", "llama", "yarn"],
)
def test_it_is_said_where_short_samples_get_the_factors_of_long_ones(config, said, tmp_path, capsys):
    """Where `transformers_decoder` fixes them, and nowhere else."""
    path = tmp_path / "config.json"
    config = json.loads(json.dumps(config))
    for place in (config, config.get("rope_parameters", {})):
        place.update({name: 9 for name in place if name == "original_max_position_embeddings"})
    path.write_text(json.dumps(config))
    for seq in (9, 16):
        made = profile(str(path), seq=seq, device="zen4-2core")
        decoder = AnyDecoder(made.model.config, dtype=torch.float32, seq=seq, lora=LoraConfig())
        fixed = [part for part in decoder.modules() if "inv_freq" in vars(type(part))]
        assert bool(fixed) == bool(profile_summary(made)["positions"]) == (said and seq > 9)
        Console(width=500).print(answers.profile_text(made))
        told = " ".join([capsys.readouterr().out, answers.profile_sentence(made)])
        assert told.count("profile with seq=9") == 2 * (said and seq > 9)
