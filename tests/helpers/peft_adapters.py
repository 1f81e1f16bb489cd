"""Adapters that PEFT itself makes and saves for tiny models of transformers, with values that are not their initial
ones; and the models that PEFT merges them into.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor


def tiny_model(config: dict[str, Any]) -> Any:
    """A model with random float32 weights."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.dim() == 1 else 0.1))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(0.7)
    return model.eval()


def save_model(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """Save `tiny_model` in `dtype`, with config.json as it is published."""
    tiny_model(config).to(dtype).save_pretrained(folder)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | config | {"dtype": str(dtype).removeprefix("torch.")}))
    return folder


def save_adapter(model: Any, folder: Path, base: str, **settings: Any) -> Path:
    """An adapter for `model`, saved by PEFT, with random values in all that it trains."""
    lora = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    wrapped = peft.get_peft_model(model, lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                if "magnitude" in name:
                    parameter.mul_(1 + 0.3 * torch.randn(parameter.shape))
                else:
                    parameter.copy_(torch.randn(parameter.shape) * 0.1)
    wrapped.peft_config["default"].base_model_name_or_path = base
    wrapped.save_pretrained(folder)
    wrapped.unload()
    return folder


def merged_by_peft(model: Any, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()


def logits(model: Any) -> Tensor:
    """Of 2 x 12 random tokens, float32."""
    ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_ids=ids).logits.float()  # type: ignore[no-any-return]


def with_values(config: dict[str, Any], values: dict[str, Tensor]) -> Any:
    """A float32 model with the given values by name."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).float().eval()
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected
    assert all("lm_head" in name for name in missing)
    model.tie_weights()
    return model
