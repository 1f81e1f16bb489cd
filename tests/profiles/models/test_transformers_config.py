"""Whatever transformers makes of a config, there is a decoder or a refusal in words, and never another error."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_families import sized
from reference import stored_weights

from tightfit.profiles.models.decoder_config import decoder_shape, handwritten, text_config
from tightfit.profiles.models.transformers_config import settings_of
from tightfit.profiles.models.transformers_decoder import DecoderFacts, facts
from tightfit.profiles.sources.lookup import resolve
from tightfit.profiles.weights.store_file import build_store
from tightfit.runtime.common.errors import InputError

transformers = pytest.importorskip("transformers")
SMALL = {
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "intermediate_size": 96, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 64,
    "encoder_hash_byte_group_vocab": 128, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8,
}  # fmt: skip
ALWAYS = ("dory", "blt", "gemma4", "gemma3n", "bamba", "falcon_h1", "nemotron_h", "granitemoehybrid", "rwkv")
"""types that ended in an internal error once, or were refused by mistake"""


def model_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as decoders

    return sorted({*decoders, *transformers.CONFIG_MAPPING})


def default(model_type: str, small: bool = True) -> dict[str, Any] | None:
    """The config.json that transformers writes for a type by default, with `small` sizes; None if it has none."""
    try:
        written = json.loads(transformers.CONFIG_MAPPING[model_type]().to_json_string(use_diff=False))
    except Exception:
        return None
    return shrunk(written) if small else written  # type: ignore[no-any-return]


def shrunk(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    layers = config.get("num_hidden_layers")
    made = {
        key: min(value, SMALL[key]) if key in SMALL and type(value) is int else shrunk(value)
        for key, value in config.items()
    }
    if isinstance(kinds := made.get("layer_types"), list) and isinstance(layers, int) and len(kinds) == layers:
        made["layer_types"] = kinds[-2:]
    return made


def without_some(config: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The config without one to four of its fields, or of those of a config inside of it."""
    made = copy.deepcopy(config)
    for _ in range(draw.randint(1, 4)):
        places = [made, *(value for value in made.values() if isinstance(value, dict) and value)]
        place = draw.choice(places)
        if keys := [key for key in place if key != "model_type"]:
            del place[draw.choice(keys)]
    return made


def answer(read: dict[str, Any]) -> str:
    """Why a config is refused; empty if it is a decoder's."""
    try:
        config = text_config(read)
        assert config is not None
        if handwritten(config):
            decoder_shape(config)
        else:
            assert isinstance(facts(config), DecoderFacts)
    except InputError as error:
        return str(error)
    return ""


def cases(model_type: str, damaged: int) -> Iterator[dict[str, Any]]:
    """A type's default config, and that with fields left out."""
    config = default(model_type)
    if config is not None:
        yield config
        draw = random.Random(model_type)
        for _ in range(damaged):
            yield without_some(config, draw)


@pytest.mark.slow_but_for("dory", "gemma3n", "bamba")
@pytest.mark.parametrize("model_type", [*ALWAYS, *random.Random(0).sample(model_types(), 8)])
@pytest.mark.filterwarnings("ignore")
def test_a_config_of_any_type_is_understood_or_refused_in_words(model_type: str) -> None:
    for config in cases(model_type, 2):
        said = answer(config)
        assert "internal error" not in said
        assert len(said) < 1000


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0.5])
def test_floats_are_written_as_transformers_writes_them(value: float) -> None:
    written = transformers.PretrainedConfig._encode_special_floats({"a": [0.0, {"b": value}], "__float__": value})
    read = settings_of(json.loads(json.dumps(written, allow_nan=False)))
    assert repr(read) == repr({"a": [0.0, {"b": value}], "__float__": value})


@pytest.mark.parametrize("name", ["rwkv", "mamba", "xlstm"])
def test_models_without_attention_are_refused(name: str) -> None:
    """RWKV calls what mixes its tokens attention, and its loop over them writes in place, which autograd cannot
    follow.
    """
    config = default(name)
    assert config is not None
    assert "decoders of transformers that have attention layers" in answer(config)


def test_what_transformers_says_is_kept_whole_and_in_one_line() -> None:
    said = answer(sized("olmo2", num_attention_heads="x"))
    assert said.startswith("transformers cannot build the 'olmo2' model of this config: ")
    assert "num_attention_heads" in said
    assert "'x'" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("kind", "tied", "flat"),
    [("Qwen2VL", True, True), ("Qwen2VL", False, False), ("Qwen2_5_VL", False, True), ("Qwen3VL", True, False)],
)
@pytest.mark.filterwarnings("ignore")
def test_text_models_of_qwen_vl_are_qwen(kind: str, tied: bool, flat: bool, tmp_path: Path) -> None:
    """What is read of a checkpoint, put into transformers' Qwen2 or Qwen3, gives the logits of the whole model."""
    text = {key: value for key, value in sized("").items() if key not in ("model_type", "tie_word_embeddings")}
    sections = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 5e4}
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 32,
        "out_hidden_size": 64,
        "embed_dim": 32,
    }
    config = getattr(transformers, f"{kind}Config")(
        text_config=text | {"head_dim": 16, "initializer_range": 0.3, "rope_parameters": sections},
        vision_config=vision,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    whole = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    for parameter in whole.parameters():
        parameter.data = parameter.data.bfloat16().float()
    whole.save_pretrained(tmp_path)
    if flat:  # as the first releases were published
        written = json.loads((tmp_path / "config.json").read_text())
        inner = written.pop("text_config") | {
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "rope_theta": 5e4,
        }
        del inner["rope_parameters"]
        (tmp_path / "config.json").write_text(json.dumps(inner | written))
    source = resolve(str(tmp_path), base="16bit")
    assert source.config["adapter_body"] == "model.language_model."
    settings = {key: value for key, value in source.config.items() if key != "rope_scaling"}
    if flat:
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": settings["rope_theta"]}
    plain = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**settings)).eval()
    values = stored_weights(build_store(source, tmp_path / "stores"))
    assert not plain.load_state_dict(values, strict=False).unexpected_keys
    plain.tie_weights()
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        due = whole(input_ids=ids).logits
        assert (plain(input_ids=ids).logits - due).abs().max() < 1e-4 * due.abs().max()
