"""A prepared folder has the step that would be traced here; one that does not fit is refused in words."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from damage import CONFIG
from tiny_models import byte_level_tokenizer, random_weights, write_directory

from tightfit.profiles.api import prepare, profile, request_trace
from tightfit.profiles.models.answering_family import family_steps
from tightfit.profiles.options import ProfileOptions
from tightfit.profiles.schema import Profile, TracedStep
from tightfit.profiles.sources.described import PackedTensor
from tightfit.profiles.sources.lookup import end_tokens, longest_sequence, prepared_seq, resolve, vocabulary
from tightfit.profiles.sources.prepared import load_prepared
from tightfit.profiles.steps.choice import step_of
from tightfit.profiles.steps.tracing_process import trace_requested
from tightfit.profiles.weights.source import PREPARED
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.interpreter import python_path
from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP
from tightfit.runtime.results.generation_steps import traced_steps

pytestmark = pytest.mark.usefixtures("cache")
STEP: dict[str, Any] = {"seq": 24, "batch": 2, "lora_rank": 4, "buckets": "8"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prepared") / "model"
    write_directory(path, CONFIG, random_weights(CONFIG), tokenizer=byte_level_tokenizer())
    return path


@pytest.fixture(scope="module")
def folder(model: Path, cache: Path) -> Path:
    """Prepared without weights."""
    prepare(str(model), model.parent / "light.tight", False, **STEP)
    return model.parent / "light.tight"


@pytest.fixture(scope="module")
def whole(model: Path, cache: Path) -> Path:
    """Prepared with weights."""
    prepare(str(model), model.parent / "whole.tight", True, **STEP)
    return model.parent / "whole.tight"


def traced_here(model: Path) -> TracedStep:
    options = ProfileOptions(**STEP)
    return step_of(resolve(str(model)), options).traced(lambda *_: None)


def without_figures(measured: Profile) -> dict[str, Any]:
    """What a profile says of its step and not of a machine."""
    fields = measured.model_dump(include=set(TracedStep.model_fields))

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                name: plain(item)
                for name, item in value.items()
                if not name.endswith("_seconds") and name not in FIGURES
            }
        return [plain(item) for item in value] if isinstance(value, list) else value

    return plain(fields)  # type: ignore[no-any-return]


FIGURES = {"seconds", "workspace_bytes", "copied", "name", "source", "store", "store_fingerprint"}


def test_the_step_is_the_one_that_is_traced_here(model: Path, folder: Path, whole: Path) -> None:
    here = traced_here(model)
    assert load_prepared(folder).step == here == load_prepared(whole).step
    assert here.shorter[0].seq == 8


def test_the_steps_of_answers_come_with_the_weights(folder: Path, whole: Path, model: Path) -> None:
    source = resolve(str(model))
    assert (
        load_prepared(whole).answers == family_steps(source.config, GROUP) == traced_steps(resolve(str(whole)), 64, "")
    )
    assert load_prepared(folder).answers is None


def test_long_answers_of_a_family_written_by_hand_come_with_the_weights(tmp_path: Path) -> None:
    """Llama 3's rotary frequencies are the same in short answers and in long ones, whatever length its config says it learnt first."""
    scaled = CONFIG | {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    }
    write_directory(tmp_path / "model", scaled, random_weights(scaled), tokenizer=byte_level_tokenizer())
    prepared = prepare(str(tmp_path / "model"), tmp_path / "whole.tight", True, **STEP)
    assert prepared.answers == family_steps(resolve(str(tmp_path / "model")).config, GROUP)


def test_a_description_is_enough_to_trace(model: Path) -> None:
    """What leaves a device has no weights, and gives the same step; through JSON, as it is sent."""
    request = request_trace(str(model), **STEP)
    assert request is not None
    sent = type(request).model_validate_json(request.model_dump_json())
    assert len(request.model_dump_json()) < 1 << 16
    assert trace_requested(sent, lambda *_: None).step == traced_here(model)


def test_settings_of_an_adapter_on_the_device_are_sent(model: Path, tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    request = request_trace(str(model), seq=24, adapter=tmp_path)
    assert request is not None
    assert str(tmp_path) not in request.options.values()
    lora = trace_requested(request, lambda *_: None).training.model.lora
    assert lora is not None
    assert (lora["rank"], lora["alpha"]) == (3, 5.0)
    assert (
        lora
        == step_of(resolve(str(model)), ProfileOptions(seq=24, adapter=tmp_path)).traced(lambda *_: None).model.lora
    )


@pytest.mark.slow
def test_a_profile_of_a_prepared_step_differs_in_figures_alone(model: Path, folder: Path, whole: Path) -> None:
    ordinary = profile(str(model), **STEP)
    light, alone = profile(str(model), prepared=folder), profile(str(whole))
    assert without_figures(light) == without_figures(ordinary) == without_figures(alone)
    assert light.model.store == ordinary.model.store
    assert alone.model.store == str(whole / "weights.store")
    assert alone.model.store_fingerprint == ordinary.model.store_fingerprint
    assert len({ordinary.fingerprint, light.fingerprint, alone.fingerprint}) == 3


def test_what_is_known_of_a_prepared_model(model: Path, whole: Path) -> None:
    words, theirs = vocabulary(str(whole)), vocabulary(str(model))
    assert words is not None
    assert theirs is not None
    text = "It's what they've said: naïve 12 日本語"
    assert words.tokenizer.encode(text).ids == theirs.tokenizer.encode(text).ids
    assert (words.eos_token, words.chat_template) == (theirs.eos_token, theirs.chat_template)
    assert longest_sequence(str(whole)) == longest_sequence(str(model))
    assert end_tokens(str(whole)) == end_tokens(str(model))
    assert prepared_seq(str(whole), None) == 24
    assert prepared_seq(str(model), None) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq": 16}, r"seq=16: .*light\.tight was prepared seq=24; leave the option out"),
        ({"lora_dropout": 0.5}, r"lora_dropout=0\.5: .* was prepared without lora_dropout; leave"),
        ({"base": "8bit"}, r"base='8bit': .* was prepared without base"),
    ],
)
def test_other_options_are_refused(model: Path, folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        profile(str(model), prepared=folder, **options)


def test_the_same_options_may_be_given_again_and_accumulation_is_free(model: Path, folder: Path) -> None:
    step = step_of(resolve(str(model)), ProfileOptions(prepared=folder, seq=24, lora_rank=4, accumulate=3))
    assert step.traced(lambda *_: None).accumulate == 3


def test_another_model_is_refused(model: Path, folder: Path, tmp_path: Path) -> None:
    other = CONFIG | {"rms_norm_eps": 1e-3}
    write_directory(tmp_path / "other", other, random_weights(other))
    with pytest.raises(
        InputError, match=r"is another model: its configuration says rms_norm_eps .* there and 0\.001 here"
    ):
        profile(str(tmp_path / "other"), prepared=folder)
    wider = CONFIG | {"intermediate_size": 2 * CONFIG["intermediate_size"]}
    write_directory(tmp_path / "wider", wider, random_weights(wider))
    with pytest.raises(InputError, match=r"is another model: .* is .* there and .* here; prepare this one"):
        profile(str(tmp_path / "wider"), prepared=folder)


def test_without_weights_the_folder_alone_is_not_enough(folder: Path) -> None:
    with pytest.raises(
        InputError, match="was prepared without weights; name the model's own files, and this folder by prepared"
    ):
        profile(str(folder))


def test_a_module_is_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a module is traced by the device itself"):
        prepare("stateful_modules:factory", tmp_path, False)
    assert request_trace("stateful_modules:factory") is None


DAMAGE = {
    "cut off": lambda text: text[: len(text) // 2],
    "no json": lambda text: "weights",
    "another object": lambda text: "{}",
    "a changed figure": lambda text: text.replace('"shape":[', '"shape":[1,', 1),
    "another version": lambda text: text.replace('"version":', '"version":9', 1),
    "an unknown field": lambda text: text.replace('"request":', '"more":1,"request":', 1),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_told(folder: Path, tmp_path: Path, damage: Any) -> None:
    (tmp_path / PREPARED).write_text(damage((folder / PREPARED).read_text()))
    with pytest.raises(InputError, match=rf"{PREPARED}: .*; prepare the model again"):
        load_prepared(tmp_path)


def test_another_model_prepared_in_the_same_folder_replaces_all(model: Path, whole: Path, tmp_path: Path) -> None:
    prepare(str(model), tmp_path, True, seq=16)
    prepare(str(model), tmp_path, False, seq=8)
    assert sorted(file.name for file in tmp_path.iterdir()) == [PREPARED, "tokenizer.json", "vocabulary.json"]
    assert load_prepared(tmp_path).training.seq == 8


def test_a_tensor_that_cannot_be_packed_so_is_refused(model: Path) -> None:
    request = request_trace(str(model), **STEP)
    assert request is not None
    name = next(name for name, tensor in request.source.tensors.items() if tensor.group)
    for tensor in (PackedTensor(shape=[7, 13], format="q4", group=32), PackedTensor(shape=[4, 4], format="none")):
        wrong = request.source.model_copy(update={"tensors": request.source.tensors | {name: tensor}})
        with pytest.raises(InputError, match=f"tensor {name}"):
            trace_requested(request.model_copy(update={"source": wrong}), lambda *_: None)


def test_a_process_without_pytorch_does_without(model: Path, tmp_path: Path, folder: Path) -> None:
    """A worker traces; what it gives is the same to the bit, and messages name options as the command line does."""
    script = (
        "import sys; from tightfit.profiles.api import prepare\n"
        f"prepare({str(model)!r}, {str(tmp_path)!r}, False, **{STEP!r})\n"
        "assert not {'torch', 'transformers', 'ortools', 'matplotlib', 'networkx'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": python_path(), "PATH": ""}, check=True)
    digests = {hashlib.sha256((path / PREPARED).read_bytes()).hexdigest() for path in (tmp_path, folder)}
    assert len(digests) == 1
