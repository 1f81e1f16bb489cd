"""Bad input through the command line: the exit code, what the message tells, and that nothing is lost or left
behind.
"""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest
from damage import CONFIG, ROWS, cut, files, flip, lines
from tiny_models import byte_level_tokenizer, random_weights, write_directory, write_gguf

from tightfit.planner.io import load_plan, save_plan
from tightfit.planner.plan_result import sealed
from tightfit.profiles import api
from tightfit.profiles.api import load_profile
from tightfit.profiles.measuring.measure import measure
from tightfit.profiles.schema import PROFILE_VERSION, Operand, Operator, Program, Value
from tightfit.profiles.sources.lookup import resolve
from tightfit.profiles.weights.store_file import build_store
from tightfit.profiles.worker_process import run_worker
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.interpreter import command
from tightfit.runtime.data.samples import FORMS
from tightfit.runtime.engine.weights.store import WeightStore


@pytest.fixture(autouse=True)
def cached(cache):
    """Nothing goes into the cache of the person who runs the tests."""


@pytest.fixture
def with_store(planned, tmp_path):
    """(a copy of the weight store, a plan that reads it), free to be damaged."""
    store, path = tmp_path / "w.store", tmp_path / "copy.json"
    shutil.copy(planned.model.store, store)
    model = planned.model.model_copy(update={"store": str(store)})
    save_plan(sealed(planned.model_copy(update={"model": model})), path)
    return store, path


# --- files that are missing, cut off or damaged --------------------------------------------------------------------


def test_a_missing_weight_store(refused, with_store, tmp_path):
    store, plan = with_store
    store.unlink()
    said = refused(2, "run", plan, "--data", "random", "--steps", 1, "-o", tmp_path / "out")
    assert said == f"{store}: No such file or directory; profile the model again to rebuild the weight store"
    assert not (tmp_path / "out").exists()


def test_a_truncated_weight_store(refused, with_store, tmp_path):
    store, plan = with_store
    size = store.stat().st_size
    for kept, told in (
        (size - 4096, "truncated, tensor "),
        (100, "the header is truncated"),
        (3, "not a weight store"),
    ):
        cut(store, kept)
        said = refused(2, "run", plan, "--data", "random", "--steps", 1, "-o", tmp_path / "out")
        assert said.startswith(f"{store}: {told}")
        assert "profile the model again" in said
        assert not (tmp_path / "out").exists()


def test_a_bit_flipped_weight_store(refused, tightfit, with_store, tmp_path):
    store, plan = with_store
    out = tmp_path / "out"
    flip(store, 60)
    said = refused(2, "run", plan, "--data", "random", "--steps", 1, "-o", out)
    assert said.startswith(f"{store}: the header is truncated or damaged (checksum differs)")
    flip(store, 60)
    with WeightStore.open(store) as opened:
        entry = opened.entries["model.layers.0.mlp.up_proj.weight"]
    flip(store, entry.offset + 77, bit=3)
    said = refused(2, "run", plan, "--data", "random", "--steps", 1, "-o", out)
    repair = "delete the file and profile the model again"
    assert said == f"{store}: tensor {entry.name!r} is damaged (checksum differs); {repair}"
    assert [name for name in files(out) if not name.startswith("data/")] == []
    flip(store, entry.offset + 77, bit=3)
    # What was refused is no earlier run that would have to be overwritten.
    assert tightfit("run", plan, "--data", "random", "--steps", 1, "-o", out)[0] == 0


def test_a_store_that_holds_another_models_weights(refused, with_store, tmp_path):
    store, plan = with_store
    write_directory(tmp_path / "other", CONFIG, random_weights(CONFIG, seed=1))
    made = build_store(resolve(str(tmp_path / "other")), tmp_path / "stores")
    shutil.copy(made, store)
    said = refused(2, "run", plan, "--data", "random", "--steps", 1, "-o", tmp_path / "out")
    assert said.startswith(f"{store} holds other weights than the plan was made for (fingerprint ")
    assert said.endswith("; profile and plan again")
    assert not (tmp_path / "out").exists()


def test_a_truncated_or_damaged_profile(refused, work, tmp_path):
    path = tmp_path / "profile.json"
    shutil.copy(work / "profile.json", path)
    flip(path, path.stat().st_size // 2, bit=7)
    said = refused(2, "plan", path, "--memory", "1GiB", "-o", tmp_path / "plan.json")
    assert said.startswith(f"{path}: not a profile (byte ")
    flip(path, path.stat().st_size // 2, bit=7)
    cut(path, path.stat().st_size - 30)
    said = refused(2, "plan", path, "--memory", "1GiB", "-o", tmp_path / "plan.json")
    assert said.startswith(f"{path}: not JSON, perhaps truncated (")
    assert said.endswith("; make it again with `tightfit profile`")
    text = (work / "profile.json").read_text()
    at = text.index('"bytes_per_second": ') + len('"bytes_per_second": ') + 1
    path.write_text(text)
    flip(path, at)  # the second digit: still JSON, still a profile, another disk
    said = refused(2, "plan", path, "--memory", "1GiB", "-o", tmp_path / "plan.json")
    assert said.startswith(f"{path}: its content does not match its checksum ")
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]


def test_a_profile_of_an_older_version(refused, work, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text((work / "profile.json").read_text().replace(f'"version": {PROFILE_VERSION}', '"version": 1', 1))
    said = refused(2, "plan", path, "--memory", "1GiB", "-o", tmp_path / "plan.json")
    older = f"written by an older version of tightfit (profile version 1, this one reads version {PROFILE_VERSION})"
    assert said == f"{path}: {older}; make it again with `tightfit profile`"


def test_the_cache_has_no_profile_of_an_older_version(work, monkeypatch):
    key = api._fingerprint(resolve(str(work / "model")))
    monkeypatch.setattr(api, "PROFILE_VERSION", PROFILE_VERSION - 1)
    assert api._fingerprint(resolve(str(work / "model"))) != key


def test_a_truncated_or_damaged_plan(refused, work, tmp_path):
    path, out = tmp_path / "plan.json", tmp_path / "out"
    run = ("run", path, "--data", "random", "--steps", 1, "-o", out)
    data = (work / "plan.json").read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert refused(2, *run).startswith(f"{path}: not whole JSON (")
    path.write_bytes(b"")
    assert refused(2, *run).endswith("perhaps cut off or damaged; make it again with `tightfit plan`")
    whole = load_plan(work / "plan.json")
    at = data.index(b'"arena_bytes":') + len(b'"arena_bytes":')
    changed = []
    for offset in [at, *random.Random(0).sample(range(len(data)), 300)]:
        path.write_bytes(data)
        flip(path, offset)
        try:  # how long it took to make is no part of a plan's fingerprint, and a float may have a digit more than it needs
            assert load_plan(path).model_copy(update={"solve_seconds": whole.solve_seconds}) == whole
        except InputError as error:
            assert str(error).startswith(f"{path}: ")
            assert "make it again with `tightfit plan`" in str(error)
            changed.append(offset)
    assert changed[0] == at
    assert len(changed) > 280
    for offset in changed[:8]:
        path.write_bytes(data)
        flip(path, offset)
        said = refused(2, *run)
        assert said.startswith(f"{path}: ")
        assert "make it again with `tightfit plan`" in said
    path.write_bytes(data)
    flip(path, at)
    assert f"{path}: its content does not match its fingerprint " in refused(2, *run)
    assert not out.exists()


def test_a_profile_where_a_plan_is_due_and_the_reverse(refused, work, tmp_path):
    said = refused(2, "run", work / "profile.json", "--data", "random", "--steps", 1, "-o", tmp_path / "out")
    assert said == f"{work / 'profile.json'}: a profile, not a plan; make it again with `tightfit plan`"
    said = refused(2, "plan", work / "plan.json", "--memory", "1GiB", "-o", tmp_path / "plan.json")
    assert said == f"{work / 'plan.json'}: a plan, not a profile; make one with `tightfit profile`"
    assert list(tmp_path.iterdir()) == []


def test_bad_data_names_every_line(refused, tightfit, work, tmp_path):
    data, out = tmp_path / "d.jsonl", tmp_path / "out"
    run = ("run", work / "plan.json", "--data", data, "--steps", 1, "-o", out)
    assert refused(2, *run).startswith(
        f"{data}: no such file; data are a .jsonl or .jsonl.gz file, a table (.csv, .tsv, .parquet, .arrow), a directory of"
        " such files or of the library datasets"
    )
    long = {"prompt": "over", "completion": "1234567890" * 4}
    broken = [b"[1, 2]", b'"text"', b"7", b"null", b'{"prompt": "cut o', b'{"text": "\xff"}', b'{"txt": "a"}']
    data.write_bytes(b"\n".join([lines(ROWS).encode().strip(), *broken, json.dumps(long).encode()]) + b"\n")
    told = refused(2, *run).splitlines()
    assert told[0] == "8 bad lines of 11 in the data:"
    assert told[1] == f"{data}:4: a JSON list where an object is due; write {FORMS}"
    for number, words in enumerate(
        [
            "a JSON list",
            "a JSON string",
            "a JSON number",
            "",
            "not JSON (",
            "not UTF-8 (byte 10",
            "unknown keys (txt)",
        ]
    ):
        assert told[number + 1].startswith(f"{data}:{number + 4}: {words}")
    assert told[8].startswith(f"{data}:11: ")
    data.write_text(" \n")
    assert refused(2, *run) == f"{data}: no samples; the data are empty"
    assert files(out) == {}
    data.write_text(lines(ROWS))
    assert tightfit(*run)[0] == 0


def test_an_earlier_run_stays_as_it_is(refused, tightfit, work, tmp_path):
    out = tmp_path / "out"
    assert tightfit("run", work / "plan.json", "--data", "random", "--steps", 1, "-o", out)[0] == 0
    before = files(out)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("[]\n")
    for data in ("random", bad):
        said = refused(2, "run", work / "plan.json", "--data", data, "--steps", 2, "-o", out)
        assert "holds an earlier run" in said
        assert "--resume" in said
        assert "--overwrite" in said
    assert refused(2, "run", work / "plan.json", "--data", bad, "--steps", 2, "-o", out, "--resume").startswith(
        "1 bad line of 1"
    )
    assert refused(2, "run", work / "plan.json", "--data", bad, "--steps", 2, "-o", out, "--overwrite").startswith(
        "1 bad line of 1"
    )
    assert files(out) == before
    flip(out / "checkpoint-1" / "optimizer.safetensors", -9)
    said = refused(2, "run", work / "plan.json", "--data", "random", "--steps", 2, "-o", out, "--resume")
    assert str(out / "checkpoint-1" / "optimizer.safetensors") in said
    assert "damaged" in said


# --- models --------------------------------------------------------------------------------------------------------


def test_truncated_model_files(refused, cache, tmp_path):
    weights = random_weights(CONFIG)
    gguf = write_gguf(tmp_path / "m.gguf", CONFIG, weights, tokenizer=byte_level_tokenizer())
    tensors = write_directory(tmp_path / "m", CONFIG, weights) / "model.safetensors"
    before = set(cache.rglob("*"))
    for path, model, kind in ((gguf, gguf, "GGUF"), (tensors, tensors.parent, "safetensors")):
        size = path.stat().st_size
        for kept in (size - 5000, 200, 5):
            cut(path, kept)
            said = refused(2, "profile", model, "-o", tmp_path / "p.json")
            assert said.startswith(f"{path}: not a readable {kind} file (")
            assert said.endswith("it is truncated or damaged, download it again")
    assert set(cache.rglob("*")) == before
    assert not (tmp_path / "p.json").exists()


def without(key):
    return {name: value for name, value in CONFIG.items() if name != key}


MODELS = {
    "unknown architecture": ({**CONFIG, "model_type": "mamba"}, "model_type 'mamba' is not supported; supported: gemma3_text, llama, "),
    "no hidden_size": (without("hidden_size"), "config field 'hidden_size' must be a positive whole number, not None"),
    "no vocab_size": (without("vocab_size"), "config field 'vocab_size' must be a positive whole number, not None"),
    "negative layers": ({**CONFIG, "num_hidden_layers": -2}, "config field 'num_hidden_layers' must be a positive whole number, not -2"),
    "a trillion wide": ({**CONFIG, "hidden_size": 10**12}, "config field 'hidden_size' is 1000000000000; at most 131072 is supported, check the config.json"),
    "no model_type": (without("model_type"), "not a model config (no 'model_type')"),
    "a list": ([1], "not a model config"),
    "local base in words": (
        {**CONFIG, "model_type": "gemma3_text", "rope_local_base_freq": "x"},
        "config field 'rope_local_base_freq' must be a positive number, not 'x'",
    ),
    "window in words": (
        {**CONFIG, "model_type": "mistral", "sliding_window": "x"},
        "config field 'sliding_window' must be a positive whole number, not 'x'",
    ),
    "every x layers": (
        {**CONFIG, "model_type": "gemma3_text", "sliding_window_pattern": "x"},
        "config field 'sliding_window_pattern' must be a positive whole number, not 'x'",
    ),
    "windows in words": (
        {**CONFIG, "layer_types": 5},
        "config field 'layer_types' must be a list of full_attention and sliding_attention, not 5",
    ),
    "attention of another kind": (
        {**CONFIG, "layer_types": ["chunked_attention"]},
        "config field 'layer_types' must be a list of full_attention and sliding_attention, not ['chunked_attention']",
    ),
    "windows from layer x on": (
        {**CONFIG, "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "x"},
        "config field 'max_window_layers' must be a whole number, not 'x'",
    ),
    "heads in words": (
        {**CONFIG, "num_key_value_heads": "2"},
        "config field 'num_key_value_heads' must be a positive whole number, not '2'",
    ),
    "a true number": (
        {**CONFIG, "num_hidden_layers": True},
        "config field 'num_hidden_layers' must be a positive whole number, not True",
    ),
    "a true epsilon": ({**CONFIG, "rms_norm_eps": True}, "config field 'rms_norm_eps' must be a positive number, not True"),
    "not a number": ({**CONFIG, "rms_norm_eps": float("nan")}, "config field 'rms_norm_eps' must be a positive number, not nan"),
    "no epsilon": ({**CONFIG, "rms_norm_eps": None}, "config field 'rms_norm_eps' must be a positive number, not None"),
    "rope in words": ({**CONFIG, "rope_parameters": "long"}, "config field 'rope_parameters' must be an object, not 'long'"),
    "a list of ropes": ({**CONFIG, "rope_scaling": [1]}, "config field 'rope_scaling' must be an object, not [1]"),
    "rope without factor": ({**CONFIG, "rope_scaling": {"type": "linear"}}, "config field 'factor' must be a positive number, not None"),
    "half a rope": (
        {**CONFIG, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
        "'partial_rotary_factor': 0.5} is not supported; supported: default, linear, llama3",
    ),
    "capped logits": ({**CONFIG, "final_logit_softcapping": 30.0}, "config field 'final_logit_softcapping' = 30.0 is not supported; supported: None"),
    "an encoder": ({**CONFIG, "use_bidirectional_attention": True}, "config field 'use_bidirectional_attention' = True is not supported; supported: False"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_a_config_that_cannot_be_used(refused, tmp_path, case):
    config, told = MODELS[case]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert told in refused(2, "profile", path, "-o", tmp_path / "p.json")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./nowhere"], "./nowhere: no such file or directory; a model is a Hugging Face directory or hub id, a GGUF"),
        (["nowhere.gguf"], "nowhere.gguf: no such file or directory; a model is "),
        (
            ["nowhere.models:make"],
            "nowhere.models:make: No module named 'nowhere'; it is not installed and not in the working folder ",
        ),
        (["json:nothing"], "json:nothing: module 'json' has no function 'nothing'"),
        (
            ["MODEL", "--device", "tpu9"],
            "no device is called 'tpu9'; choose cpu (this machine, measured), one of amx-2core,",
        ),
        (["MODEL", "--dtype", "int3"], "--dtype 'int3': it should be 'bfloat16' or 'float32'"),
        (["MODEL", "--batch", str(10**18)], "--batch 1000000000000000000: it should be less than or equal to 65536"),
        (["MODEL", "--lora-alpha", "nan"], "--lora-alpha nan: it should be a finite number"),
        (
            ["MODEL", "--seq", "4000"],
            "--seq 4000 is longer than the 256 positions that model was trained for; use --seq 256",
        ),
    ],
)
def test_a_profile_that_cannot_be_made(refused, work, tmp_path, words, message):
    words = [str(work / "model") if word == "MODEL" else word for word in words]
    assert refused(2, "profile", *words, "-o", tmp_path / "p.json").startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_an_operator_that_does_not_run_is_named(tmp_path):
    shape = {"shape": [2, 3], "stride": [3, 1]}
    values = [Value(name=name, dtype="float32", bytes=24, kind="activation", **shape) for name in "abc"]
    args = [{"operand": Operand(value=name, size=[2, 3], stride=[3, 1]).model_dump()} for name in "ab"]
    bad = Operator(target="aten.mm.default", phase="forward", args=args, inputs=["a", "b"], outputs=["c"])
    with pytest.raises(InputError, match=r"operator aten\.mm\.default is not supported \(mat1 and mat2 shapes"):
        measure(
            [Program(name="p", values=values, operators=[bad])], [], {},
            compute_dtype="float32", threads=1, scratch=tmp_path, environment=dict(os.environ),
        )  # fmt: skip


def _measured(request, environment):
    words = command("tightfit.profiles.measuring.worker", "1")
    return run_worker(words, request, environment, doing="measuring", predicted_bytes=1, instead="measure elsewhere")


def test_what_ends_before_it_is_asked_is_told_by_its_last_words(tmp_path):
    """However much it said before: more than a pipe holds."""
    said = "import os\nos.write(2, b'warned\\n' * 100_000 + b'no memory left')\nos._exit(1)\n"
    (tmp_path / "sitecustomize.py").write_text(said)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with pytest.raises(RunError, match=r"measuring stopped: no memory left$"):
        _measured({"threads": 1, "scratch": "x" * (1 << 20)}, environment)  # more than a pipe holds


# --- budgets -------------------------------------------------------------------------------------------------------


def infeasible(tightfit, profile, budget, output):
    """The smallest feasible budget, as --json tells a program and stderr a person."""
    code, out, err = tightfit("plan", profile, "--memory", budget, "-o", output, "--time-limit", 600, "--json")
    told = json.loads(out)
    assert (code, told["status"], told["train"]) == (3, "infeasible", None)
    assert f"({told['minimum_budget_bytes']} bytes)" in err
    assert "; the smallest feasible budget " in err
    return told


def test_a_budget_under_the_floor(tightfit, work, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("an earlier plan")
    floor = load_profile(work / "profile.json").device.floor
    told = infeasible(tightfit, work / "profile.json", "1MiB", path)
    assert told["minimum_budget_reason"].startswith(
        f"importing Python and PyTorch alone reaches {floor.start_peak_bytes} bytes; the smallest plan needs "
    )
    assert files(tmp_path) == {"plan.json": b"an earlier plan"}
    code, _, _ = tightfit("plan", work / "profile.json", "--memory", told["minimum_budget_bytes"], "-o", path)
    assert code == 0
    assert load_plan(path).peak_bytes <= told["minimum_budget_bytes"]


@pytest.mark.slow
def test_an_absurdly_large_budget_is_as_fast_as_keeping_all(tightfit, work, planned, tmp_path):
    words = ("plan", work / "profile.json", "--memory", (1 << 63) - 1, "--policy", "keep-all")
    code, out, _ = tightfit(*words, "-o", tmp_path / "keep.json", "--json")
    assert code == 0
    assert planned.budget_bytes == (1 << 63) - 1
    assert planned.step_seconds == pytest.approx(json.loads(out)["step_seconds"], rel=1e-3)
    code, out, _ = tightfit(
        "run", work / "plan.json", "--data", work / "data.jsonl", "--steps", 2, "-o", tmp_path / "out", "--json"
    )
    assert code == 0
    assert len(json.loads(out)["loss"]) == 2


@pytest.mark.slow
def test_a_disk_that_cannot_be_measured_is_named_and_nothing_else_blamed(tmp_path):
    (tmp_path / "file").write_text("no folder")
    request = {
        "programs": [],
        "whole": 0,
        "inference": [],
        "weights": [],
        "updates": [],
        "shapes": [],
        "tables": [],
        "accumulate": 1,
        "turning_bytes": 1 << 20,
        "compute_dtype": "float32",
    }
    with pytest.raises(RunError) as caught:
        _measured(request | {"threads": 1, "scratch": str(tmp_path / "file" / "scratch")}, dict(os.environ))
    assert str(caught.value).startswith(f"{tmp_path / 'file' / 'scratch'}")
    assert str(caught.value).endswith("; set TIGHTFIT_CACHE to a writable directory with free space")
