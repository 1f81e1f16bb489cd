"""Adapters with each of PEFT's starts: read as PEFT reads them, or refused by everything that takes an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_adapters import merged_by_peft, save_model, tiny_model
from reference import CONFIGS
from safetensors.torch import load_file

from tightfit.profiles.api import profile
from tightfit.profiles.sources.lookup import resolve
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.results.adapter_changes import AdapterFolder
from tightfit.runtime.results.generation import pairs_of
from tightfit.runtime.results.merge import merge

CONFIG = CONFIGS["llama"]
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("starts") / "base", CONFIG)


def started(folder: Path, base: Path, start: Any, **convert: Any) -> Path:
    """An adapter that PEFT starts so, trained for a step that moves all its tensors."""
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=start)
    model = peft.get_peft_model(tiny_model(CONFIG), lora)
    model.peft_config["default"].base_model_name_or_path = str(base)
    if convert:  # as PEFT's own documentation does it: the start is saved before training
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder / "start")
        model.peft_config["default"].init_lora_weights = start
        convert = {"path_initial_model_for_weight_conversion": str(folder / "start")}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(folder, **convert)
    return folder


@pytest.mark.filterwarnings("ignore")  # of PEFT, about what it merges
@pytest.mark.parametrize(
    ("start", "converted"),
    [(True, False), (False, False), ("gaussian", False), ("orthogonal", False), ("eva", False), ("pissa", True), ("olora", True)],
)  # fmt: skip
def test_a_start_that_leaves_the_base_alone_is_read_as_by_peft(
    start: Any, converted: bool, base: Path, tmp_path: Path
) -> None:
    adapter = started(tmp_path / "adapter", base, start, **({"convert": True} if converted else {}))
    merge(adapter, tmp_path / "merged")
    exact = merged_by_peft(tiny_model(CONFIG), adapter).state_dict()
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    changed = [name for name in ours if any(target in name for target in TARGETS)]
    plain = tiny_model(CONFIG).state_dict()
    for name in changed:
        torch.testing.assert_close(ours[name], exact[name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(ours[name], plain[name], atol=1e-3)
    assert len(changed) == 2 * CONFIG["num_hidden_layers"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "mica"])
def test_another_is_refused_by_everything_that_takes_an_adapter(start: str, base: Path, tmp_path: Path) -> None:
    """Runs and evaluations: tests/runtime/session/test_given_adapter.py."""
    adapter = started(tmp_path / "adapter", base, start)
    assert json.loads((adapter / "adapter_config.json").read_text())["init_lora_weights"] == start
    source = resolve(str(base))
    for door in (
        lambda: profile(str(base), seq=16, device="phone", adapter=adapter),
        lambda: merge(adapter, tmp_path / "merged"),
        lambda: merge(adapter, tmp_path / "alone.gguf", format="gguf", adapter_only=True),
        lambda: AdapterFolder(adapter),
        lambda: pairs_of(adapter, "model.", source.entries, "it"),
    ):
        with pytest.raises(InputError, match=f"init_lora_weights is '{start}', a start that "):
            door()


def test_a_base_at_a_revision_of_the_hub_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = started(tmp_path / "adapter", base, True)
    told = json.loads((adapter / "adapter_config.json").read_text())
    changed = told | {"base_model_name_or_path": "some/model", "revision": "v2"}
    (adapter / "adapter_config.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match=r"its base is some/model at the revision 'v2', .* name its folder with base"):
        merge(adapter, tmp_path / "merged")
    merge(adapter, tmp_path / "merged", base=str(base))
