"""Configs of decoders that transformers builds, sent to the service: refused in its own process without importing
transformers or PyTorch, or by the worker; profiled and planned."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from decoder_families import FAMILIES, sized
from places import SOURCES
from pydantic import ValidationError
from reference import CONFIGS
from tiny_models import header_of, random_weights, write_gguf

from tightfit.planner.plan import plan
from tightfit.planner.service.jobs.kinds import source_of
from tightfit.planner.service.jobs.labels import config_name, job_label
from tightfit.planner.service.jobs.orders import JobOrder
from tightfit.planner.service.jobs.work import profile as profiling
from tightfit.planner.service.wire.errors import ServiceError
from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.planner.service.wire.requests import ProfileRequest
from tightfit.planner.service.wire.settings import Settings
from tightfit.profiles.io import parse_profile
from tightfit.profiles.models.transformers_config import DECODERS, NAMES, TWO_SEQUENCES, check, listed
from tightfit.runtime.common.errors import InputError

OLMO = FAMILIES["OLMo 2"]


def source(tmp_path, config):
    settings = Settings(data_dir=tmp_path, command=("tightfit",))
    return source_of(settings, ProfileRequest(config=config))


REFUSED = [
    ({"model_type": "t5"}, "model_type 't5' is an encoder-decoder model"),
    ({"model_type": "bart", "is_encoder_decoder": True}, "model_type 'bart' is an encoder-decoder model"),
    ({"model_type": "vit"}, r"model_type 'vit' is no decoder of transformers \d.* \(AutoModelForCausalLM\)"),
    ({"model_type": "x" * 100}, "is no decoder of transformers"),
    (OLMO | {"num_hidden_layers": 10**9}, "config field 'num_hidden_layers' is 1000000000; at most 4096 is supported"),
    ({"model_type": "gpt2", "n_embd": 1 << 40}, "config field 'n_embd' is 1099511627776; at most 131072 is supported"),
    (OLMO | {"initializer_range": "x"}, "config field 'initializer_range' must be a positive number"),
    ({"model_type": "mllama", "text_config": {"model_type": "t5"}}, "model_type 't5' is an encoder-decoder model"),
    # Of what is written by hand, nothing has changed.
    (sized("llama", hidden_act="relu"), "activation 'relu' is not supported"),
    ({"model_type": 5}, "model_type 5 is not supported"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_a_config_of_no_decoder_is_refused_at_once(config, message, tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ServiceError, match=message) as caught:
        source(tmp_path, config)
    assert (caught.value.status, caught.value.code, caught.value.field) == (422, "invalid_request", "body.config")


@pytest.mark.parametrize("family", ["OLMo 2", "Llama, yarn scaling", "Qwen3.5 (text)", "GPT-2", "Llama, no scaling"])
def test_a_config_of_a_dense_decoder_is_taken_as_it_is(family, tmp_path):
    pytest.importorskip("transformers")
    config = FAMILIES[family]
    assert source(tmp_path, config) == {"config": config}
    wrapped = {"model_type": "wrapper", "text_config": config}
    assert source(tmp_path, wrapped) == {"config": wrapped}


def test_without_transformers_the_answer_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    said = r"model_type 'olmo2' is not one of .*; for any other decoder run pip install 'tightfit\[hf\]'"
    with pytest.raises(ServiceError, match=said) as caught:
        source(tmp_path, OLMO)
    assert (caught.value.status, caught.value.field) == (422, "body.config")
    config = FAMILIES["Llama, no scaling"]
    assert source(tmp_path, config) == {"config": config}


def test_the_names_that_transformers_knows_are_read_without_importing_it():
    modeling_auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    file = Path(modeling_auto.__file__)
    assert file.parts[-3:] == NAMES.parts
    found = listed(file)
    assert found[DECODERS] == dict(getattr(modeling_auto, DECODERS))
    assert found[TWO_SEQUENCES] == dict(getattr(modeling_auto, TWO_SEQUENCES))


def test_the_service_checks_configs_and_loads_neither_pytorch_nor_a_solver():
    pytest.importorskip("transformers")
    code = (
        "import sys\n"
        "from tightfit.planner.service.http import app\n"
        "from tightfit.planner.service.jobs import kinds\n"
        f"kinds.check_config({OLMO!r}, 'config')\n"
        "print([name for name in ('torch', 'transformers', 'ortools') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(SOURCES)}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_where_the_list_cannot_be_read_the_worker_decides(tmp_path):
    """Another transformers may write its list in another way: then nothing is refused for its name."""
    file = tmp_path / "modeling_auto.py"
    for text in (
        "",
        f"{DECODERS} = make()\n{TWO_SEQUENCES} = make()\n",
        f"{DECODERS} = OrderedDict([('a', 'A')])\n",
        "(",
    ):
        file.write_text(text)
        listed.cache_clear()
        assert listed(file) == {}
    listed.cache_clear()
    assert listed(tmp_path / "none.py") == {}


def test_the_header_of_a_file_is_taken_as_a_config_with_its_precision(tmp_path):
    weights = random_weights(CONFIGS["llama"])
    header = header_of(write_gguf(tmp_path / "a.gguf", CONFIGS["llama"], weights, metadata={"general.name": "Tiny"}))
    settings = Settings(data_dir=tmp_path, command=("tightfit",))
    taken = source_of(settings, ProfileRequest(header=header))
    assert (taken["base"], taken["config"]["_name_or_path"]) == ("4bit", "Tiny")
    assert taken["config"]["hidden_size"] == CONFIGS["llama"]["hidden_size"]
    assert (
        job_label("profile", taken | {"seq": 16, "batch": 1}, lambda kind, identity: None)
        == "Tiny, batch 1, sequence 16"
    )
    with pytest.raises(ServiceError, match="choose the model's config") as caught:
        source_of(settings, ProfileRequest(header=header | {"metadata": {"format": "pt"}}))
    assert (caught.value.status, caught.value.field) == (422, "body.header")
    with pytest.raises(ValidationError, match="exactly one of path, hub, config and header"):
        ProfileRequest(header=header, config=CONFIGS["llama"])


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "llama", "_name_or_path": "org/Tiny-1B"}, "Tiny-1B"),
        ({"model_type": "llama", "_name_or_path": "/home/me/\x00ti\nny/"}, "tiny"),
        ({"model_type": "llama", "_name_or_path": ""}, "llama of a config"),
        ({"_name_or_path": 5}, "a model"),
    ],
)
def test_a_model_of_a_config_has_the_name_that_the_config_has(config, name):
    assert config_name(config) == name


@pytest.mark.slow
def test_a_worker_makes_a_profile_of_it_that_can_be_planned(tmp_path, cache, monkeypatch):
    """As a worker does it, but with times that are estimated: to measure takes long."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(profiling, "measure", functools.partial(profiling.measure, device="zen5-2core"))
    request = {"seq": 16, "batch": 1, "lora_rank": 4, "lora_alpha": None, "accumulate": 1, "dtype": None}
    order = JobOrder(
        kind="profile",
        request=request | source(tmp_path, OLMO),
        objects=str(tmp_path / "objects"),
        folder=str(tmp_path / "job"),
        lock=str(tmp_path / "lock"),
        memory_bytes=None,
    )
    objects = ObjectStore(tmp_path / "objects")
    told = []
    made = profiling.do(order, SimpleNamespace(progress=lambda **what: told.append(what)))
    kept = {row["kind"]: row for row in made["files"]}
    assert kept["cache"]["id"].endswith("/config.json")
    objects.place(kept["profile"]["digest"], kept["profile"]["staged"])
    found = parse_profile(objects.read(kept["profile"]["digest"]), "the stored profile")
    assert (found.model.config["model_type"], found.model.kind, found.seq) == ("olmo2", "decoder", 16)
    assert 0 < plan(found, 1 << 30, policy="keep-all").peak_bytes < 1 << 30
    assert {"stage", "done", "total"} <= set(told[-1])


def test_a_name_in_the_list_of_encoder_decoders_is_refused_as_one():
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="is an encoder-decoder model"):
        check({"model_type": "pegasus_x"})


def test_code_that_a_config_names_is_not_run():
    """A config may name modelling files of its own, which transformers would download and run where it is told to."""
    pytest.importorskip("transformers")
    from tightfit.profiles.models.transformers_decoder import facts

    named = {"AutoConfig": "nobody/nothing--code.Config", "AutoModelForCausalLM": "nobody/nothing--code.Model"}
    config = FAMILIES["Phi-3"] | {"auto_map": named, "_name_or_path": "nobody/nothing"}
    check(config)
    assert [tensor.shape for tensor in facts(config).tensors] == [t.shape for t in facts(FAMILIES["Phi-3"]).tensors]
