"""Runs of mixtures of experts: within their cap whatever the router chooses, the same bits at every budget."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_families import sized
from fleets import adapter_hash
from reference import checkpoint, random_model
from safetensors.torch import load_file, save_file
from three_plans import losses_of_equal_runs, three_plans
from tiny_models import byte_level_tokenizer, write_gguf

from tightfit.planner.plan import plan
from tightfit.profiles.api import profile
from tightfit.profiles.schema import Profile
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.records import RecordWriter
from tightfit.runtime.results.merge import merge
from tightfit.runtime.session.launch import run

pytest.importorskip("transformers")

BATCH, SEQ, STEPS, EXPERTS, VOCABULARY = 4, 64, 6, 12, 512
CONFIG = sized(
    "qwen3_moe", vocab_size=VOCABULARY, head_dim=16, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=96,
    hidden_size=128, max_position_embeddings=256, output_router_logits=True,
)  # fmt: skip
TRAINING: dict[str, Any] = {"steps": STEPS, "lr": 1e-2, "seed": 7, "cgroup": False, "packing": True}
ROUTINGS = ("as it comes", "all rows to one expert")


def model(folder: Path, routing: str) -> Path:
    """A random model; with "all rows to one expert" its router has the same two experts for every row, so that the
    others have none.
    """
    folder.mkdir(exist_ok=True)
    checkpoint(CONFIG, folder)
    if routing != ROUTINGS[0]:
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            if name.endswith("mlp.gate.weight"):
                tensor.zero_()  # of equal scores the first are the highest
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    generator, path = random.Random(0), tmp_path_factory.mktemp("mixtures") / "samples.records"
    with RecordWriter(path, seq=SEQ, pad_token=0, vocab_size=VOCABULARY, source="test") as writer:
        for example in range(120):
            tokens = [generator.randrange(3, VOCABULARY) for _ in range(generator.randint(3, 51))]
            writer.add(tokens[:-1], tokens[1:], example=example)
    return str(path)


@pytest.fixture(scope="module", params=ROUTINGS)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    folder = model(tmp_path_factory.mktemp("mixture") / "model", request.param)
    return profile(str(folder), batch=BATCH, seq=SEQ, lora_rank=4, lora_experts=True, matrix_rows=192)


@pytest.mark.slow
def test_every_plan_gives_the_same_bits_within_its_cap(mixture: Profile, data: str, tmp_path: Path) -> None:
    slices = [tensor.name for tensor in mixture.tensors if "experts.gate_up_proj[" in tensor.name]
    assert len(slices) == CONFIG["num_hidden_layers"] * EXPERTS, "each expert is a weight of its own"
    losses_of_equal_runs(three_plans(mixture), data, tmp_path, TRAINING)


@pytest.mark.slow
def test_matrices_of_experts_without_rows_are_not_read(tmp_path: Path, data: str) -> None:
    """A rule has nothing stay between steps; where every row has the same two experts, the matrices of ten are not read
    in the backward, nor in the forward as far as they are due once the router has chosen. The bits are those of a plan
    that holds all.
    """
    made = profile(str(model(tmp_path / "model", ROUTINGS[1])), batch=BATCH, seq=SEQ, lora_rank=4, matrix_rows=192)
    left_out = {}
    for name, each in (("held", plan(made, 1 << 30)), ("streamed", plan(made, 1 << 30, policy="mebp"))):
        run(each, data, out=tmp_path / name, **TRAINING)
        steps = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        left_out[name] = [step["reads_left_out"] for step in steps if "reads_left_out" in step]
    assert adapter_hash(tmp_path / "held") == adapter_hash(tmp_path / "streamed")
    unneeded, matrices, layers = EXPERTS - 2, 2, CONFIG["num_hidden_layers"]
    assert not any(left_out["held"])
    assert len(left_out["streamed"]) == STEPS
    assert min(left_out["streamed"]) >= unneeded * matrices * layers


@pytest.mark.slow
def test_a_run_starts_within_its_cap_where_nearly_all_of_its_memory_is_held_all_the_time(tmp_path: Path) -> None:
    """Of 48 layers whose activations are small, the plan keeps nearly all weights: what reading them leaves behind may
    not come on top.
    """
    config = {
        **CONFIG, "num_hidden_layers": 48, "num_experts": 32, "num_experts_per_tok": 8, "moe_intermediate_size": 64,
        "hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 4000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = profile(str(tmp_path / "config.json"), batch=1, seq=128)
    held = plan(made, 140 << 20)
    assert max(held.resident.values()) > 0.75 * (held.peak_bytes - made.device.floor.held_bytes)
    report = run(held, "random", out=tmp_path / "out", steps=1, cgroup=False)
    assert report["peak_bytes"]["measured"] <= report["peak_bytes"]["predicted"] <= held.budget_bytes


def test_a_checkpoint_that_lacks_an_expert_or_holds_nan_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", ROUTINGS[0])
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "experts.3.up_proj" in name)
    save_file(
        {key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(
        InputError, match=r"no tensor '[a-z0-9_.]*experts\.3\.up_proj\.weight'.*1 of 24.*download the model again"
    ):
        profile(str(folder), batch=1, seq=32)
    tensors[name].view(-1)[5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"experts\.3\.up_proj\.weight' holds NaN or infinity"):
        profile(str(folder), batch=1, seq=32)
    tensors[name] = torch.ones(2, 2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"shape \[2, 2\] where \[96, 128\] is due; config.json does not fit the weights"
    ):
        profile(str(folder), batch=1, seq=32)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["a tensor for each expert", "a tensor for all experts", "GGUF"])
def test_a_merged_mixture_is_what_transformers_and_peft_make_of_it(form: str, data: str, tmp_path: Path) -> None:
    """The adapter, with pairs for experts, is merged by peft into the weights that transformers reads of the merged
    model's experts and of the base.
    """
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    checkpoint(CONFIG, tmp_path / "model")
    base = tmp_path / "model"
    if form == "a tensor for all experts":
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    if form == "GGUF":
        plain = {name: tensor.detach() for name, tensor in random_model(CONFIG).named_parameters()}
        base = write_gguf(
            tmp_path / "m.gguf", CONFIG, plain, default="Q8_0", tokenizer=byte_level_tokenizer(VOCABULARY)
        )
    made = profile(str(base), batch=BATCH, seq=SEQ, lora_rank=4, lora_experts=True)
    run(plan(made, 1 << 30), data, out=tmp_path / "out", **TRAINING)
    with pytest.raises(InputError, match="has pairs for experts, which are not written in GGUF"):
        merge(tmp_path / "out", tmp_path / "merged.gguf", format="gguf")
    merge(tmp_path / "out", tmp_path / "merged", dtype="float32")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    if form == "GGUF":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path,
            gguf_file="m.gguf",
            dtype=torch.float32,
            config=transformers.AutoConfig.for_model(**CONFIG, norm_topk_prob=True),  # as llama.cpp has it
        )
    else:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        plain = theirs(tokens).logits
        adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "out" / "adapter").merge_and_unload()
        assert not torch.allclose(plain, adapted(tokens).logits, atol=1e-2)
        assert torch.allclose(ours(tokens).logits, adapted(tokens).logits, atol=1e-4)
