"""Writes small random models and tokenizers to disk: GGUF files and Hugging Face directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from tightfit.profiles.sources.gguf_metadata import read_header

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "Is this review positive or negative? positive negative",
    "It's what they've said: we're 12 of 345, I'd say; she'll know.",
    "user assistant system\n\nnaïve café — 日本語 \t  spaces   and\nlines",
] * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SCALES_OF_K_QUANTS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Places of float16 numbers in a block, as ggml-common.h has them."""


def byte_level_tokenizer(size: int = 320) -> Tokenizer:
    """Byte-level BPE as in SmolLM2: digits split off one by one, then GPT-2's pattern."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def sentence_piece_tokenizer(size: int = 420) -> Tokenizer:
    """BPE over ▁-marked text with byte fallback, as transformers builds it for Llama 2 and Gemma."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    special = [AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    pieces = [AddedToken(f"<0x{byte:02X}>", normalized=False) for byte in range(256)]
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=size, special_tokens=special + pieces, show_progress=False)
    )
    return tokenizer


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random float32 weights by Hugging Face name; norms and biases are not all 1 or 0 either."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator) * (0.2 if p.dim() == 1 else 0.05)
        + (0.5 if "norm" in name else 0)
        for name, p in model.named_parameters()
    }


def llama_cpp_permute(weights: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The rows of q or k as `permute` of llama.cpp's convert_hf_to_gguf.py reorders them."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps", "mlp.experts.down_proj": "ffn_down_exps",
}  # fmt: skip


def gguf_name(name: str, gemma: bool) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, inner = stem.split(".", 3)
        norms = {
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        }
        special = norms if gemma else {"post_attention_layernorm": "ffn_norm"}
        return f"blk.{layer}.{special.get(inner) or GGUF_NAMES[inner]}.{suffix}"
    return f"{GGUF_NAMES[stem]}.{suffix}"


def experts_apart(weights: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """The weights with the matrices of experts as llama.cpp has them: gates, ups and downs in three dimensions each."""
    apart = {}
    for name, tensor in weights.items():
        stem = name.removesuffix("gate_up_proj")
        if name.endswith("experts.gate_up_proj"):
            gates, ups = tensor.view(experts, 2, -1, tensor.shape[-1]).unbind(1)
            apart |= {f"{stem}gate_proj.weight": gates, f"{stem}up_proj.weight": ups}
        elif name.endswith("experts.down_proj"):
            apart[f"{name}.weight"] = tensor.view(experts, -1, tensor.shape[-1])
        else:
            apart[name] = tensor
    return apart


def k_quant(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    """Random blocks of a K-quant with moderate scales, needed because gguf's Python package cannot quantise to them."""
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    generator = np.random.default_rng(seed)
    *rows, columns = shape
    blocks = generator.integers(0, 256, (*rows, columns // 256, size), dtype=np.uint8)
    for place in SCALES_OF_K_QUANTS[kind]:
        scales = generator.uniform(0.0001, 0.001, (*rows, columns // 256, 1)).astype(np.float16)
        blocks[..., place : place + 2] = scales.view(np.uint8)
    return blocks.reshape(*rows, -1)


def write_gguf(
    path: Path,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    kinds: dict[str, str] | None = None,
    *,
    default: str = "Q4_1",
    tokenizer: Tokenizer | None = None,
    metadata: dict[str, Any] | None = None,
    leave_out: tuple[str, ...] = (),
    alignment: int | None = None,
) -> Path:
    """Write weights as llama.cpp's converter would: q and k permuted for Llama, Gemma's norms plus one."""
    family = {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}.get(config["model_type"], config["model_type"])
    gemma = family == "gemma3"
    writer = gguf.GGUFWriter(path, family)
    numbers: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "context_length": config["max_position_embeddings"],
    }
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    numbers["attention.key_length"] = head_dim
    if gemma:
        numbers["attention.sliding_window"] = config["sliding_window"]
    if "num_experts" in config:
        numbers["expert_count"] = config["num_experts"]
        numbers["expert_used_count"] = config["num_experts_per_tok"]
        numbers["expert_feed_forward_length"] = config["moe_intermediate_size"]
        weights = experts_apart(weights, config["num_experts"])
    for key, value in numbers.items():
        if key not in leave_out:
            writer.add_uint32(f"{family}.{key}", value)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_float32(f"{family}.rope.freq_base", config.get("rope_theta", 10000.0))
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer)
    for name, tensor in weights.items():
        data = tensor.numpy().astype(np.float32)
        if family == "llama" and "q_proj" in name:
            data = llama_cpp_permute(data, config["num_attention_heads"])
        if family == "llama" and "k_proj" in name:
            data = llama_cpp_permute(data, config["num_key_value_heads"])
        if gemma and name.endswith("norm.weight"):
            data = data + 1
        kind = (kinds or {}).get(name, "F32" if data.ndim == 1 else default)
        quantised = gguf.GGMLQuantizationType[kind]
        encoded = k_quant(kind, data.shape, len(name)) if kind in SCALES_OF_K_QUANTS else quantize(data, quantised)
        writer.add_tensor(gguf_name(name, gemma), np.ascontiguousarray(encoded), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def header_of(path: Path) -> dict[str, Any]:
    """What a page sends of a file: scalar metadata, and shapes as they stand in the file."""
    header = read_header(path)
    return {
        "metadata": {k: v for k, v in header.metadata.items() if isinstance(v, str | int | float)},
        "tensors": {t.name: {"shape": list(reversed(t.shape)), "format": t.kind} for t in header.tensors},
    }


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = sorted(model["vocab"].items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(index) for index in range(len(tokens))])
        types = [2 if t == "<unk>" else 3 if t in ("<s>", "</s>") else 6 if t.startswith("<0x") else 1 for t in tokens]
        names = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
        types = [3 if token in SPECIAL else 1 for token in tokens]
        names = {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>", "unk": "<|endoftext|>"}
        writer.add_add_bos_token(False)
        writer.add_chat_template(CHAT)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for kind, token in names.items():
        getattr(writer, f"add_{kind}_token_id")(model["vocab"][token])


def write_directory(
    path: Path,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    *,
    tokenizer: Tokenizer | None = None,
    shards: int = 1,
) -> Path:
    """A Hugging Face directory: config.json, one or several safetensors files, tokenizer files."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    names = list(weights)
    if shards == 1:
        save_file(weights, path / "model.safetensors")
    else:
        where = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = {name: weights[name] for name in names[shard::shards]}
            save_file(part, path / file)
            where |= dict.fromkeys(part, file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    if tokenizer is not None:
        tokenizer.save(str(path / "tokenizer.json"))
        settings = {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": {"content": "<|im_end|>"},
            "chat_template": CHAT,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path
