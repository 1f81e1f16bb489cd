"""Whatever is read from outside is bounded before it is read: JSON, files that are none, headers that claim more than
there is.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.planner.fleet.description import read_description
from tightfit.planner.fleet.io import load_fleet
from tightfit.planner.io import load_plan
from tightfit.profiles.devices.data_sheets import find_device
from tightfit.profiles.io import load_profile
from tightfit.profiles.models.lora import from_peft
from tightfit.profiles.sources.directory_tokenizer import directory_vocabulary
from tightfit.profiles.sources.gguf_metadata import read_metadata
from tightfit.profiles.sources.huggingface import checkpoint_files, checkpoint_keys
from tightfit.profiles.sources.lookup import end_tokens, resolve
from tightfit.profiles.weights.source import read_config
from tightfit.profiles.weights.tensor_file import TensorFile
from tightfit.runtime.cli.config_file import read_file
from tightfit.runtime.common import files
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.strict_json import DEEPEST, JsonError, from_json
from tightfit.runtime.data.samples import data_files, read_samples
from tightfit.runtime.engine.training.records import RecordFile
from tightfit.runtime.engine.weights.safetensors_file import LARGEST_HEADER, SafetensorsReader
from tightfit.runtime.results.generation import read_prompts

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
JSON_READERS = {
    "config.json": read_config,
    "adapter_config.json": lambda path: from_peft(path.parent),
    "model.safetensors.index.json": lambda path: checkpoint_files(path.parent),
    "generation_config.json": lambda path: end_tokens(path.parent),
    "tokenizer.json": lambda path: directory_vocabulary(path.parent),
    "profile.json": load_profile,
    "plan.json": load_plan,
    "fleet.json": load_fleet,
    "device.json": lambda path: find_device(str(path)),
    "data.jsonl": lambda path: [pytest.fail(str(one)) for _, one in raised(read_samples(path))],
    "prompts.jsonl": read_prompts,
}
OTHER_READERS = {
    "model.safetensors": lambda path: checkpoint_keys(path, hashlib.sha256()),
    "adapter_model.safetensors": TensorFile,
    "checkpoint.safetensors": lambda path: SafetensorsReader(str(path)),
    "model.gguf": read_metadata,
    "chat_template.jinja": lambda path: directory_vocabulary(with_tokenizer(path.parent)),
    "data.csv": lambda path: list(read_samples(path)),
    "data.jsonl.gz": lambda path: list(read_samples(path)),
    "data.records": RecordFile.open,
    "options.toml": read_file,
    "options.yaml": read_file,
    "fleet.toml": read_description,
}


def raised(samples):
    for place, one in samples:
        if isinstance(one, InputError):
            raise InputError(f"data.jsonl:{place}: {one}")
        yield place, one


def with_tokenizer(folder: Path) -> Path:
    from tiny_models import byte_level_tokenizer

    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(autouse=True)
def ends():
    """A reader that waits for ever is a failure."""

    def late(*_):
        pytest.fail("still waiting after a minute")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)


# JSON


@given(VALUES, st.sampled_from(["utf-8", "utf-16", "utf-32"]))
def test_json_is_read_as_the_standard_library_reads_it(value, encoding):
    text = json.dumps(value)
    assert from_json(text) == from_json(text.encode(encoding)) == from_json(text, strict=True) == value


@given(st.lists(st.booleans(), min_size=1, max_size=3 * DEEPEST), st.integers(1, 2000))
def test_what_is_nested_too_deep_is_refused_however_deep(shape, times):
    brackets = [('{"a":', "}") if one else ("[", "]") for one in shape * times]
    text = "".join(begin for begin, _ in brackets) + "1" + "".join(end for _, end in reversed(brackets))
    if len(brackets) <= DEEPEST:
        assert from_json(text) == json.loads(text)
    else:
        with pytest.raises(JsonError, match=f"nested more than {DEEPEST} deep"):
            from_json(text)


@given(st.dictionaries(st.text(), VALUES, min_size=1, max_size=5), st.integers(0, 4), st.data())
def test_a_key_that_stands_twice_is_named_where_it_is_asked_for(found, depth, data):
    key = data.draw(st.sampled_from(sorted(found)))
    pairs = [*found.items(), (key, data.draw(VALUES))]
    text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs) + "}"
    text = "[" * depth + text + "]" * depth
    assert from_json(text) == json.loads(text)
    with pytest.raises(JsonError, match=r"^the key .* stands twice in one object"):
        from_json(text, strict=True)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_no_number_is_refused_where_it_is_asked_for(number):
    assert isinstance(from_json(f'{{"a": [{number}]}}')["a"][0], float)
    with pytest.raises(JsonError, match=rf"^{number} is"):
        from_json(f'{{"a": [{number}]}}', strict=True)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 100_000, b'{"model_type":' + b"[" * 600 + b"]" * 600 + b"}"]
)
@pytest.mark.parametrize("name", JSON_READERS)
def test_every_reader_of_json_refuses_what_is_nested_without_end(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=name):
        JSON_READERS[name](path)


@pytest.mark.parametrize("name", ["options.toml", "options.yaml", "fleet.toml"])
def test_other_texts_that_are_nested_without_end_are_refused(name, tmp_path):
    path = tmp_path / name
    path.write_text("a = " * name.endswith("toml") + "[" * 50_000)
    with pytest.raises(InputError, match=name):
        OTHER_READERS[name](path)


# Files that are none


@pytest.fixture(params=["a pipe", "a device", "a socket", "a directory"])
def place(request, tmp_path):
    def made(name):
        path = tmp_path / name
        if request.param == "a pipe":
            os.mkfifo(path)
        elif request.param == "a device":
            path.symlink_to("/dev/zero")
        elif request.param == "a directory":
            path.mkdir()
        else:
            with socket.socket(socket.AF_UNIX) as bound:
                home = Path.cwd()
                os.chdir(tmp_path)  # a socket's path has few bytes
                try:
                    bound.bind(name)
                finally:
                    os.chdir(home)
        return path

    return made


@pytest.mark.parametrize("name", [*JSON_READERS, *OTHER_READERS])
def test_only_regular_files_are_opened(name, place):
    path = place(name)
    with pytest.raises(InputError, match=name):
        (JSON_READERS | OTHER_READERS)[name](path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz"])
def test_a_folder_of_data_has_only_regular_files(name, place, tmp_path):
    place(name)
    with pytest.raises(InputError):
        [list(read_samples(file)) for file in data_files(str(tmp_path))]


def test_a_model_that_is_a_pipe_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        resolve(tmp_path)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, files.LARGEST_DOCUMENT + 1)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"config.json: larger than the 256 MiB"):
            read_config(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# Headers


@given(
    claimed=st.sampled_from([0, 1, 100, LARGEST_HEADER, 10 << 30, 1 << 62, (1 << 64) - 1]),
    beside=st.integers(-20, 20),
    size=st.sampled_from([0, 7, 8, 100, 1 << 20, 10 << 30]),
)
@pytest.mark.parametrize("name", [name for name in OTHER_READERS if name.endswith(".safetensors")])
def test_a_header_is_read_only_as_far_as_it_can_be_one(name, claimed, beside, size, tmp_path_factory):
    """The files are sparse: what is read of them would be in memory."""
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(min(max(0, claimed + beside), (1 << 64) - 1).to_bytes(8, "little")[:size])
    os.truncate(path, size)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=name):
            OTHER_READERS[name](path)
        assert tracemalloc.get_traced_memory()[1] < LARGEST_HEADER + (8 << 20)
    finally:
        tracemalloc.stop()
        path.unlink()


@pytest.mark.parametrize("template", [3, True, {"a": 1}, [{"name": "default", "template": {}}], {"default": ["x"]}])
def test_a_chat_template_that_is_no_text_is_refused(template, tmp_path):
    (with_tokenizer(tmp_path) / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(InputError, match=r"tokenizer_config\.json: damaged \(its chat template"):
        directory_vocabulary(tmp_path)
