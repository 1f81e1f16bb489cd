"""Which modules are trained in full, and in what slices and layers."""

from __future__ import annotations

import pytest
import torch
from reference import CONFIGS
from traced import trace_decoder

from tightfit.profiles.models import saved_modules
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.models.saved_modules import MOST_LAYERS, SLICE_BYTES, SavedModule, TrainedEmbedding, chosen
from tightfit.profiles.tracing.traced import Trace
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.adapter import adapter_key, table_slice

EMBEDDING = SavedModule(name="model.wte", called="transformer.wte", weight="model.wte.weight")
HEAD = SavedModule(name="lm_head", called="lm_head", weight="model.wte.weight")


def test_modules_are_found_by_the_ends_of_the_names_that_peft_has() -> None:
    there = [EMBEDDING, HEAD]
    assert chosen(["lm_head", "wte"], there, "it") == there
    assert chosen(["transformer.wte"], there, "it", ["transformer.wte", "transformer.wpe"]) == [EMBEDDING]
    assert chosen([], there, "it") == []


@pytest.mark.parametrize(
    ("name", "there", "modules", "message"),
    [
        ("wpe", [EMBEDDING, HEAD], [], r"modules_to_save 'wpe': of it these modules can be trained in full: wte, lm_head; others"),
        ("norm", [EMBEDDING, HEAD], [], r"modules_to_save 'norm': .* stay as they are: give one of these, or leave the option out"),
        (
            "lm_head",
            [EMBEDDING, SavedModule(name="lm_head", called="lm_head", weight="w", refusal="it has a bias")],
            [],
            r"modules_to_save 'lm_head': it has a bias; of it these modules can be trained in full: wte$",
        ),
        (
            "wte",
            [EMBEDDING, HEAD],
            ["vision.wte", "transformer.wte"],
            r"PEFT would take vision\.wte for it as well; give the module's whole name, transformer\.wte",
        ),
    ],
)  # fmt: skip
def test_other_modules_are_refused(name: str, there: list[SavedModule], modules: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        chosen([name], there, "it", modules)


@pytest.mark.parametrize(("rows", "width"), [(49_152, 576), (151_936, 896), (262_144, 2560), (320, 64), (1, 8)])
def test_slices_cover_a_table_in_few_layers(rows: int, width: int) -> None:
    with torch.device("meta"):
        made = TrainedEmbedding(rows, width, torch.bfloat16)
    assert len(made) <= MOST_LAYERS
    names = [name for name, _ in made.named_parameters()]
    found = [table_slice(f"model.embed_tokens.modules_to_save.{name}") for name in names]
    assert all(own is not None and own.module == "model.embed_tokens" for own in found)
    bounds = [(own.start, own.stop) for own in found if own is not None]
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    assert bounds[-1][1] == rows
    assert [(stop - start, width) for start, stop in bounds] == [tuple(one.shape) for one in made.parameters()]
    assert all(one.dtype is torch.float32 for one in made.parameters())
    most = max(4 * (stop - start) * width for start, stop in bounds)
    assert most <= max(SLICE_BYTES, 4 * 128 * width)


def test_names_in_an_adapter() -> None:
    assert (
        adapter_key("model.wte.modules_to_save.3.weight[384:512]", "transformer.")
        == "base_model.model.transformer.wte.weight"
    )
    assert adapter_key("lm_head.modules_to_save.0.weight[0:128]", "transformer.") == "base_model.model.lm_head.weight"
    assert table_slice("model.layers.0.self_attn.q_proj.lora_A.weight") is None
    assert table_slice("model.embed_tokens.weight[0:128]") is None  # of a frozen head


def traced(names: tuple[str, ...], seq: int = 24) -> Trace:
    lora = LoraConfig(rank=4, modules_to_save=names)
    return trace_decoder(CONFIGS["llama"] | {"vocab_size": 1000}, torch.bfloat16, 2, seq, lora)


@pytest.mark.slow
def test_slices_are_equal_layers_whose_gradients_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_modules, "SLICE_BYTES", 0)  # as few rows as there may be: 128
    made = traced(("embed_tokens", "lm_head"))
    for module in ("model.embed_tokens", "lm_head"):
        layers = [layer for layer in made.layers if layer.name.startswith(f"{module}.modules_to_save.")]
        assert len(layers) == 8
        # The first takes nothing that needs a gradient, the last has fewer rows.
        assert len({layer.program for layer in layers}) == 3
    programs = {program.name: program for program in made.programs}
    sums = [programs[layer.program] for layer in made.layers if layer.name.startswith("sum(")]
    assert len(sums) == 7
    assert all(len(program.operators) == 1 for program in sums)
    names = {tensor.name: tensor for tensor in made.tensors}
    slices = [name for name in names if table_slice(name)]
    assert len(slices) == 16
    assert all(names[name].movable and names[name].kind == "trainable" for name in slices)
    assert all(tensor.movable == (tensor.kind == "trainable") for tensor in made.tensors)
    readers = [
        operator
        for program in made.programs
        for operator in program.operators
        if operator.target in ("tightfit.table_rows", "tightfit.table_head")
    ]
    assert readers
    assert not any(operator.recomputable for operator in readers)


@pytest.mark.slow
def test_the_base_of_a_tied_model_stays() -> None:
    names = {tensor.name: tensor.kind for tensor in traced(("embed_tokens",)).tensors}
    assert names["model.embed_tokens.weight"] == "weight"  # whose rows the labels' logits take
    assert names["model.embed_tokens.weight[0:1000]"] == "weight"
    assert names["model.embed_tokens.modules_to_save.0.weight[0:1000]"] == "trainable"
    names = {tensor.name: tensor.kind for tensor in traced(("lm_head",)).tensors}
    assert names["model.embed_tokens.weight"] == "weight"
    assert "model.embed_tokens.weight[0:1000]" not in names
    assert names["lm_head.modules_to_save.0.weight[0:1000]"] == "trainable"
