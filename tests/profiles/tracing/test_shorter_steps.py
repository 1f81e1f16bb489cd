"""Steps at shorter lengths: which lengths are asked for, and whether what a shorter step computes is what the whole step computes of
the same samples, for every family of decoders.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from damage import CONFIG
from decoder_families import FAMILIES, VOCABULARY, sized
from traced import loss_and_gradients, random_batch
from wide_regression import FACTORY

from tightfit.planner.plan import plan
from tightfit.profiles.api import profile
from tightfit.profiles.models.lora import LoraConfig
from tightfit.profiles.schema import Preference, shortened
from tightfit.profiles.sources.lookup import resolve
from tightfit.profiles.steps.decoder_trace import trace_decoder
from tightfit.profiles.tracing.shorter_steps import MOST_LENGTHS, bucket_lengths, shorter_step, with_room
from tightfit.runtime.common.errors import InputError

pytest.importorskip("transformers")
ON = "zen4-2core"
"""Profiles are estimated for it, and measure nothing."""
BATCH, SEQ, SHORT = 2, 16, 8
BETWEEN = {"sliding_window": 12}
"""a window that matters at the whole length and not at the shorter one"""
LAYERS_BETWEEN = BETWEEN | {"layer_types": ["sliding_attention", "full_attention"]}
COMPUTED = ("Llama, longrope scaling, short", "Gemma 3 (text)", "Qwen3.5 (text)", "GPT-2", "BLOOM", "LFM2")
"""families whose steps are carried out: rotation of two kinds, windows, recurrences, learned positions, slopes, convolutions"""


def written(folder, config):
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


# --- which lengths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        (None, ()),
        ("64", (64,)),
        ("128,64", (64, 128)),
        (" 8, 16 ,8", (8, 16)),
        ("255,1", (1, 255)),
        ("8,7,6,5,4,3,2,1", (1, 2, 3, 4, 5, 6, 7, 8)),
    ],
)
def test_lengths_are_told_apart_by_commas_and_sorted(text, lengths):
    assert bucket_lengths(text, 256) == lengths


@pytest.mark.parametrize("text", ["", "0", "64,", ",", "-8", "8.0", "auto", "64;128", "8 16", "0,8", "²", "9" * 5000])
def test_what_is_no_length_is_refused_by_name(text):
    with pytest.raises(InputError) as caught:
        bucket_lengths(text, 256)
    assert str(caught.value) == f"buckets {text}: give lengths in tokens, separated by commas, such as 64,128"


@pytest.mark.parametrize(("text", "longest"), [("256", 256), ("64,512", 512), ("1000,999", 1000)])
def test_a_length_that_is_not_shorter_is_refused_with_both_lengths(text, longest):
    with pytest.raises(InputError) as caught:
        bucket_lengths(text, 256)
    assert str(caught.value) == (
        f"buckets {text}: {longest} is not shorter than the sequence of 256; give lengths below it, or a longer seq"
    )


def test_too_many_lengths_are_refused():
    most = ",".join(map(str, range(1, MOST_LENGTHS + 1)))
    assert len(bucket_lengths(most, 256)) == MOST_LENGTHS
    assert len(bucket_lengths(f"{most},1,2", 256)) == MOST_LENGTHS  # those that are named twice count once
    with pytest.raises(InputError, match=rf"^buckets {most},9: 9 lengths; give at most 8$"):
        bucket_lengths(f"{most},9", 256)


# --- what they compute ------------------------------------------------------------------------------------------------


def traced_at(config, folder, seq, *, longest=None, dtype="float32", batch=BATCH, preference=None):
    source = resolve(written(folder, config))
    lora = LoraConfig(rank=4, alpha=8.0)
    return trace_decoder(source, batch, seq, lora, dtype, lambda *_: None, preference, longest=longest)[0]


def values_of(traced):
    """Made-up values of all tensors that a step does not make itself, but for its batch."""
    generator = torch.Generator().manual_seed(3)
    made = {}
    for tensor in traced.tensors:
        if tensor.kind in ("weight", "trainable", "constant") and "[" not in tensor.name:
            near = 1.0 if len(tensor.shape) == 1 else 0.0
            values = near + 0.1 * torch.randn(tensor.shape, generator=generator)
            made[tensor.name] = values.to(getattr(torch, tensor.dtype))
    return made


def padded(batch, seq):
    """The batch with rows of `seq` places."""
    rows, length = batch["input_ids"].shape
    beyond = (0, seq - length)
    return {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], beyond),
        "labels": torch.nn.functional.pad(batch["labels"], beyond, value=-100),
        "positions": torch.arange(seq).repeat(rows, 1),
    }


def assert_same_step(whole, short):
    """Both give a batch of short samples the same loss and gradients."""
    weights = values_of(whole)
    batch = random_batch({"vocab_size": VOCABULARY}, BATCH, SHORT)
    loss, gradients = loss_and_gradients(whole, weights, padded(batch, SEQ), compiled=True)
    own_loss, own_gradients = loss_and_gradients(short, weights, batch, compiled=True)
    assert own_loss == pytest.approx(loss, rel=1e-5)
    assert own_gradients.keys() == gradients.keys()
    assert any(float(gradient.abs().max()) > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        error = float((own_gradients[name] - gradient).norm())
        assert error <= 1e-4 * float(gradient.norm()) + 1e-7, name


@pytest.mark.slow_but_for("Phi-3", "LFM2")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_step_at_half_its_length(family, tmp_path):
    whole = traced_at(FAMILIES[family], tmp_path, SEQ)
    short = traced_at(FAMILIES[family], tmp_path, SHORT, longest=SEQ)
    step = shorter_step(whole, short, SHORT)
    assert step.seq == SHORT
    assert {tensor.name for tensor in step.tensors} >= {"input_ids", "labels"}
    sizes = {tensor.name: tensor.bytes for tensor in whole.tensors}
    assert all(tensor.bytes < sizes[tensor.name] for tensor in step.tensors)
    roomy = with_room(whole.programs, [step])
    for program, own in zip(roomy, step.programs, strict=True):
        assert [(v.name, v.dtype, v.kind) for v in own.values] == [(v.name, v.dtype, v.kind) for v in program.values]
        assert all(small.bytes <= large.bytes for small, large in zip(own.values, program.values, strict=True))
        assert any(small.bytes < large.bytes for small, large in zip(own.values, program.values, strict=True))
    if family in COMPUTED:
        assert_same_step(whole, dataclasses.replace(short, programs=step.programs))


def test_a_window_between_the_lengths_has_its_mask_in_both(tmp_path):
    config = FAMILIES["Mistral"] | BETWEEN
    whole = traced_at(config, tmp_path, SEQ)
    short = traced_at(config, tmp_path, SHORT, longest=SEQ)
    assert shorter_step(whole, short, SHORT).programs == short.programs
    assert_same_step(whole, short)
    # By itself a step of that length has no mask, and is another one.
    with pytest.raises(InputError, match=f"^buckets {SHORT}: at {SHORT} tokens the model's step is not the same"):
        shorter_step(whole, traced_at(config, tmp_path, SHORT), SHORT)


@pytest.mark.slow
def test_a_window_between_the_lengths_of_a_model_that_transformers_builds_is_refused(tmp_path):
    path = written(tmp_path, sized("olmo3", **LAYERS_BETWEEN))
    with pytest.raises(InputError) as caught:
        profile(path, seq=SEQ, buckets=str(SHORT), device=ON)
    told = str(caught.value)
    assert told.startswith(
        f"buckets {SHORT}: at {SHORT} tokens the model's step is not the same as at its whole length ("
    )
    assert told.endswith("), as where a sliding window holds all of the shorter one; leave this length out")
    # A length that is longer than the window has the same step.
    assert [step.seq for step in profile(path, seq=SEQ, buckets="13", device=ON).shorter] == [13]


def test_a_side_network_and_a_module_take_whole_batches(tmp_path):
    path = written(tmp_path, CONFIG)
    with pytest.raises(InputError, match=r"^buckets 8: a side network takes whole batches; leave the option out$"):
        profile(path, seq=SEQ, buckets="8", side_rank=4, device=ON)
    with pytest.raises(
        InputError, match=r"^buckets 8: .* is a module, with batches of one shape; leave the option out$"
    ):
        profile(FACTORY, buckets="8", device=ON)


# --- the profile ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    written(made, CONFIG)
    return made


def profiled(folder, **options):
    return profile(str(folder / "config.json"), device=ON, **options)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [None, "dpo", "orpo"])
def test_a_shortened_profile_is_the_profile_of_that_length(folder, loss):
    whole = profiled(folder, seq=40, buckets="24,8", batch=2, loss=loss)
    assert [step.seq for step in whole.shorter] == [8, 24]
    for step in whole.shorter:
        alone = profiled(folder, seq=step.seq, batch=2, loss=loss)
        short = shortened(whole, step)
        named = ("seq", "batch", "tensors", "programs", "layers", "loss", "token_losses", "shorter", "device", "model")
        for name in named:
            assert getattr(short, name) == getattr(alone, name), name
    alone = profiled(folder, seq=40, batch=2, loss=loss)
    assert alone.tensors == whole.tensors
    assert alone.layers == whole.layers
    assert alone.fingerprint != whole.fingerprint


@pytest.mark.slow
def test_a_shorter_step_may_work_in_more_room_than_the_whole_one(folder):
    """Attention works on two rows of 128 tokens at a time, and on one of 192."""
    alone = profiled(folder, seq=192, batch=4)
    whole = profiled(folder, seq=192, batch=4, buckets="128")
    (step,) = whole.shorter
    larger = 0
    for own, like, room in zip(step.programs, alone.programs, whole.programs, strict=True):
        for small, large, most in zip(own.values, like.values, room.values, strict=True):
            larger += small.bytes > large.bytes
            assert most.bytes == max(small.bytes, large.bytes)
        for small, large, most in zip(own.operators, like.operators, room.operators, strict=True):
            assert most.workspace_bytes == max(small.workspace_bytes, large.workspace_bytes)
    assert larger
    made = plan(whole, 1 << 32, policy="keep-all")
    assert made.status == "feasible"
    assert made.peak_bytes >= plan(alone, 1 << 32, policy="keep-all").peak_bytes


def test_a_tensor_between_layers_may_not_grow(folder):
    config = json.loads((folder / "config.json").read_text())
    whole = traced_at(config, folder, SEQ)
    short = traced_at(config, folder, SHORT)
    for program in short.programs:
        bound = {value for layer in short.layers if layer.program == program.name for value in layer.bindings}
        for place, value in enumerate(program.values):
            if value.name not in bound or value.kind not in ("activation", "gradient"):
                continue
            values = [*program.values]
            values[place] = value.model_copy(update={"bytes": 1 << 30})
            changed = program.model_copy(update={"values": values})
            programs = [changed if one is program else one for one in short.programs]
            with pytest.raises(InputError, match=f"^buckets {SHORT}: .*{value.name} of {program.name} has shape"):
                shorter_step(whole, dataclasses.replace(short, programs=programs), SHORT)
            return
    pytest.fail("no layer hands an activation on")


def test_losses_of_pairs_have_shorter_steps(folder):
    config = json.loads((folder / "config.json").read_text())
    preference = Preference(loss="orpo", beta=0.1)
    whole = traced_at(config, folder, SEQ, preference=preference)
    short = traced_at(config, folder, SHORT, longest=SEQ, preference=preference)
    shapes = {tensor.name: tensor.shape for tensor in shorter_step(whole, short, SHORT).tensors}
    assert shapes["input_ids"] == shapes["labels"] == [2 * BATCH, SHORT]
    assert len(shapes) >= 2
