"""Independent references: the same small decoders in transformers + peft, trained by PyTorch autograd."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from traced import interpret, samples_of

from tightfit.profiles.schema import Profile
from tightfit.runtime.engine.cpu.operators import OPERATORS
from tightfit.runtime.engine.device.draws import Draws
from tightfit.runtime.engine.training.adapter import (
    BODY,
    CONFIG,
    WEIGHTS,
    adapter_config,
    adapter_key,
    initialise,
    trained_name,
)
from tightfit.runtime.engine.training.batches import open_batches
from tightfit.runtime.engine.training.records import RecordFile
from tightfit.runtime.engine.weights.store import WeightStore

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 256, "hidden_act": "silu",
    },
    "qwen2": {
        "model_type": "qwen2", "vocab_size": 300, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 256, "rope_theta": 1e6, "hidden_act": "silu",
    },
    "gemma3_text": {
        "model_type": "gemma3_text", "vocab_size": 640, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "max_position_embeddings": 256, "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "hidden_activation": "gelu_pytorch_tanh",
    },
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen3 with biases": CONFIGS["llama"] | {"model_type": "qwen3", "head_dim": 32, "attention_bias": True},
    "gemma3_text with biases": CONFIGS["gemma3_text"] | {"attention_bias": True},
    "llama with biases": CONFIGS["llama"] | {"attention_bias": True, "mlp_bias": True},
    "mistral": CONFIGS["llama"] | {"model_type": "mistral", "sliding_window": 8},
}
MIXTURE: dict[str, Any] = CONFIGS["llama"] | {
    "model_type": "qwen3_moe", "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True,
    "mlp_only_layers": [1],
}  # fmt: skip
"""A mixture of experts with a dense layer among them, which has no pairs."""
"""Configs with switches on that the families' configs above leave off."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


TRAINED_AGAIN: dict[str, Any] = {"inference_mode": False, "base_model_name_or_path": None}
"""Fields of an adapter's config with which peft makes a new one to train."""

# --- models -----------------------------------------------------------------------------------------------------------


def random_model(config: dict[str, Any]) -> Any:
    """A transformers model with random weights in float32; norms and biases are not all 1 or 0 either."""
    import transformers

    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.dim() == 1 else 0.12))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(0.7)
    return model


def checkpoint(config: dict[str, Any], folder: Path) -> Any:
    """A random model, saved in `folder` with the config as it was given."""
    model = random_model(config)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return model


def take(model: Any, weights: Mapping[str, Tensor], config: dict[str, Any], body: str = BODY) -> None:
    """Copy weights with tightfit's names into a transformers model; `body` is its prefix of the decoder's names."""
    from tightfit.profiles.models.transformers_decoder import facts

    theirs = dict(model.named_parameters()) | dict(model.named_buffers())
    found = {tensor.name: tensor for tensor in facts(config).tensors}
    with torch.no_grad():
        for name, value in weights.items():
            key = body + name.removeprefix(BODY) if name.startswith(BODY) else name
            if key in theirs:
                theirs[key].copy_(_as_theirs(value, found[name]))


def _as_theirs(value: Tensor, told: Any) -> Tensor:
    """A tensor as transformers has it: matrices of experts in three dimensions, gates and ups of gpt-oss in turn."""
    if told.experts:
        value = value.view(told.experts, -1, value.shape[1])
    if told.in_turn:
        value = torch.stack(value.chunk(2, dim=1), dim=2).flatten(1, 2)
    return value.mT if told.transposed else value


def peft_model(
    config: dict[str, Any], weights: Mapping[str, Tensor], settings: Mapping[str, Any], dtype: torch.dtype
) -> torch.nn.Module:
    """A transformers + peft model with the given weights (base and LoRA, by Hugging Face name) loaded; `settings` as
    adapter_config.json has them.
    """
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="sdpa"
    )
    wrapped = peft.get_peft_model(model.to(dtype), peft.LoraConfig(**(dict(settings) | TRAINED_AGAIN)))
    wrapped.train()
    theirs = dict(wrapped.named_parameters()) | dict(wrapped.named_buffers())
    with torch.no_grad():
        for name, value in weights.items():
            own = theirs[peft_name(name, theirs)]
            own.copy_(value.reshape(own.shape))  # transformers has the matrices of experts in three dimensions
    return wrapped


def all_layers(rank: int, alpha: float) -> dict[str, Any]:
    """Settings of LoRA pairs on all linear layers of the decoders above."""
    return {"r": rank, "lora_alpha": alpha, "task_type": "CAUSAL_LM", "target_modules": TARGETS, "lora_dropout": 0.0}


def peft_name(name: str, theirs: Mapping[str, Any]) -> str:
    """Among peft's names, that of a tensor with the name that it has in transformers or in an adapter."""
    stem, _, last = name.rpartition(".")
    for candidate in (
        f"base_model.model.{name}",
        f"base_model.model.{stem}.base_layer.{last}",
        f"base_model.model.{stem}.base_layer.base_layer.{last}",
        f"base_model.model.{stem}.default.{last}",
    ):
        if candidate in theirs:
            return candidate
    raise KeyError(name)


class MaskedDropout(torch.nn.Module):
    """In the place of a pair's nn.Dropout: the mask that tightfit's operators draw, in a run those of `layer`."""

    def __init__(self, p: float, site: int, draws: Draws | None = None, layer: str = "") -> None:
        super().__init__()
        self.p, self.site, self.layer = p, site, layer
        self.drawn = {} if draws is None else {"draws": draws}

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.empty(x.numel() // x.shape[-1], x.shape[-1])
        for draws in self.drawn.values():
            draws.layer = self.layer
        OPERATORS["tightfit.dropout"](torch.ones_like(mask), self.p, self.site, out=(mask,), **self.drawn)
        return x * mask.view(x.shape)


# --- weights and adapters ---------------------------------------------------------------------------------------------


def stored_weights(store: str | Path | None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor of a store, unpacked to `dtype`, by tightfit's names."""
    assert store is not None
    with WeightStore.open(Path(store)) as opened:
        weights = {name: torch.empty(entry.shape, dtype=dtype) for name, entry in opened.entries.items()}
        for name, out in weights.items():
            opened.load(name, out)
    return weights


def starting_weights(made: Profile, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """The weights that a run of a profile starts from, by tightfit's names: the dequantised base, with matrices in
    `dtype`, and the adapter's initial values.
    """
    weights: dict[str, Tensor] = {}
    assert made.model.store is not None
    with WeightStore.open(made.model.store) as store:
        for name, entry in store.entries.items():
            weights[name] = torch.empty(entry.shape, dtype=torch.float32 if len(entry.shape) == 1 else dtype)
            store.load(name, weights[name])
    for tensor in made.tensors:
        if tensor.kind == "trainable":
            weights[tensor.name] = torch.empty(tensor.shape)
            initialise(tensor.name, seed, weights[tensor.name])
    return weights


def write_adapter(
    place: Path, lora: Mapping[str, Any], trained: Mapping[str, Tensor], body: str = BODY
) -> dict[str, Tensor]:
    """Write an adapter as a run does, and return its tensors."""
    place.mkdir()
    pairs = [name for name in trained if ".lora_" in name]
    (place / CONFIG).write_text(json.dumps(adapter_config(lora, pairs, "base", body)))
    tensors: dict[str, Tensor] = {}
    for name, value in trained.items():
        key = adapter_key(name, body)
        tensors[key] = torch.cat([tensors[key], value]) if key in tensors else value
    save_file(tensors, place / WEIGHTS)
    return tensors


def held_by_peft(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter in a model of peft, and whatever else it would train, by the keys of adapters."""
    return {
        name.replace("modules_to_save.default.", "")
        .replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector")
        .replace(".default.", "."): value
        for name, value in model.named_parameters()
        if ".lora_" in name or value.requires_grad
    }


def trained_by_peft(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The same of a decoder whose names in transformers are tightfit's, by tightfit's names."""
    return {trained_name(key): value for key, value in held_by_peft(model).items()}


def adapted_by_peft(model: Any, place: Path) -> Any:
    """peft's model with the adapter in `place`, of which it holds every tensor as the file has it, to be trained
    further.
    """
    import peft

    loaded = peft.PeftModel.from_pretrained(model, place, is_trainable=True, autocast_adapter_dtype=False).eval()
    held, tensors = held_by_peft(loaded), load_file(place / WEIGHTS)
    assert held.keys() == tensors.keys()
    for key, value in tensors.items():
        assert torch.equal(held[key].detach(), value.to(model.dtype)), key
    return loaded


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients of the adapter in a model of peft, in float32, by the keys of adapters."""
    gradients = {}
    for key, value in held_by_peft(model).items():
        assert value.grad is not None, key
        gradients[key] = value.grad.float()
    return gradients


# --- losses and steps -------------------------------------------------------------------------------------------------


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Of all labelled tokens."""
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=-100)


def told_of_padding(model: Any, labels: Tensor) -> dict[str, Tensor]:
    """What a model is given beside tokens if it has a loss of routers, which counts no padding: what is behind the last
    label of a row.
    """
    if not getattr(model.config, "output_router_logits", False):
        return {}
    ends = [max((place + 1 for place, label in enumerate(row) if label >= 0), default=0) for row in labels.tolist()]
    return {"attention_mask": torch.tensor([[int(place < end) for place in range(labels.shape[1])] for end in ends])}


def router_loss(model: Any, made: Any) -> Any:
    """The loss of a model's routers as it is added to that of tokens, given what the model `made`; 0 if it has none."""
    loss = getattr(made, "aux_loss", None)
    return 0.0 if loss is None else model.config.router_aux_loss_coef * loss


def loss_of(model: torch.nn.Module, ids: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:
    """That of a language model of transformers or peft on a batch, with the loss of its routers if its config asks for
    it; with `positions` each sample of a row by itself, without padding and without that.
    """
    if positions is None:
        made = model(input_ids=ids, **told_of_padding(model, labels))
        return mean_loss(made.logits, labels) + router_loss(model, made)
    samples = samples_of({"input_ids": ids, "labels": labels, "positions": positions})
    labelled = [(tokens, own) for tokens, own in samples if bool((own >= 0).any())]
    logits = torch.cat([model(input_ids=tokens[None]).logits[0] for tokens, _ in labelled])
    return mean_loss(logits, torch.cat([own for _, own in labelled]))


def training_batches(
    records: str | Path,
    count: int,
    batch: int,
    seq: int,
    seed: int = 0,
    *,
    packing: bool = False,
) -> list[list[Tensor]]:
    """[ids, labels] of the first `count` training steps on prepared data, and with `packing`, where samples share rows,
    also [positions]; all padded to `seq`. `records` is its file or the folder of a run.
    """
    if Path(records).is_dir():
        records = next((Path(records) / "data").glob("train*"))
    opened, found = open_batches(str(records), seed, packing=packing), []
    for number in range(count):
        found.append([torch.empty(batch, seq, dtype=torch.int64) for _ in range(3 if packing else 2)])
        opened.training(number, found[-1])
    opened.close()
    return found


def evaluated(model: torch.nn.Module, out: Path, batch: int, seq: int) -> float:
    """The mean loss of all labelled tokens of the held-out data of a run in `out`."""
    inputs = [torch.empty(batch, seq, dtype=torch.int64) for _ in range(2)]
    opened = open_batches(str(next((out / "data").glob("eval*"))), 0)
    total, count = 0.0, 0
    for number in range(opened.evaluation_count(inputs)):
        opened.evaluation(number, inputs)
        labelled = int((inputs[1] >= 0).sum())
        with torch.no_grad():
            total += float(loss_of(model, *inputs)) * labelled
        count += labelled
    opened.close()
    return total / count


def evaluated_apart(model: torch.nn.Module, records: Path) -> tuple[float, float, int]:
    """What an evaluation on prepared data has to find, of one sample at a time and without padding: the mean loss of
    all labelled tokens but those of wrong choices, the share of questions whose right choice is the likeliest, and
    their number.
    """
    total, labelled = 0.0, 0
    choices: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    with RecordFile.open(records) as opened:
        for number in range(len(opened)):
            record = opened.read(number)
            with torch.no_grad():
                logits = model(input_ids=record.input_ids[None].long()).logits[0]
            loss = float(torch.nn.functional.cross_entropy(logits, record.labels.long(), reduction="sum"))
            if record.choice < 0 or record.answer:
                total, labelled = total + loss, labelled + int((record.labels >= 0).sum())
            if record.choice >= 0:
                choices[record.example].append((loss, record.answer))
    right = sum(min(one)[1] for one in choices.values())
    return total / labelled, right / len(choices), len(choices)


def trained_by_adamw(
    parameters: Iterable[Tensor], loss: Callable[..., Tensor], batches: Iterable[Sequence[Tensor]], *, lr: float
) -> tuple[list[float], torch.optim.AdamW]:
    """A step of torch.optim.AdamW on each batch: the losses, and its state. `loss` is called with the tensors of a
    batch.
    """
    optimizer = torch.optim.AdamW(list(parameters), lr=lr, weight_decay=0.0)
    losses = []
    for batch in batches:
        found = loss(*batch)
        found.backward()
        losses.append(float(found.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses, optimizer


def relative_error(own: Tensor, exact: Tensor) -> float:
    return float((own - exact).norm() / exact.norm())


def errors_above(tolerance: float, own: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative errors that are larger, by name."""
    errors = {name: relative_error(own[name], value) for name, value in exact.items()}
    return {name: error for name, error in errors.items() if not error <= tolerance}


def updates_of_large_batches(
    made: Profile,
    out: Path,
    steps: int,
    optimizer_of: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    *,
    limit: float | None = None,
    rates: Sequence[float] = (),
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """The updates of a run in `out` of a decoder of CONFIGS, whose steps have one sample each, by transformers + peft:
    the samples of an update in one batch, its loss a mean over all labelled tokens. `limit`: of the norm of the
    gradients, `rates`: of the updates.

    Returns the losses of the samples, the norms and the adapter.
    """
    config, lora = CONFIGS[made.model.config["model_type"]], made.model.lora
    model = peft_model(config, starting_weights(made), all_layers(lora["rank"], lora["alpha"]), torch.float32)
    trained = trained_by_peft(model)
    optimizer = optimizer_of(trained.values())
    batches = training_batches(out, steps, 1, made.seq)
    losses, norms, labelled = [], [], set()
    for update, first in enumerate(range(0, steps, made.accumulate)):
        ids, labels = (torch.cat(parts) for parts in zip(*batches[first : first + made.accumulate]))
        logits = model(input_ids=ids).logits
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        counts = (labels >= 0).sum(1)
        labelled.update(counts.tolist())
        losses += (each.sum(1) / counts).tolist()
        (each.sum() / counts.sum()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), math.inf if limit is None else limit)))
        if rates:
            optimizer.param_groups[0]["lr"] = rates[update]
        optimizer.step()
        optimizer.zero_grad()
    assert len(labelled) > 1  # or a mean of means would do as well
    return losses, norms, {name: parameter.detach() for name, parameter in trained.items()}


def state_of(out: Path, step: int) -> dict[str, Tensor]:
    """The adapter and the optimizer's states in a checkpoint of a run."""
    folder = out / f"checkpoint-{step}"
    return load_file(folder / WEIGHTS) | load_file(folder / "optimizer.safetensors")


def errors_beside_peft(
    traced: Any,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    batch: dict[str, Tensor],
    settings: dict[str, Any],
) -> tuple[float, dict[str, float]]:
    """Relative errors of the loss, and of the gradients by the names of what is trained, against transformers and peft
    in float32, whose pairs have the `settings` of adapter_config.json. Both train the same.
    """
    made = interpret(traced, weights, batch)
    model = peft_model(config, weights, settings, torch.float32)
    loss = loss_of(model, batch["input_ids"], batch["labels"])
    loss.backward()
    exact = {trained_name(key): gradient for key, gradient in gradients_of(model).items()}
    assert exact.keys() == {tensor.name for tensor in traced.tensors if tensor.kind == "trainable"}
    errors = {name: relative_error(made[f"grad:{name}"], gradient) for name, gradient in exact.items()}
    return abs(float(made[traced.loss]) / float(loss.detach()) - 1), errors
