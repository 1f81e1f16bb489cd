"""Decoders that transformers runs while they are traced: each family's logits, loss and LoRA gradients against
transformers + peft under autograd, its adapter loaded by peft, and what docs/models.md says of its attention."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_families import FAMILIES, FORMS, MIXTURES, VOCABULARY, Forms, sized
from places import SOURCES
from reference import (
    adapted_by_peft,
    checkpoint,
    errors_above,
    evaluated,
    gradients_of,
    held_by_peft,
    loss_of,
    mean_loss,
    relative_error,
    router_loss,
    stored_weights,
    take,
    told_of_padding,
    trained_by_adamw,
    training_batches,
    write_adapter,
)
from safetensors.torch import load_file, save_file
from tiny_models import byte_level_tokenizer
from torch._subclasses import FakeTensorMode
from traced import interpret, loss_and_gradients, random_batch, samples_of, shared_batch, trace_decoder, trace_step
from transformers import AutoConfig

from tightfit.planner.model_planner import ModelPlanner
from tightfit.planner.plan import plan
from tightfit.profiles.api import profile
from tightfit.profiles.measuring.whole_step import run_step
from tightfit.profiles.models.decoder_module import without_values
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.models.transformers_decoder import AnyDecoder, facts
from tightfit.profiles.sources.lookup import resolve
from tightfit.profiles.sources.transformers_source import any_directory_source
from tightfit.profiles.steps import decoder_trace
from tightfit.profiles.tracing.traced import Trace
from tightfit.profiles.weights.store_file import build_store
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.adapter import BODY, adapter_key, initialise, trained_name
from tightfit.runtime.session.launch import run

pytest.importorskip("transformers")
pytest.importorskip("peft")
# peft says that it transposes the weights of GPT-2's own linear layers, as it should
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")

RANK, ALPHA, BATCH, SEQ = 4, 8.0, 2, 16
HALVES = ("Llama, yarn scaling", "Qwen3", "Qwen3.5 (text)", "Gemma 2", "Gemma 4 (text)", "Phi-4-mini", "GPT-2", "LFM2")
"""Families that are also compared in bfloat16: each has something of its own that computes in it."""


class Case:
    """A family's tiny model on both sides, with the same weights: those of the store."""

    def __init__(
        self, config: dict[str, Any], folder: Path, dtype: str, written: str = "", *, experts: bool = False
    ) -> None:
        """`written`: config.json, where it is another text than `config`. `experts`: with pairs for those of
        mixtures.
        """
        self.model = checkpoint(config, folder)
        (folder / "config.json").write_text(written or json.dumps(config))
        self.source = any_directory_source(folder)
        self.body = self.source.config.get("adapter_body", BODY)
        lora = LoraConfig(rank=RANK, alpha=ALPHA, experts=experts)
        self.traced: Trace
        self.traced, decoder = decoder_trace.trace_decoder(self.source, BATCH, SEQ, lora, dtype, lambda *_: None)
        self.rows_apart = decoder.rows_apart
        self.weights = stored_weights(build_store(self.source, folder / "stores"))
        generator = torch.Generator().manual_seed(1)
        self.trained = {
            tensor.name: torch.randn(tensor.shape, generator=generator) * 0.1
            for tensor in self.traced.tensors
            if tensor.kind == "trainable"
        }
        self.batch = random_batch({"vocab_size": VOCABULARY}, BATCH, SEQ)
        wide = {tensor.name.split("[")[0]: getattr(torch, tensor.dtype) for tensor in self.traced.tensors}
        matrices = {tensor.name for tensor in facts(config).tensors if tensor.role != "other"}
        for name in self.weights:
            kind = wide.get(name, getattr(torch, dtype) if name in matrices else torch.float32)
            self.weights[name] = self.weights[name].to(kind)
        take(self.model, self.weights, config, self.body)
        self.place = folder / "adapter"
        told = decoder.lora if experts else {"rank": RANK, "alpha": ALPHA}
        write_adapter(self.place, told, self.trained, self.body)

    def theirs(self, dtype: torch.dtype = torch.float32) -> tuple[float, dict[str, torch.Tensor]]:
        """(loss, LoRA gradients) by transformers + autograd and peft, which reads the adapter as a run writes it;
        `logits` are kept.
        """
        model = adapted_by_peft(self.model.to(dtype), self.place)
        labels = self.batch["labels"]
        made = model(input_ids=self.batch["input_ids"], **told_of_padding(model, labels))
        logits = made.logits.float()
        self.logits = logits.detach()
        return self.gradients(model, mean_loss(logits, labels) + router_loss(model, made))

    def theirs_apart(self) -> tuple[float, dict[str, torch.Tensor]]:
        """The same with each sample of a row in a row of its own, whose length decides about frequencies (longrope)."""
        model = adapted_by_peft(self.model.to(torch.float32), self.place)
        made = []
        for tokens, labels in samples_of(self.batch):
            row = torch.nn.functional.pad(tokens, (0, SEQ - len(tokens)))
            made.append((model(input_ids=row[None]).logits[0, : len(tokens)], labels))
        logits, labels = (torch.cat(parts) for parts in zip(*made))
        return self.gradients(model, mean_loss(logits, labels))

    def gradients(self, model: Any, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
        loss.backward()
        gradients = gradients_of(model)
        assert gradients.keys() == {adapter_key(name, self.body) for name in self.trained}
        model.unload()
        return float(loss.detach()), {name: gradients[adapter_key(name, self.body)] for name in self.trained}

    def ours(self) -> tuple[float, dict[str, torch.Tensor]]:
        return loss_and_gradients(self.traced, self.weights | self.trained, self.batch, compiled=True)

    def forward(self, layers: Sequence[Any]) -> Callable[..., dict[str, torch.Tensor]]:
        """The forward of some of the traced layers: call(tensors, names) returns those of the names that it makes."""
        described = [layer.model_dump() for layer in layers]
        programs = {}
        for program in self.traced.programs:
            if program.name in {layer.program for layer in layers}:
                programs[program.name] = program.model_dump()
                programs[program.name]["operators"] = [
                    op.model_dump() for op in program.operators if op.phase == "forward"
                ]
        given = interpret(self.traced, self.weights | self.trained, self.batch, lambda _, __, tensors: tensors)

        def call(tensors: dict[str, torch.Tensor], wanted: Sequence[str]) -> dict[str, torch.Tensor]:
            with torch.no_grad():
                return run_step(described, programs, given | tensors, wanted)

        return call

    def operators(self, layer: Any) -> list[Any]:
        """The operators of a layer's forward."""
        program = next(program for program in self.traced.programs if program.name == layer.program)
        return [operator for operator in program.operators if operator.phase == "forward"]

    def log_probabilities(self) -> torch.Tensor:
        """Of every token at every position, by the traced programs: float32 [batch, seq, vocabulary].

        The blocks run once. The head runs once for each token, which all labels then are: its token losses are the
        negative log probabilities of that token. So each logit is compared, but for what all of a position have in
        common.
        """
        wanted = str(self.traced.token_losses)
        head = next(layer for layer in self.traced.layers if wanted in layer.bindings.values())
        read = [head.bindings[name] for op in self.operators(head) for name in op.inputs if name in head.bindings]
        hidden = self.forward([layer for layer in self.traced.layers if layer is not head])({}, read)
        losses = self.forward([head])
        made = [
            losses(hidden | {"labels": torch.full((BATCH, SEQ), token)}, [wanted])[wanted]
            for token in range(VOCABULARY)
        ]
        return -torch.stack(made, -1).view(BATCH, SEQ, VOCABULARY)

    def forms(self) -> Forms:
        """What the trace has of attention."""
        places = []
        for layer in self.traced.layers:
            for operator in self.operators(layer):
                if operator.target == "tightfit.attention":
                    cosines = operator.args[3]["operand"]
                    name = layer.bindings.get(cosines["value"]) or f"{layer.name}/{cosines['value']}"
                    places.append((name, cosines, operator.args[5] is not None))
        made = self.forward(self.traced.layers)({}, [name for name, _, _ in places])
        turned = [
            bool((made[name].as_strided(of["size"], of["stride"], of.get("offset", 0)) != 1).any())
            for name, of, _ in places
        ]
        told = self.model.config
        kinds = list(getattr(told, "layer_types", None) or ["full_attention"] * told.num_hidden_layers)
        others = {"linear_attention": "gated DeltaNet", "conv": "convolutions"}
        parts = ["operator" if places else "as traced"]
        if any(masked for _, _, masked in places):
            parts.append("sliding windows")
        parts += [f"{name} as traced" for kind, name in others.items() if kind in kinds]
        assert len(places) in (0, sum(kind not in others for kind in kinds))
        rotates = getattr(told, "rope_parameters", None) or getattr(told, "rotary_dim", None)
        rotation = "before attention" if rotates else "none"
        if any(turned):
            rotation = "in attention" if all(turned) else "in attention, not in all layers"
        return Forms(rotation=rotation, attention=", ".join(parts), rows_apart=self.rows_apart)


MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
HYBRIDS = {
    "Granite 4": sized(
        "granitemoehybrid", num_local_experts=0, num_experts_per_tok=0, layer_types=["mamba", "attention"], shared_intermediate_size=96,
        **MAMBA,
    ),
    "Bamba": sized("bamba", attn_layer_indices=[1], **MAMBA),
    "Falcon-H1": sized("falcon_h1", mamba_d_ssm=128, lm_head_multiplier=0.5, **MAMBA),
    "Nemotron-H": sized(
        "nemotron_h", num_hidden_layers=3, layers_block_type=["mamba", "attention", "mlp"], mamba_num_heads=8, mamba_head_dim=16,
        ssm_state_size=8, n_groups=1,
    ),
}  # fmt: skip
"""of Mamba and attention, whose configs transformers writes with infinite floats"""


@pytest.mark.slow
@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_of_mamba_and_attention_train_as_by_transformers_and_peft(family: str, tmp_path: Path) -> None:
    written = AutoConfig.for_model(**HYBRIDS[family]).to_json_string()
    assert '"__float__": "Infinity"' in written
    case = Case(HYBRIDS[family], tmp_path, "float32", written)
    (loss, gradients), (own_loss, own) = case.theirs(), case.ours()
    assert own_loss == pytest.approx(loss, rel=1e-5)
    assert errors_above(1e-4, own, gradients) == {}


@pytest.mark.slow_but_for("GPT-2", "LFM2", "Phi-3", "Mixtral")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_gradients_and_adapter_are_those_of_transformers_and_peft(family: str, tmp_path: Path) -> None:
    case = Case(FAMILIES[family], tmp_path, "float32")
    (loss, gradients), (own_loss, own) = case.theirs(), case.ours()
    assert own_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(case.log_probabilities(), case.logits.log_softmax(-1), rtol=0, atol=2e-5)
    assert errors_above(1e-4, own, gradients) == {}
    assert all(float(gradient.norm()) for gradient in gradients.values())
    targets = {operator.target for program in case.traced.programs for operator in program.operators}
    assert all(target.startswith(("aten.", "tightfit.")) for target in targets)
    blocks = [layer.name for layer in case.traced.layers if layer.name.split("#")[0][-1].isdigit()]
    assert len(blocks) == case.source.config["num_hidden_layers"]
    assert case.forms() == FORMS.get(family, Forms())
    check_rows(case, family)


def check_rows(case: Case, family: str) -> None:
    """Samples that share rows have the loss and the gradients of rows of their own, or the family says why they
    cannot.
    """
    shared = any(tensor.name == "positions" for tensor in case.traced.tensors)
    assert case.rows_apart == FORMS.get(family, Forms()).rows_apart
    assert shared == (case.rows_apart is None)
    if shared:
        case.batch = shared_batch({"vocab_size": VOCABULARY}, BATCH, SEQ)
        (loss, gradients), (own_loss, own) = case.theirs_apart(), case.ours()
        assert own_loss == pytest.approx(loss, rel=1e-5)
        assert errors_above(1e-4, own, gradients) == {}


WITHOUT_ROUTER_LOSS = ("DeepSeek-V3", "GLM-4.5", "Hunyuan, MoE")
"""mixtures that have no loss of routers in transformers"""


@pytest.mark.slow
@pytest.mark.parametrize("family", MIXTURES)
def test_the_loss_of_routers_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    asked = {"output_router_logits": True, "router_aux_loss_coef": 0.7}
    case = Case(FAMILIES[family] | asked, tmp_path, "float32")
    (loss, gradients), (own_loss, own) = case.theirs(), case.ours()
    assert own_loss == pytest.approx(loss, rel=1e-5)
    assert errors_above(1e-4, own, gradients) == {}
    plain_loss, plain = Case(FAMILIES[family], tmp_path / "plain", "float32").theirs()
    assert (loss > plain_loss + 0.5) == (family not in WITHOUT_ROUTER_LOSS)
    differs = any(relative_error(gradients[name], plain[name]) > 1e-3 for name in plain)
    assert differs == (family not in WITHOUT_ROUTER_LOSS)


@pytest.mark.slow_but_for("Mixtral")
@pytest.mark.parametrize("family", MIXTURES)
def test_pairs_of_experts_are_those_of_peft(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family] | {"output_router_logits": family not in WITHOUT_ROUTER_LOSS}
    if family == "gpt-oss":
        with pytest.raises(InputError, match="gpt_oss model has no experts that pairs can be for; leave it out"):
            Case(config, tmp_path, "float32", experts=True)
        return
    case = Case(config, tmp_path, "float32", experts=True)
    (loss, gradients), (own_loss, own) = case.theirs(), case.ours()
    assert any("experts.base_layer.lora_A" in name for name in own)
    assert own_loss == pytest.approx(loss, rel=1e-5)
    assert errors_above(1e-4, own, gradients) == {}


def test_another_loss_of_routers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = FAMILIES["Mixtral"] | {"output_router_logits": True}

    def opened(config: dict[str, Any]) -> AnyDecoder:
        return AnyDecoder(config, dtype=torch.float32, seq=SEQ, lora=LoraConfig(rank=RANK))

    told = opened(asked).router_loss
    assert told is not None
    assert (told.chosen, told.coefficient, told.layers) == (2, 0.001, 2)
    assert opened(asked | {"router_aux_loss_coef": 0.0}).router_loss is None
    other = "transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func"
    monkeypatch.setattr(other, lambda *_: torch.tensor(3.0))
    with pytest.raises(InputError, match="the loss of routers of MixtralForCausalLM is another than that of Switch Tr"):
        opened(asked)


@pytest.mark.slow_but_for("GPT-2")
@pytest.mark.parametrize("family", HALVES)
def test_bfloat16_gradients_are_as_near_to_the_exact_ones_as_autograds(family: str, tmp_path: Path) -> None:
    case = Case(FAMILIES[family], tmp_path, "bfloat16")
    exact_loss, exact = case.theirs()
    loss, own = case.ours()
    their_loss, theirs = case.theirs(torch.bfloat16)
    assert abs(loss - exact_loss) < max(1e-2 * exact_loss, 2 * abs(their_loss - exact_loss))
    own_errors = sorted(relative_error(own[name], gradient) for name, gradient in exact.items())
    their_errors = sorted(relative_error(theirs[name], gradient) for name, gradient in exact.items())
    middle = len(exact) // 2
    assert own_errors[middle] < 1.5 * their_errors[middle]  # few tensors, of tiny widths
    assert own_errors[-1] < 2 * their_errors[-1]


TEXTS = [
    "Is the fox quick? It is.",
    "lazy dog? No.",
    "over the moon",
    "user said: they've 12",
    "The quick brown fox jumps.",
]
STEPS, LR = 3, 5e-3


@pytest.mark.slow
def test_a_run_trains_and_saves_what_peft_loads(tmp_path: Path, cache: Path) -> None:
    """From a directory to an adapter: profile, plan at the smallest budget, steps in the capped process, evaluation."""
    config = FAMILIES["GPT-2"] | {"vocab_size": 320}
    folder = tmp_path / "model"
    model = checkpoint(config, folder)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    made = profile(str(folder), batch=BATCH, seq=SEQ, lora_rank=RANK, lora_alpha=ALPHA, dtype="float32")
    assert (made.model.kind, made.model.config["vocab_size"]) == ("decoder", 320)
    smallest = plan(made, ModelPlanner(made).minimum().peak_bytes)
    report = run(smallest, data, steps=STEPS, out=tmp_path / "out", lr=LR, eval_data=data, packing=False)
    assert report["peak_bytes"]["measured"] <= smallest.peak_bytes

    body = made.model.config.get("adapter_body", BODY)
    take(model, stored_weights(made.model.store), config, body)
    adapted = adapted_by_peft(model, Path(report["adapter"]))
    held = held_by_peft(adapted)
    assert all(value.detach().abs().max() > 0 for value in held.values())
    assert report["evaluation"]["after"]["loss"] == pytest.approx(
        evaluated(adapted, tmp_path / "out", BATCH, SEQ), rel=1e-4
    )

    with torch.no_grad():  # the same steps by torch.optim.AdamW
        for key, parameter in held.items():
            initialise(trained_name(key, body), 0, parameter)
    batches = training_batches(tmp_path / "out", STEPS, BATCH, SEQ)
    losses, _ = trained_by_adamw(held.values(), partial(loss_of, adapted), batches, lr=LR)
    assert report["loss"] == pytest.approx(losses, rel=3e-5)


REFUSED = [
    (
        sized("llama4_text", num_local_experts=4, head_dim=16),
        "model_type 'llama4_text' is a mixture of experts whose Llama4TextExperts",
    ),
    ({"model_type": "t5", "is_encoder_decoder": True}, "model_type 't5' is an encoder-decoder model"),
    ({"model_type": "bart", "d_model": 64}, "model_type 'bart' is an encoder-decoder model"),
    (sized("mamba"), "model_type 'mamba' is not supported; supported: .*, and decoders .* that have attention layers"),
    ({"model_type": "vit"}, r"model_type 'vit' is no decoder of transformers .* \(AutoModelForCausalLM\)"),
    (sized("olmo2", num_attention_heads="x"), "transformers cannot build the 'olmo2' model of this config"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        resolve(str(path))


def test_without_transformers_the_error_says_what_to_install(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(FAMILIES["OLMo 2"]))
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from tightfit.profiles.sources.lookup import resolve\n"
        f"try: resolve({str(path)!r})\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("InputError model_type 'olmo2' is not one of ")
    assert "run pip install 'tightfit[hf]'" in done.stdout


def test_a_tensor_that_the_model_does_not_use_is_refused(tmp_path: Path) -> None:
    config = FAMILIES["OLMo 2"]
    checkpoint(config, tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"tensor 'model.layers.0.self_attn.q_proj.bias' belongs to no olmo2 decoder"):
        any_directory_source(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    checkpoint(FAMILIES["OLMo 2"], tmp_path)
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, file, {"format": "pt"})
    with pytest.raises(
        InputError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight' in its safetensors files"
    ):
        any_directory_source(tmp_path)


@pytest.mark.slow
def test_llama_is_traced_into_the_programs_of_the_decoder_written_by_hand() -> None:
    config = FAMILIES["Llama, no scaling"]
    module = AnyDecoder(config, dtype=torch.bfloat16, seq=SEQ, lora=LoraConfig(rank=RANK, alpha=ALPHA))
    with FakeTensorMode():
        without_values(module)
    ours = trace_step(module, BATCH, SEQ)
    theirs = trace_decoder(config, torch.bfloat16, BATCH, SEQ)
    assert [layer.name for layer in ours.layers] == [layer.name for layer in theirs.layers]
    for own, other in zip(ours.programs[:-1], theirs.programs[:-1], strict=True):  # the last makes the tables
        assert [(op.phase, op.target) for op in own.operators] == [(op.phase, op.target) for op in other.operators]
