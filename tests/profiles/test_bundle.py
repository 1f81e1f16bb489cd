"""A bundle has the step and the answers that would be traced here; one that does not fit is refused in words."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from damage import CONFIG
from decoder_families import FAMILIES
from tiny_models import byte_level_tokenizer, random_weights, write_directory

from tightfit.profiles.api import bundle_request, prepare, profile
from tightfit.profiles.models.answer_steps import AnswerSteps
from tightfit.profiles.options import ProfileOptions
from tightfit.profiles.schema import Profile, TracedStep
from tightfit.profiles.sources.bundle import Bundle
from tightfit.profiles.sources.lookup import (
    end_tokens,
    longest_sequence,
    resolve,
    resolve_traced,
    traced_seq,
    vocabulary,
)
from tightfit.profiles.steps.answer_tracing import answer_steps
from tightfit.profiles.steps.choice import step_of
from tightfit.profiles.steps.tracing_process import make_bundle
from tightfit.profiles.weights.source import BUNDLE
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.interpreter import python_path

pytestmark = pytest.mark.usefixtures("cache")
STEP: dict[str, Any] = {"seq": 24, "batch": 2, "lora_rank": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "model"
    write_directory(path, CONFIG, random_weights(CONFIG), tokenizer=byte_level_tokenizer())
    return path


@pytest.fixture(scope="module")
def folder(model: Path, cache: Path) -> Path:
    """A bundle without weights."""
    prepare(str(model), model.parent / "light.tight", False, **STEP)
    return model.parent / "light.tight"


@pytest.fixture(scope="module")
def whole(model: Path, cache: Path) -> Path:
    """A bundle with weights."""
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


def traced_in(model: Path, bundle: Path | None) -> TracedStep:
    source, traced = resolve_traced(str(model), bundle)
    return step_of(source, ProfileOptions(), traced).traced(lambda *_: None)


def answers_of(model: Path) -> AnswerSteps:
    """The steps of a model's answers, traced in this process."""
    source = resolve(str(model))
    return answer_steps(source.config, source.entries, 0)


def test_the_step_is_the_one_that_is_traced_here(model: Path, folder: Path, whole: Path) -> None:
    here = traced_here(model)
    assert traced_in(model, folder) == here
    assert traced_in(whole, None) == here.model_copy(
        update={"model": here.model.model_copy(update={"source": str(whole)})}
    )


def test_weights_are_packed_as_the_device_asks(model: Path, folder: Path) -> None:
    """The bundle has no weights, and says nothing of their precision."""
    source, traced = resolve_traced(str(model), folder, base="8bit")
    options = ProfileOptions(**STEP, base="8bit")
    assert step_of(source, options, traced).traced(lambda *_: None) == step_of(
        resolve(str(model), base="8bit"), options
    ).traced(lambda *_: None)


def test_the_answers_are_those_that_are_traced_here(folder: Path, whole: Path, model: Path) -> None:
    steps = answers_of(model)
    for bundle in (folder, whole):
        assert Bundle.load(bundle).answers.of(1 << 20) == steps


def test_long_answers_of_a_family_written_by_hand_are_those_of_short_ones(tmp_path: Path) -> None:
    """Llama 3's rotary frequencies are the same in both, whatever length its config says it learnt first."""
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
    bundle = prepare(str(tmp_path / "model"), tmp_path / "bundle", False, **STEP)
    assert bundle.answers.of(64) == bundle.answers.of(65) == answers_of(tmp_path / "model")


@pytest.mark.slow
def test_answers_of_longrope_are_those_of_their_length(tmp_path: Path) -> None:
    """Up to 32 tokens and beyond, positions turn otherwise: the bundle has the steps of both."""
    pytest.importorskip("transformers")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(FAMILIES["Llama, longrope scaling, short"]))
    answers = prepare(str(path), tmp_path / "bundle", False, seq=16).answers
    source = resolve(str(path))
    short, long = (answer_steps(source.config, source.entries, tokens) for tokens in (32, 33))
    assert short != long
    assert (answers.of(32), answers.of(33), answers.of(1000)) == (short, long, long)


def test_what_leaves_a_device_is_enough_to_trace(model: Path) -> None:
    """It has no weights, and gives the same bundle; through JSON, as it is sent."""
    request = bundle_request(str(model), **STEP)
    assert request is not None
    sent = type(request).model_validate_json(request.without_places().model_dump_json())
    assert len(sent.model_dump_json()) < 1 << 12
    assert make_bundle(sent, lambda *_: None).step.programs == traced_here(model).programs


@pytest.mark.slow
def test_settings_of_an_adapter_on_the_device_are_sent(model: Path, tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    request = bundle_request(str(model), seq=24, adapter=tmp_path)
    assert request is not None
    assert str(tmp_path) not in request.options.values()
    lora = make_bundle(request, lambda *_: None).step.model.lora
    assert lora is not None
    assert (lora["rank"], lora["alpha"]) == (3, 5.0)
    assert (
        lora
        == step_of(resolve(str(model)), ProfileOptions(seq=24, adapter=tmp_path)).traced(lambda *_: None).model.lora
    )


@pytest.mark.slow
def test_a_profile_with_a_bundle_differs_in_figures_alone(model: Path, folder: Path, whole: Path) -> None:
    ordinary = profile(str(model), **STEP)
    light, alone = profile(str(model), bundle=folder), profile(str(whole))
    assert without_figures(light) == without_figures(ordinary) == without_figures(alone)
    assert light.model.store == ordinary.model.store
    assert alone.model.store == str(whole / "weights.store")
    assert alone.model.store_fingerprint == ordinary.model.store_fingerprint
    assert len({ordinary.fingerprint, light.fingerprint, alone.fingerprint}) == 3


def test_what_is_known_of_a_model_in_a_bundle(model: Path, whole: Path) -> None:
    words, theirs = vocabulary(str(whole)), vocabulary(str(model))
    assert words is not None
    assert theirs is not None
    text = "It's what they've said: naïve 12 日本語"
    assert words.tokenizer.encode(text).ids == theirs.tokenizer.encode(text).ids
    assert (words.eos_token, words.chat_template) == (theirs.eos_token, theirs.chat_template)
    assert longest_sequence(str(whole)) == longest_sequence(str(model))
    assert end_tokens(str(whole)) == end_tokens(str(model))
    assert traced_seq(str(whole), None) == 24
    assert traced_seq(str(model), None) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq": 16}, r"seq=16: the bundle of model was made seq=24; leave the option out"),
        ({"lora_dropout": 0.5}, r"lora_dropout=0\.5: .* was made without lora_dropout; leave"),
    ],
)
def test_other_options_are_refused(model: Path, folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        profile(str(model), bundle=folder, **options)


def test_another_precision_than_that_of_its_weights_is_refused(whole: Path) -> None:
    with pytest.raises(InputError, match=r"base='8bit': .* was made without base; leave the option out"):
        profile(str(whole), base="8bit")


def test_the_same_options_may_be_given_again_and_accumulation_is_free(model: Path, folder: Path) -> None:
    source, bundle = resolve_traced(str(model), folder)
    step = step_of(source, ProfileOptions(seq=24, lora_rank=4, accumulate=3), bundle)
    assert step.traced(lambda *_: None).accumulate == 3


def test_another_model_is_refused(model: Path, folder: Path, tmp_path: Path) -> None:
    other = CONFIG | {"rms_norm_eps": 1e-3}
    write_directory(tmp_path / "other", other, random_weights(other))
    with pytest.raises(
        InputError, match=r"is another model: its configuration says rms_norm_eps .* there and 0\.001 here"
    ):
        profile(str(tmp_path / "other"), bundle=folder)
    wider = CONFIG | {"intermediate_size": 2 * CONFIG["intermediate_size"]}
    write_directory(tmp_path / "wider", wider, random_weights(wider))
    with pytest.raises(
        InputError, match=r"is another model: .* says intermediate_size .* there and .* here; make a bundle"
    ):
        profile(str(tmp_path / "wider"), bundle=folder)


def test_without_weights_the_folder_alone_is_not_enough(folder: Path) -> None:
    with pytest.raises(
        InputError, match="a bundle without weights; name the model's own files, and this folder by bundle"
    ):
        profile(str(folder))


def test_a_module_is_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a module is traced by the device itself"):
        prepare("stateful_modules:factory", tmp_path, False)
    assert bundle_request("stateful_modules:factory") is None


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
    (tmp_path / BUNDLE).write_text(damage((folder / BUNDLE).read_text()))
    with pytest.raises(InputError, match=rf"{BUNDLE}: .*; make the bundle again"):
        Bundle.load(tmp_path)


def test_another_bundle_in_the_same_folder_replaces_all(model: Path, whole: Path, tmp_path: Path) -> None:
    prepare(str(model), tmp_path, True, seq=16)
    prepare(str(model), tmp_path, False, seq=8)
    assert [file.name for file in tmp_path.iterdir()] == [BUNDLE]
    assert Bundle.load(tmp_path).step.seq == 8


def test_a_process_without_pytorch_does_without(model: Path, tmp_path: Path, folder: Path) -> None:
    """A worker traces within the memory that is said, CUDA's libraries included; what it gives is the same to the
    bit.
    """
    script = (
        "import sys; from tightfit.profiles.api import prepare\n"
        "from tightfit.profiles.worker_process import MEMORY_OF_WORKERS as workers\n"
        f"prepare({str(model)!r}, {str(tmp_path)!r}, False, **{STEP!r})\n"
        "assert not {'torch', 'transformers', 'ortools', 'matplotlib', 'networkx'} & set(sys.modules)\n"
        "assert 0.6 * workers.predicted_bytes < workers.held_bytes < workers.predicted_bytes, vars(workers)\n"
    )
    subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": python_path(), "PATH": ""}, check=True)
    digests = {hashlib.sha256((path / BUNDLE).read_bytes()).hexdigest() for path in (tmp_path, folder)}
    assert len(digests) == 1
