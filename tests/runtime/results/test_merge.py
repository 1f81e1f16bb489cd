"""Merged models against PEFT's own merge_and_unload on the same base: logits of what transformers loads."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from checkpoint_formats import AWQ, BNB, GPTQ
from decoder_families import FAMILIES
from peft_adapters import logits, merged_by_peft, save_adapter, save_model, tiny_model, with_values
from places import SOURCES
from quantised_checkpoints import four_bit, int8, write_quantised, zero_points
from reference import CONFIGS, VARIANTS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import (
    CHAT,
    byte_level_tokenizer,
    random_weights,
    sentence_piece_tokenizer,
    write_directory,
    write_gguf,
)

from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.results import merged_directory, safetensors_merge
from tightfit.runtime.results.merge import merge

transformers = pytest.importorskip("transformers")
# peft says that it transposes the weights of GPT-2's own linear layers, as it should, and that a copy of a tied module
# comes apart
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tie:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),  # beside a GGUF file
]

MODELS: dict[str, dict[str, Any]] = {
    "llama, tied": CONFIGS["llama"],
    "qwen2": CONFIGS["qwen2"],
    "gemma3": CONFIGS["gemma3_text"],
    "biases": VARIANTS["llama with biases"],
    "gpt2": FAMILIES["GPT-2"],
    "phi3": FAMILIES["Phi-3"],
    "neox": FAMILIES["GPT-NeoX, Pythia"],
    "qwen3.5": FAMILIES["Qwen3.5 (text)"],
}
PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "patterns": PLAIN
    | {"use_rslora": True, "rank_pattern": {r"layers\.1\..*|h\.1\..*": 2}, "alpha_pattern": {"o_proj|c_proj|dense": 9}},
    "dora": PLAIN | {"use_dora": True},
}
TABLES = {
    "llama, tied": ("embed_tokens", "lm_head"),
    "qwen2": ("embed_tokens", "lm_head"),
    "gpt2": ("wte", "lm_head"),
    "neox": ("embed_in", "lm_head"),
}


def merged(folder: Path, **settings: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def near(own: torch.Tensor, exact: torch.Tensor, tolerance: float = 2e-6) -> bool:
    return float((own - exact).norm() / exact.norm()) < tolerance


@pytest.mark.parametrize(
    ("model", "setting"),
    [
        *((model, "plain") for model in MODELS),
        *((model, setting) for model in ("llama, tied", "gpt2") for setting in ("patterns", "dora")),
        ("phi3", "dora"),
    ],
)
def test_logits_are_those_of_peft(model: str, setting: str, tmp_path: Path) -> None:
    config = MODELS[model]
    base = save_model(tmp_path / "base", config)
    adapter = save_adapter(tiny_model(config), tmp_path / "adapter", str(base), **SETTINGS[setting])
    told = merge(adapter, tmp_path / "merged")
    exact = logits(merged_by_peft(tiny_model(config), adapter))
    assert near(logits(merged(tmp_path / "merged")), exact)
    assert not near(logits(tiny_model(config)), exact, 1e-2)
    assert told["bytes"] == sum(value.nbytes for value in load_file(tmp_path / "merged" / "model.safetensors").values())
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[name], after[name]) for name in before) == told["adapted"]


@pytest.mark.parametrize(
    ("model", "which"),
    [
        *((model, which) for model in ("llama, tied", "gpt2") for which in ((0,), (1,))),
        *((model, (0, 1)) for model in TABLES),
    ],
)
def test_modules_that_were_trained_in_full_come_apart_where_they_were_tied(
    model: str, which: tuple[int, ...], tmp_path: Path
) -> None:
    config = MODELS[model]
    names = [TABLES[model][place] for place in which]
    base = save_model(tmp_path / "base", config)
    adapter = save_adapter(tiny_model(config), tmp_path / "adapter", str(base), **PLAIN, modules_to_save=names)
    told = merge(adapter, tmp_path / "merged")
    assert near(logits(merged(tmp_path / "merged")), logits(merged_by_peft(tiny_model(config), adapter)))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    pairs = sum("lora_A" in key for key in load_file(adapter / "adapter_model.safetensors"))
    assert told["adapted"] == pairs + len(names)


def test_a_base_that_was_saved_without_its_head(tmp_path: Path) -> None:
    """As GPT-2 is published: names without the prefix of the body, and a head that is the embedding."""
    config = MODELS["gpt2"]
    base = save_model(tmp_path / "base", config)
    tensors = load_file(base / "model.safetensors")
    save_file(
        {key.removeprefix("transformer."): value for key, value in tensors.items()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    adapter = save_adapter(tiny_model(config), tmp_path / "adapter", str(base), **PLAIN, modules_to_save=["wte"])
    merge(adapter, tmp_path / "merged")
    assert near(logits(merged(tmp_path / "merged")), logits(merged_by_peft(tiny_model(config), adapter)))
    own = load_file(tmp_path / "merged" / "model.safetensors")
    assert own.keys() == {*load_file(base / "model.safetensors"), "lm_head.weight"}


@pytest.mark.parametrize("model", ["qwen2", "gpt2"])
def test_bfloat16_is_rounded_once(model: str, tmp_path: Path) -> None:
    config = MODELS[model]
    base = save_model(tmp_path / "base", config, torch.bfloat16)
    adapter = save_adapter(tiny_model(config), tmp_path / "adapter", str(base), **PLAIN)
    merge(adapter, tmp_path / "merged")
    merge(adapter, tmp_path / "wide", dtype="float32")
    exact = merged_by_peft(merged(base, dtype=torch.float32), adapter).state_dict()
    own, wide = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "wide"))
    for name, value in own.items():
        assert value.dtype == torch.bfloat16
        assert near(wide[name], exact[name])
        assert torch.equal(value, wide[name].bfloat16()), name
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


QUANTISED: dict[str, tuple[dict[str, Any], Any]] = {
    "nf4": (BNB, lambda shape, draw: four_bit(shape, draw, double=True)),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, int8),
    "gptq": (GPTQ, zero_points),
    "act-order": (GPTQ | {"desc_act": True}, lambda shape, draw: zero_points(shape, draw, act_order=True)),
    "awq": (AWQ, lambda shape, draw: zero_points(shape, draw, method="awq")),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_bases_are_unpacked(kind: str, tmp_path: Path) -> None:
    stated, make = QUANTISED[kind]
    config = CONFIGS["llama"] | {"torch_dtype": "float16"}
    values = write_quantised(tmp_path / "base", config, random_weights(CONFIGS["llama"]), stated, make, shards=2)
    reference = with_values(CONFIGS["llama"], values)
    settings = PLAIN | {"target_modules": ["q_proj", "down_proj"]}
    adapter = save_adapter(
        with_values(CONFIGS["llama"], values), tmp_path / "adapter", str(tmp_path / "base"), **settings
    )
    exact = logits(merged_by_peft(reference, adapter))
    merge(adapter, tmp_path / "wide", dtype="float32")
    assert near(logits(merged(tmp_path / "wide")), exact)
    told = merge(adapter, tmp_path / "merged")
    assert told["adapted"] == 6
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert tensors.keys() == values.keys()
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert near(logits(merged(tmp_path / "merged", dtype=torch.float32)), exact, 2e-3)


def test_shards_and_what_lies_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_directory(
        tmp_path / "base",
        CONFIGS["llama"],
        random_weights(CONFIGS["llama"]),
        tokenizer=byte_level_tokenizer(),
        shards=3,
    )
    for name in (
        "generation_config.json",
        "chat_template.jinja",
        "tokenizer.model",
        "LICENSE",
        "README.md",
        "pytorch_model.bin",
    ):
        (base / name).write_text("{}")
    model = merged(base)
    adapter = save_adapter(model, tmp_path / "adapter", str(base), **PLAIN)
    monkeypatch.setattr(safetensors_merge, "SHARD_BYTES", 100_000)
    seen: list[tuple[str, int, int]] = []
    told = merge(adapter, tmp_path / "merged", progress=lambda *one: seen.append(one))
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert told["files"] == sorted([
        *shards, "model.safetensors.index.json", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "chat_template.jinja", "tokenizer.model", "LICENSE",
    ])  # fmt: skip
    for shard in shards:
        with safe_open(tmp_path / "merged" / shard, framework="pt") as opened:
            names = set(opened.keys())
            assert names == {name for name, place in index["weight_map"].items() if place == shard}
        sizes = sum(value.nbytes for value in load_file(tmp_path / "merged" / shard).values())
        assert sizes <= 100_000 or len(names) == 1
    assert (
        seen[-1]
        == ("merging", told["bytes"], told["bytes"])
        == ("merging", index["metadata"]["total_size"], told["bytes"])
    )
    assert near(logits(merged(tmp_path / "merged")), logits(merged_by_peft(merged(base), adapter)))


def test_the_rest_of_a_multimodal_model_is_kept(tmp_path: Path) -> None:
    """A wrapper's own names, its vision tower and its config."""
    text = CONFIGS["gemma3_text"]
    weights = {f"language_model.{name}": value for name, value in random_weights(text).items()}
    tower = {"vision_tower.patch.weight": torch.randn(4, 4), "vision_tower.ids": torch.arange(4)}
    wrapper = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 4}}
    base = write_directory(tmp_path / "base", wrapper, weights | tower)
    model = with_values(text, random_weights(text))
    plain = save_adapter(model, tmp_path / "plain", str(base), r=2, lora_alpha=4, target_modules=["q_proj"])
    tensors = load_file(plain / "adapter_model.safetensors")
    adapter = tmp_path / "adapter"
    shutil.copytree(plain, adapter)
    save_file(
        {
            key.replace("model.model.layers", "model.model.language_model.layers"): value
            for key, value in tensors.items()
        },
        adapter / "adapter_model.safetensors",
    )
    told = merge(adapter, tmp_path / "merged")
    own = load_file(tmp_path / "merged" / "model.safetensors")
    exact = merged_by_peft(with_values(text, random_weights(text)), plain).state_dict()
    assert own.keys() == (weights | tower).keys()
    assert told["adapted"] == text["num_hidden_layers"]
    for name, value in own.items():
        if name in tower:
            assert torch.equal(value, tower[name])
        else:
            assert near(value, exact[name.removeprefix("language_model.")]), name
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == wrapper


@pytest.mark.slow_but_for("gemma3_text")
@pytest.mark.parametrize("family", CONFIGS)
def test_a_directory_is_made_of_a_gguf_file(family: str, tmp_path: Path) -> None:
    config = CONFIGS[family] | {"vocab_size": 640 if family == "gemma3_text" else 320}
    if family == "gemma3_text":  # as llama.cpp assumes of it
        config |= {"layer_types": ["sliding_attention"] * 4, "sliding_window": 8}
    tokenizer = sentence_piece_tokenizer(420) if family == "gemma3_text" else byte_level_tokenizer()
    if family == "gemma3_text":
        config["vocab_size"] = tokenizer.get_vocab_size()
    weights = random_weights(config)
    base = write_gguf(tmp_path / "base.gguf", config, weights, tokenizer=tokenizer)
    values = meant(base, config, weights)
    adapter = save_adapter(with_values(config, values), tmp_path / "adapter", str(base), **PLAIN)
    told = merge(adapter, tmp_path / "merged", dtype="float32")
    exact = logits(merged_by_peft(with_values(config, values), adapter))
    assert near(logits(merged(tmp_path / "merged")), exact, 1e-5)
    assert {value.dtype for value in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.float32}
    assert told["base"] == str(base)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    for text in ("The quick brown fox", "It's what they've said: we're 12 of 345", "naïve café — 日本語"):
        assert (
            theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text, add_special_tokens=False).ids
        )
    if family != "gemma3_text":
        assert theirs.chat_template == CHAT
    merge(adapter, tmp_path / "narrow")
    assert {value.dtype for value in load_file(tmp_path / "narrow" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"


def meant(path: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values of a GGUF file by the names and in the order of Hugging Face, with gguf's own unpacking."""
    from tiny_models import gguf_name

    found = {one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in gguf.GGUFReader(path).tensors}
    values = {}
    for name, weight in weights.items():
        value = torch.tensor(found[gguf_name(name, config["model_type"] == "gemma3_text")]).reshape(weight.shape)
        if config["model_type"] == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            value = value.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
        values[name] = value - 1 if config["model_type"] == "gemma3_text" and name.endswith("norm.weight") else value
    return values


# --- where it is written, and what is refused -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, adapter)"""
    folder = tmp_path_factory.mktemp("small")
    base = save_model(folder / "base", CONFIGS["llama"])
    return base, save_adapter(tiny_model(CONFIGS["llama"]), folder / "adapter", str(base), **PLAIN)


def test_what_is_there_is_replaced_only_if_asked_for_and_a_model(small: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    merge(small[1], out)
    with pytest.raises(
        InputError, match=f"{out} is there already; give overwrite=True to replace it, or name another place"
    ):
        merge(small[1], out)
    (out / "model-00002-of-00002.safetensors").write_bytes(b"of an earlier merge")
    merge(small[1], out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]
    assert not (out / "model-00002-of-00002.safetensors").exists()
    (out / "notes.md").write_text("mine")
    with pytest.raises(
        InputError, match=r"holds notes\.md, which no merge leaves there and overwrite=True would remove"
    ):
        merge(small[1], out, overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("mine")
    with pytest.raises(InputError, match="holds letter, which no merge leaves there"):
        merge(small[1], tmp_path / "home", overwrite=True)
    with pytest.raises(InputError, match="cannot replace what is read"):
        merge(small[1], small[0], overwrite=True)


@pytest.mark.slow
def test_the_command_line(small: tuple[Path, Path], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tightfit.runtime.cli.main", "merge", str(small[1]), "-o", str(tmp_path / "merged")]
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    answer = subprocess.run([*words, "--json"], env=environment, capture_output=True, text=True, check=True)
    told = json.loads(answer.stdout)
    assert (told["adapted"], told["format"], told["base"]) == (21, "safetensors", str(small[0]))
    assert "merging …" in answer.stderr
    again = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.endswith("is there already; give --overwrite to replace it, or name another place\n")
    text = subprocess.run([*words, "--overwrite"], env=environment, capture_output=True, text=True, check=True).stdout
    assert "changed  21 tensors" in text
    assert "note     where training saw the base rounded (4 bits by default)" in text


def test_an_interrupted_merge_leaves_nothing(small: tuple[Path, Path], tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(small[1], tmp_path / "merged", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    orphan = tmp_path / f".merged.{2**22 + 1}.partial"  # no process has such an id
    orphan.mkdir()
    merge(small[1], tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_full_disk_is_said_and_leaves_nothing(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(merged_directory, "write", full)
    with pytest.raises(RunError, match=r"merged: the disk is full \(.* are to be written\); free space and try again"):
        merge(small[1], tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
    usual = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*usual[:4], 1, *usual[5:])))
    with pytest.raises(
        RunError, match=r"are to be written and .* are free; free some space, or name another place with -o"
    ):
        merge(small[1], tmp_path / "merged")


def test_what_does_not_fit_together_is_refused(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = small
    other = save_model(tmp_path / "other", CONFIGS["llama"] | {"hidden_size": 32})
    with pytest.raises(InputError, match=r"is \[64, 4\] and the base wants \[32, 4\]; give the base .* with base"):
        merge(adapter, tmp_path / "merged", base=str(other))
    shallow = save_model(tmp_path / "shallow", CONFIGS["llama"] | {"num_hidden_layers": 2})
    with pytest.raises(InputError, match=r"the base has no model\.layers\.2\.\S+, which the adapter changes"):
        merge(adapter, tmp_path / "merged", base=str(shallow))
    with pytest.raises(InputError, match="is a bare config, whose weights are random: there is nothing to merge"):
        merge(adapter, tmp_path / "merged", base=str(base / "config.json"))
    told = json.loads((adapter / "adapter_config.json").read_text())
    for name, change, message in (
        (
            "moved",
            {"base_model_name_or_path": str(tmp_path / "gone")},
            "the base of the adapter, .*gone, cannot be opened: .*; or name it with base",
        ),
        ("nameless", {"base_model_name_or_path": None}, "names no base model; give its base"),
        ("biased", {"bias": "all"}, "bias is 'all', which tightfit does not have"),
    ):
        shutil.copytree(adapter, tmp_path / name)
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(told | change))
        with pytest.raises(InputError, match=message):
            merge(tmp_path / name, tmp_path / "merged")
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_B" in key)
    for name, values, message in (
        ("halved", {k: v for k, v in tensors.items() if k != key}, r"no tensor \S*lora_B\.weight beside the others of"),
        (
            "infinite",
            tensors | {key: torch.full_like(tensors[key], torch.inf)},
            "holds values that are no finite numbers",
        ),
        (
            "strange",
            tensors | {"base_model.model.x.lora_embedding_A": tensors[key].clone()},
            "holds base_model.model.x.lora_embedding_A",
        ),
    ):
        shutil.copytree(adapter, tmp_path / name)
        save_file(values, tmp_path / name / "adapter_model.safetensors")
        with pytest.raises(InputError, match=message):
            merge(tmp_path / name, tmp_path / "merged")
    for options, message in (
        ({"format": "onnx"}, "format 'onnx' is not known; choose one of safetensors, gguf"),
        ({"dtype": "int4"}, "dtype 'int4' cannot be written in this form; choose one of float32, bfloat16, float16"),
        ({"adapter_only": True}, "adapter_only: the folder of the adapter is in safetensors already"),
        ({"format": "gguf"}, "a GGUF model is one file; name it with -o NAME.gguf"),
    ):
        with pytest.raises(InputError, match=message):
            merge(adapter, tmp_path / "merged", **options)
    with pytest.raises(
        InputError, match="a GGUF model is one file; give format='gguf' as well, or name a folder with -o"
    ):
        merge(adapter, tmp_path / "merged.gguf")
    assert not (tmp_path / "merged").exists()


def test_values_too_large_for_float16(tmp_path: Path) -> None:
    weights = random_weights(CONFIGS["llama"])
    weights["model.embed_tokens.weight"][3, 5] = 1e5
    base = write_directory(tmp_path / "base", CONFIGS["llama"], weights)
    adapter = save_adapter(merged(base), tmp_path / "adapter", str(base), **PLAIN)
    with pytest.raises(
        InputError,
        match=r"model\.embed_tokens\.weight holds values above 65504, too large for float16; give dtype='bfloat16'",
    ):
        merge(adapter, tmp_path / "merged", dtype="float16")


def test_the_report_of_a_run_names_the_base_and_how_it_was_rounded(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = small
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "adapter")
    told = json.loads((adapter / "adapter_config.json").read_text())
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": "some/where"}))
    report = {"adapter": str(run / "adapter"), "base": {"source": str(base), "rounding": "4-bit, rounded from float32"}}
    (run / "report.json").write_text(json.dumps(report))
    found = merge(run, tmp_path / "merged")
    assert found["note"].startswith(
        "training saw the base 4-bit, rounded from float32; the adapter was added to the values of"
    )
    report["base"]["rounding"] = "bfloat16 as published"
    (run / "report.json").write_text(json.dumps(report))
    assert merge(run, tmp_path / "other")["note"] is None
    assert "where training saw the base rounded (4 bits by default)" in merge(adapter, tmp_path / "third")["note"]


MEASURED = """
import json, sys
from tightfit.runtime.results.merge import merge
small = merge(sys.argv[1] + "/small-adapter", sys.argv[1] + "/small-merged")
large = merge(sys.argv[1] + "/large-adapter", sys.argv[1] + "/large-merged")
print(json.dumps([small["peak_bytes"], large["peak_bytes"], large["bytes"]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "gguf", "transposed"])
def test_memory_does_not_grow_with_the_model(kind: str, tmp_path: Path) -> None:
    """VmHWM of a process that merges a tiny model and then one of 200 MB and more, with tensors of up to 100 MB."""
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 2, "vocab_size": 24000}
    config, large = CONFIGS["qwen2"], CONFIGS["qwen2"] | sizes | {"num_attention_heads": 8, "num_key_value_heads": 8}
    if kind == "transposed":
        config, large = FAMILIES["GPT-2"], FAMILIES["GPT-2"] | {"n_embd": 1536, "n_layer": 2, "vocab_size": 16000}
    for name, made in (("small", config), ("large", large)):
        base = save_model(tmp_path / name, made)
        adapter = save_adapter(merged(base), tmp_path / f"{name}-adapter", str(base), **PLAIN, use_dora=True)
        if kind == "gguf":
            file = write_gguf(
                tmp_path / f"{name}.gguf",
                made,
                merged(base).state_dict(),
                default="F16",
                tokenizer=byte_level_tokenizer(),
            )
            told = json.loads((adapter / "adapter_config.json").read_text())
            (adapter / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": str(file)}))
    answer = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        check=True,
    )
    small, large_peak, size = json.loads(answer.stdout)
    assert size > 200e6
    assert large_peak - small < 48 << 20


WITHOUT_PYTORCH = """
import json, sys
from tightfit.runtime.results.merge import merge
steps = []
told = merge(*sys.argv[1:3], progress=lambda *step: steps.append(step), **json.loads(sys.argv[3]))
print(json.dumps({"told": told, "steps": steps, "loaded": sorted({"torch", "numpy"} & sys.modules.keys())}))
"""


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
@pytest.mark.parametrize("kind", ["directory", "gguf", "awq"])
def test_a_process_without_pytorch_has_the_same_bytes_merged(kind: str, form: str, tmp_path: Path) -> None:
    config, suffix = CONFIGS["llama"], ".gguf" if form == "gguf" else ""
    base = save_model(tmp_path / "base", config)
    adapter = save_adapter(tiny_model(config), tmp_path / "adapter", str(base), **SETTINGS["dora"])
    weights, tokenizer = random_weights(config), byte_level_tokenizer()
    if kind == "gguf":
        base = write_gguf(tmp_path / "base.gguf", config, weights, tokenizer=tokenizer)
    elif kind == "awq":
        base = tmp_path / "quantised"
        write_quantised(base, config, weights, AWQ, functools.partial(zero_points, method="awq"))
    if base.is_dir():
        tokenizer.save(str(base / "tokenizer.json"))
    options = {"base": str(base), "format": form}
    expected = merge(adapter, tmp_path / f"here{suffix}", **options)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PYTORCH, str(adapter), str(tmp_path / f"there{suffix}"), json.dumps(options)],
        env=os.environ | {"PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(done.stdout)
    assert said["loaded"] == []
    assert said["steps"][-1][0] == "merging"
    assert said["steps"][-1][1] == said["steps"][-1][2] > 0
    own = {"out", "files", "seconds", "peak_bytes", "predicted_bytes"}
    assert {name: value for name, value in said["told"].items() if name not in own} == {
        name: value for name, value in expected.items() if name not in own
    }
    assert said["told"]["peak_bytes"] < 128 << 20 < said["told"]["predicted_bytes"]
    here, there = (
        {path.name: path.read_bytes() for path in (place.iterdir() if place.is_dir() else [place])}
        for place in (tmp_path / f"here{suffix}", tmp_path / f"there{suffix}")
    )
    assert list(here.values()) == [there[name.replace("here", "there")] for name in here]
