"""Which linear layers get LoRA pairs, and of what rank and scale, against what PEFT makes of the
adapter_config.json.
"""

import dataclasses
import json
import math
import re
import signal

import pytest
import torch
from reference import CONFIGS, MIXTURE
from torch._subclasses import FakeTensorMode

from tightfit.profiles.models import lora
from tightfit.profiles.models.decoder import Decoder
from tightfit.profiles.models.decoder_config import WRAPPED_BODY, decoder_shape
from tightfit.profiles.models.lora import (
    NEUTRAL,
    OF_EXPERTS,
    READ,
    STARTS,
    WITHOUT_EFFECT,
    LoraConfig,
    from_peft,
    given,
    layer_number,
    layer_numbers,
)
from tightfit.profiles.models.projection import Projection
from tightfit.profiles.models.transformers_decoder import AnyDecoder
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.adapter import BODY, CONFIG, adapter_config

GPT2 = {"model_type": "gpt2", "vocab_size": 320, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
FALCON = {
    "model_type": "falcon",
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "new_decoder_architecture": False,
    "parallel_attn": True,
    "bias": False,
    "alibi": False,
}
GEMMA3N = {
    "model_type": "gemma3n_text",
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "hidden_size": 64,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.0, 0.0],
    "laurel_rank": 4,
    "altup_num_inputs": 2,
}
SETTINGS = {
    "all": LoraConfig(rank=4),
    "attention": LoraConfig(rank=4, targets="attention"),
    "names": LoraConfig(rank=4, targets="q_proj, up_proj"),
    "names in two layers": LoraConfig(rank=4, targets="q_proj,up_proj", layers=(0, 2)),
    "all in one layer": LoraConfig(rank=4, layers=(1,)),
    "a pattern": LoraConfig(rank=4, targets=r".*\.(0|2)\..*(v|down)_proj"),
    "a pattern in one layer": LoraConfig(rank=4, targets=r".*(v|down)_proj", layers=(2,)),
    "one module by its whole name": LoraConfig(rank=4, targets="model.layers.1.mlp.gate_proj"),
    "ranks by pattern": LoraConfig(
        rank=4, rank_pattern={"q_proj": 8, r"layers\.1\..*": 2}, alpha_pattern={"down_proj": 5.0}
    ),
    "rank-stabilised": LoraConfig(rank=4, alpha=3.0, rslora=True, rank_pattern={"o_proj": 9}),
}


def theirs(model_config, told):
    """By name: rank and scale of the pairs that PEFT makes."""
    peft = pytest.importorskip("peft")
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**model_config))
        made = peft.get_peft_model(model, peft.LoraConfig(**told | {"base_model_name_or_path": None}))
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in made.named_modules()
        if hasattr(module, "lora_A")
    }


def ours(module, body=BODY):
    return {
        body + name.removeprefix(BODY): (child.pair.rank, child.pair.scale)
        for name, child in module.named_modules()
        if isinstance(child, Projection) and child.pair is not None
    }


@pytest.mark.parametrize("setting", SETTINGS)
def test_peft_chooses_the_same_layers_ranks_and_scales(setting):
    with FakeTensorMode():
        made = Decoder(decoder_shape(CONFIGS["llama"]), dtype=torch.float32, lora=SETTINGS[setting])
    found = ours(made)
    assert found
    assert found == theirs(CONFIGS["llama"], adapter_config(made.lora, [], "base"))
    assert made.lora == json.loads(json.dumps(made.lora))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT sets it itself for GPT-2
@pytest.mark.parametrize(
    ("config", "body"),
    [(GPT2, "transformer."), (FALCON, "transformer."), (GEMMA3N, "model.")],
    ids=["gpt2", "falcon", "gemma3n"],
)
@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=4, targets="attention"),
        LoraConfig(rank=4, layers=(1,)),
        LoraConfig(rank=4),
        LoraConfig(rank=4, targets="attention", layers=(0,)),
    ],
    ids=["attention", "one layer", "all", "attention in one layer"],
)
def test_other_families_are_chosen_by_the_same_words(config, body, lora):
    pytest.importorskip("transformers")
    made = AnyDecoder(config | {"adapter_body": body}, dtype=torch.float32, seq=8, lora=lora)
    assert ours(made, body) == theirs(config, adapter_config(made.lora, [], "base", body))
    part = {name.split(".")[-2] for name in ours(made, body)}
    assert lora.targets != "attention" or part <= {"attn", "self_attention", "self_attn"}


def test_a_wrapped_body_is_told_by_whole_names():
    with FakeTensorMode():
        made = Decoder(
            decoder_shape(CONFIGS["gemma3_text"]),
            dtype=torch.float32,
            lora=LoraConfig(targets="q_proj", layers=(1, 3)),
            body=WRAPPED_BODY,
        )
    assert made.lora["target_modules"] == [f"{WRAPPED_BODY}layers.{layer}.self_attn.q_proj" for layer in (1, 3)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": "q_prjo"}, "did you mean q_proj?"),
        ({"targets": ".*nothing"}, "match no linear layer"),
        ({"targets": "(q_proj"}, "no regular expression"),
        ({"targets": " "}, "is empty"),
        ({"layers": (3,)}, "has layers 0 to 2"),
        ({"rank_pattern": {"c_attn": 4}}, "rank_pattern 'c_attn' matches none"),
        ({"targets": "q_proj", "alpha_pattern": {"v_proj": 4}}, "alpha_pattern 'v_proj' matches none"),
        ({"rank": 0}, "lora_rank must be at least 1"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern q_proj must be at least 1"),
        ({"alpha": 0.0}, "lora_alpha 0.0"),
        ({"alpha_pattern": {"q_proj": math.inf}}, "alpha_pattern q_proj inf"),
        ({"dropout": 1.0}, "lora_dropout 1.0"),
    ],
)
def test_what_chooses_nothing_is_refused(options, said):
    with pytest.raises(InputError) as refused, FakeTensorMode():
        Decoder(decoder_shape(CONFIGS["llama"]), dtype=torch.float32, lora=LoraConfig(**options))
    assert said in str(refused.value)


NESTED = r"((\w|\.)+)+!"
"""matched with one name, this takes for ever"""


@pytest.mark.parametrize(
    "options", [{"targets": NESTED}, {"rank_pattern": {NESTED: 4}}, {"alpha_pattern": {NESTED: 4}}]
)
def test_a_pattern_that_takes_for_ever_is_refused(options, monkeypatch):
    monkeypatch.setattr(lora, "MATCHING_SECONDS", 0.2)
    with pytest.raises(InputError) as refused:
        LoraConfig(**options).chosen(["model.layers.0.self_attn.gate_up_proj"], "a model")
    assert str(refused.value) == (
        f"matching {NESTED!r} with names of layers takes more than 0.2 s: write the pattern without repeats of repeats"
    )
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert len(LoraConfig().chosen(["model.layers.0.self_attn.q_proj"], "a model")) == 1


def test_numbers_of_layers():
    assert layer_numbers("0-3, 8") == (0, 1, 2, 3, 8)
    assert layer_number("model.layers.11.self_attn.q_proj") == 11
    assert layer_number("transformer.h.2.attn.c_attn") == 2
    assert layer_number("lm_head") is None
    for text in ("3-1", "", "a", "1,,2", "-1", "1-"):
        with pytest.raises(InputError, match="lora_layers"):
            layer_numbers(text)


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_read_back_from_the_adapter(setting, tmp_path):
    def made(lora):
        with FakeTensorMode():
            return Decoder(decoder_shape(CONFIGS["llama"]), dtype=torch.float32, lora=lora)

    first = made(SETTINGS[setting])
    (tmp_path / CONFIG).write_text(json.dumps(adapter_config(first.lora, [], "base")))
    again = made(given(tmp_path, {"rank": None, "targets": None, "rslora": False}))
    assert ours(again) == ours(first)


def test_settings_of_pefts_own_file_are_read(tmp_path):
    peft = pytest.importorskip("peft")
    written = peft.LoraConfig(
        r=6,
        lora_alpha=11,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[1],
        use_rslora=True,
        rank_pattern={"q_proj": 3},
        lora_dropout=0.25,
        use_dora=True,
        modules_to_save=["lm_head"],
    )
    written.save_pretrained(tmp_path)
    read = from_peft(tmp_path)
    assert sorted(read.names) == ["q_proj", "v_proj"]
    assert (read.rank, read.alpha, read.layers, read.rank_pattern) == (6, 11.0, (1,), {"q_proj": 3})
    assert (read.dropout, read.rslora, read.dora, read.modules_to_save) == (0.25, True, True, ("lm_head",))


OTHER_VALUES = {
    "task_type": "SEQ_2_SEQ_LM",
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
    "peft_version": "0.1.0",
    "base_model_name_or_path": "some/where",
    "revision": "main",
    "inference_mode": True,
    "r": 3,
    "target_modules": ["v_proj", "down_proj"],
    "exclude_modules": ["v_proj"],
    "lora_alpha": 5,
    "lora_dropout": 0.25,
    "fan_in_fan_out": True,
    "bias": "lora_only",
    "use_rslora": True,
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "gaussian",
    "layers_to_transform": 1,
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "megatron_config": {"tensor_model_parallel_size": 1},
    "megatron_core": "megatron.other",
    "trainable_token_indices": [1, 2],
    "loftq_config": {"loftq_bits": 4, "loftq_iter": 1},
    "eva_config": {"rho": 1.5},
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"direction": "ArBr"},
    "use_dora": True,
    "velora_config": {"num_groups": 2},
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "qalora_group_size": 8,
    "monteclora_config": {"use_entropy": True},
    "layer_replication": [[0, 2], [1, 3]],
    "lora_bias": True,
    "target_parameters": ["gate_proj.weight"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 0.1},
    "ensure_weight_tying": True,
}
"""A value other than PEFT's own for each field of its LoraConfig"""


def fields_of_peft():
    peft = pytest.importorskip("peft")
    return [one.name for one in dataclasses.fields(peft.LoraConfig) if one.name != "runtime_config"]  # never saved


def test_every_field_of_peft_s_is_known():
    """A field that a new PEFT brings has to be read, refused, or known to change nothing; and have a value below."""
    assert sorted(fields_of_peft()) == sorted({*READ, *NEUTRAL, *WITHOUT_EFFECT, *OTHER_VALUES} - {"runtime_config"})
    assert len({*READ, *NEUTRAL, *WITHOUT_EFFECT}) == len(READ) + len(NEUTRAL) + len(WITHOUT_EFFECT)


def test_pairs_for_experts_are_both_or_none_and_only_where_there_are_experts(tmp_path):
    both = [f"model.layers.1.mlp.experts.{name}" for name in OF_EXPERTS]
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / CONFIG).write_text(json.dumps(settings | {"target_parameters": both}))
    assert from_peft(tmp_path).experts
    with (
        FakeTensorMode(),
        pytest.raises(InputError, match="lora_experts: the model has no experts that pairs can be for"),
    ):
        Decoder(decoder_shape(CONFIGS["llama"]), dtype=torch.float32, lora=from_peft(tmp_path))
    for refused in ({"dropout": 0.1}, {"dora": True}):
        with FakeTensorMode(), pytest.raises(InputError, match="lora_experts: pairs of experts have no"):
            Decoder(decoder_shape(MIXTURE), dtype=torch.float32, lora=LoraConfig(experts=True, **refused))
    uneven = LoraConfig(experts=True, rank_pattern={"gate_up_proj": 2})
    with FakeTensorMode(), pytest.raises(InputError, match=r"have ranks 2 and 8 and scales .*give both matrices"):
        Decoder(decoder_shape(MIXTURE), dtype=torch.float32, lora=uneven)


@pytest.mark.filterwarnings("ignore")  # PEFT says of some that they do nothing here
@pytest.mark.parametrize("field", OTHER_VALUES)
def test_a_field_is_honoured_as_by_peft_or_refused_by_name(field, tmp_path):
    usual = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
    }
    changed = usual | {field: OTHER_VALUES[field]}
    if field == "layers_pattern":
        changed["layers_to_transform"] = [1]
    (tmp_path / CONFIG).write_text(json.dumps(changed))
    if field in NEUTRAL:
        with pytest.raises(
            InputError, match=rf"{field} is .*{re.escape(repr(OTHER_VALUES[field]))}, which tightfit does not have"
        ):
            from_peft(tmp_path)
        return
    if field == "target_parameters":
        with pytest.raises(
            InputError, match="has weight of gate_proj, and tightfit has pairs for gate_up_proj and down"
        ):
            from_peft(tmp_path)
        return
    with FakeTensorMode():
        made = Decoder(decoder_shape(CONFIGS["llama"]), dtype=torch.float32, lora=from_peft(tmp_path))
    assert ours(made) == theirs(CONFIGS["llama"], changed)
    assert field in WITHOUT_EFFECT or field == "init_lora_weights" or from_peft(tmp_path) != made_of(usual, tmp_path)


def made_of(told, folder):
    (folder / CONFIG).write_text(json.dumps(told))
    return from_peft(folder)


@pytest.mark.parametrize("pattern", ["layers", ["blocks", "layers"], "h"])
def test_layers_are_numbered_in_the_list_that_is_named(pattern, tmp_path):
    told = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": pattern,
    }
    read = made_of({"peft_type": "LORA"} | told, tmp_path)
    layers = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(3) for name in "qkv"]
    if pattern == "h":  # PEFT finds no module for it either
        with pytest.raises(InputError, match=r"lora_layers 0: it has none in \('h',\)"):
            read.chosen(layers, "it")
        return
    assert {name: (pair.rank, pair.scale) for name, pair in read.chosen(layers, "it").items()} == theirs(
        CONFIGS["llama"], told
    )


@pytest.mark.parametrize("start", [*STARTS, "Gaussian", None])
def test_starts_that_leave_the_base_alone_are_read(start, tmp_path):
    assert made_of({"peft_type": "LORA", "target_modules": ["q_proj"], "init_lora_weights": start}, tmp_path).rank == 8


@pytest.mark.parametrize(
    ("start", "said"),
    [
        *((start, "changes the base's weights") for start in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga")),
        ("mica", "a start that tightfit does not have"),
        ("novel", "a start that tightfit does not have"),
    ],
)  # fmt: skip
def test_starts_that_do_not_are_refused_by_name(start, said, tmp_path):
    with pytest.raises(InputError, match=f"init_lora_weights is '{start}', .*{said}"):
        made_of({"peft_type": "LORA", "target_modules": ["q_proj"], "init_lora_weights": start}, tmp_path)


def test_a_field_that_no_one_knows_is_refused_unless_it_says_nothing(tmp_path):
    told = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    made_of(told | {"use_novelty": False, "novel_config": None}, tmp_path)
    with pytest.raises(InputError, match="use_novelty is True, which tightfit does not have"):
        made_of(told | {"use_novelty": True}, tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "no JSON"),
        ('{"peft_type": "IA3"}', "peft_type is 'IA3'"),
        ("[]", "peft_type is None"),
        ('{"peft_type": "LORA", "bias": "all", "target_modules": ["q_proj"]}', "bias is 'all'"),
        ('{"peft_type": "LORA", "r": "x", "target_modules": ["q_proj"]}', "damaged"),
        ('{"peft_type": "LORA", "target_modules": null}', "is empty"),
    ],
)
def test_adapters_that_are_no_such_adapters_are_refused(content, said, tmp_path):
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(InputError) as refused:
        from_peft(tmp_path)
    assert said in str(refused.value)


def test_settings_come_from_one_place(tmp_path):
    with pytest.raises(InputError, match="rank, dora cannot be given as well"):
        given(tmp_path, {"rank": 4, "dora": True, "alpha": None})
    with pytest.raises(InputError, match="No such file"):
        from_peft(tmp_path / "missing")


@pytest.mark.parametrize(
    ("option", "words"), [("rank", "lora_rank must be at least 1, not 0"), ("alpha", "lora_alpha 0.0")]
)
def test_a_value_of_zero_is_no_default(option: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        given(None, {option: 0})
