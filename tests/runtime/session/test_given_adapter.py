"""Runs that start from an adapter: its values, zero states, what is refused, and resuming."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_plans import decoder_profile, naive_plan

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.results.evaluation import evaluate
from tightfit.runtime.session.given_adapter import given_adapter
from tightfit.runtime.session.launch import run

SETTINGS = {"lr": 1e-2, "seed": 5, "cgroup": False}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    profile = decoder_profile(tmp_path_factory.mktemp("store"))
    states = [t.name for t in profile.tensors if t.kind == "trainable"][::3]
    return naive_plan(profile, offload=states)


@pytest.fixture(scope="module")
def first(plan, tmp_path_factory):
    """A run's folder, after three steps."""
    out = tmp_path_factory.mktemp("first")
    run(plan, "random", steps=3, out=out, **SETTINGS)
    return out


def changed(adapter, folder, change):
    """A copy of an adapter, its tensors changed."""
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def test_training_starts_at_the_given_values(plan, first, tmp_path):
    run(plan, "random", steps=1, out=tmp_path / "out", adapter=first / "adapter", **(SETTINGS | {"lr": 0.0}))
    before, after = (load_file(folder / "adapter" / WEIGHTS) for folder in (first, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name])


def test_the_states_start_at_zero(plan, first, tmp_path):
    """Adam's first update has the size of the learning rate wherever there is a gradient, unless it has a past."""
    run(plan, "random", steps=1, out=tmp_path / "out", adapter=first / "adapter", **(SETTINGS | {"lr": 1e-3}))
    before, after = (load_file(folder / "adapter" / WEIGHTS) for folder in (first, tmp_path / "out"))
    moved = np.concatenate([np.abs(after[name] - before[name]).ravel() for name in before])
    assert moved.max() == pytest.approx(1e-3, rel=1e-2)
    assert np.median(moved) == pytest.approx(1e-3, rel=5e-2)


@pytest.mark.slow
def test_a_resumed_run_is_one_run_and_wants_the_same_adapter(plan, first, tmp_path):
    given = first / "adapter"
    run(plan, "random", steps=4, out=tmp_path / "whole", adapter=given, **SETTINGS)
    run(plan, "random", steps=2, out=tmp_path / "parts", adapter=given, **SETTINGS)
    other = changed(given, tmp_path / "other", lambda tensors: next(iter(tensors.values())).fill(0.5))
    with pytest.raises(InputError, match="was made from another adapter; resume with the same"):
        run(plan, "random", steps=4, out=tmp_path / "parts", adapter=other, resume=True, **SETTINGS)
    with pytest.raises(InputError, match="was made from a given adapter; resume with the same"):
        run(plan, "random", steps=4, out=tmp_path / "parts", resume=True, **SETTINGS)
    with pytest.raises(InputError, match="was made from no adapter; resume with the same"):
        run(plan, "random", steps=4, out=first, adapter=given, resume=True, **SETTINGS)
    run(plan, "random", steps=4, out=tmp_path / "parts", adapter=given, resume=True, **SETTINGS)
    whole, parts = ((tmp_path / name / "adapter" / WEIGHTS).read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_without_an_adapter_nothing_has_changed(plan, first):
    assert run(plan, "random", steps=3, out=first, resume=True, **SETTINGS)["resumed_step"] == 0


def _missing(tensors):
    del tensors[min(tensors)]


def _extra(tensors):
    tensors["base_model.model.other.lora_A.weight"] = np.zeros((1, 1), np.float32)


def _shape(tensors):
    tensors[min(tensors)] = np.zeros((3, 5), np.float32)


def _half(tensors):
    tensors[min(tensors)] = tensors[min(tensors)].astype(np.float16)


def _infinite(tensors):
    tensors[max(tensors)][0, 0] = np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_missing, r"no tensor base_model\..*, which the plan trains"),
        (_extra, r"holds base_model\.model\.other\.lora_A\.weight, which the plan does not train"),
        (_shape, r"is F32 \[3, 5\] and the plan trains F32 \[\d+, \d+\]; give an adapter of the same rank"),
        (_half, r"is F16 \[\d+, \d+\] and the plan trains F32"),
        (_infinite, r"lora_B\.weight holds values that are no finite numbers"),
    ],
)
def test_another_adapter_is_refused(plan, first, tmp_path, change, message):
    folder = changed(first / "adapter", tmp_path / "changed", change)
    with pytest.raises(InputError, match=message):
        given_adapter(plan, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', a start that changes the base's weights"),
        ({"bias": "all"}, "bias is 'all', which tightfit does not have"),
        (
            {"lora_alpha": 5},
            r"the scale of the pair of model\.layers\.0\.\S+ is 1\.25 and the plan's is 2; profile with",
        ),
        ({"rank_pattern": {"v_proj": 2}}, r"the scale of the pair of model\.layers\.0\.self_attn\.v_proj is 4"),
        ({"use_rslora": True}, "the scale of the pair of .* is 4 and the plan's is 2"),
        ({"use_dora": True}, "the use_dora of the pair of .* is 1 and the plan's is 0"),
    ],
)
def test_an_adapter_with_other_settings_is_refused(plan, first, tmp_path, change, message):
    """In runs and evaluations alike, though its tensors are those of the plan."""
    folder = changed(first / "adapter", tmp_path / "changed", lambda tensors: None)
    told = json.loads((folder / "adapter_config.json").read_text())
    given_adapter(plan, folder)
    (folder / "adapter_config.json").write_text(json.dumps(told | change))
    with pytest.raises(InputError, match=message):
        given_adapter(plan, folder)
    with pytest.raises(InputError, match=message):
        run(plan, "random", steps=1, out=tmp_path / "out", adapter=folder, **SETTINGS)
    with pytest.raises(InputError, match=message):
        evaluate(plan, "random", adapter=folder)


@pytest.mark.parametrize("kept", [0, 4, 7, 100, -1])
def test_a_damaged_file_is_refused(plan, first, tmp_path, kept):
    content = (first / "adapter" / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:kept])
    with pytest.raises(InputError, match="damaged"):
        given_adapter(plan, tmp_path)


def test_a_folder_without_an_adapter_is_refused(plan, tmp_path):
    with pytest.raises(InputError, match=r"No such file or directory; give the folder of an adapter"):
        run(plan, "random", steps=1, out=tmp_path / "out", adapter=tmp_path, **SETTINGS)


def test_a_plan_that_trains_no_adapter_is_refused(plan, tmp_path):
    whole = plan.model_copy(update={"model": plan.model.model_copy(update={"lora": None})})
    with pytest.raises(InputError, match="trains tiny itself and no adapter of it"):
        given_adapter(whole, tmp_path)
