"""What can be refused before measuring is refused before measuring: no stage is called for data and options that a
later one refuses.
"""

from __future__ import annotations

import json
import sys

import pytest
from reference import CONFIGS
from tiny_models import byte_level_tokenizer, random_weights, write_directory
from typer.testing import CliRunner

from tightfit.planner.search_options import POLICY_NAMES
from tightfit.planner.solve.policies import APPROXIMATE, POLICIES
from tightfit.profiles.schema import MOBILLM
from tightfit.runtime.cli import main
from tightfit.runtime.cli import train_stages as command
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.records import RecordWriter
from tightfit.runtime.session import train as library


class MeasuredError(Exception):
    """The first stage was called."""


@pytest.fixture(autouse=True)
def _no_stage(monkeypatch):
    def measured(*_, **__):
        raise MeasuredError

    monkeypatch.setattr(command, "_profile", measured)
    monkeypatch.setattr(library, "profile", measured)
    monkeypatch.setattr(library, "STAGES", (lambda **options: None, *library.STAGES[1:]))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_directory(folder, CONFIGS["llama"], random_weights(CONFIGS["llama"]), tokenizer=byte_level_tokenizer())
    return folder


GOOD = {"prompt": "Is it? ", "completion": "yes"}
BAD_ROWS = {
    "no form": {"words": "a"},
    "two forms": {"text": "a", "messages": [{"role": "assistant", "content": "b"}]},
    "blank": {"prompt": "a", "completion": "  "},
    "a pair": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "too long": {"prompt": "a", "completion": "long " * 20},
    "no such role": {"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "no JSON": '{"text"',
    "twice": '{"text": "a", "text": "b"}',
}
BAD_OPTIONS = [
    ("optimizer", "adamw8bit"), ("optimizer", "AdamW"), ("policy", "fastest"), ("policy", "checkpoint"), ("time_limit", -1.0),
    ("time_limit", 0.0), ("gap", 1.0), ("gap", -0.5), ("max_grad_norm", 0.0), ("max_grad_norm", -1.0), ("max_grad_norm", float("nan")),
    ("max_grad_norm", float("inf")), ("lr", -1.0), ("lr", float("nan")), ("schedule", "step"), ("warmup_ratio", 2.0), ("steps", 0),
    ("eval_every", "2"), ("eval_every", "no"), ("momentum", 0.9), ("eps2", 0.1), ("beta1", 1.0), ("clip_threshold", 2.0), ("seed", -1),
    ("early_stopping", 2), ("keep_best", True), ("memory", "much"), ("memory", "-1"), ("checkpoint_every", -1),
    ("columns", "words=text"), ("data", "missing.jsonl"), ("data", ""), ("eval_data", "missing.jsonl"),
]  # fmt: skip
NAMES = {"eval_data": "--eval", "columns": "--columns"}


def called(model, out, **options):
    """Both doors, with the same options; each has to end with an InputError of the same kind."""
    given = {"data": "random", "steps": 2, "memory": "600MiB"} | options
    words = []
    for name, value in given.items():
        word = NAMES.get(name, f"--{name.replace('_', '-')}")
        words += [word] if value is True else [f"{word}={value}"]
    said = CliRunner().invoke(main.app, ["train", str(model), *words, "-o", str(out / "a")], obj=False)
    if isinstance(given.get("columns"), str):
        given["columns"] = dict([given["columns"].split("=")])
    try:
        library.train(str(model), out=out / "b", **given)
    except Exception as error:
        return said, error
    return said, None


def refused(found):
    said, error = found
    assert isinstance(error, InputError), error
    assert isinstance(said.exception, InputError | SystemExit), said.exception
    assert not isinstance(said.exception, SystemExit) or said.exit_code == 2
    return str(error), str(said.exception)


def measured(found):
    assert isinstance(found[1], MeasuredError), found[1]
    assert isinstance(found[0].exception, MeasuredError), found[0].exception


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS)
def test_options_of_later_stages_are_refused_first(model, tmp_path, name, value):
    refused(called(model, tmp_path, **{name: value}))


def test_what_can_be_used_is_measured(model, tmp_path):
    measured(called(model, tmp_path, optimizer="momentum", momentum=0.9, policy="mesp", max_grad_norm=1.0, gap=0.1))


def test_every_policy_is_known_beforehand():
    assert ("solver", *POLICIES, *APPROXIMATE, MOBILLM) == POLICY_NAMES


@pytest.mark.parametrize("where", ["data", "eval_data"])
@pytest.mark.parametrize("seq", [None, 64])
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_broken_line_is_refused_first(model, tmp_path, kind, seq, where):
    rows = [json.dumps(GOOD)] * 3 + [row if isinstance(row := BAD_ROWS[kind], str) else json.dumps(row)]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(rows) + "\n")
    options = {where: str(bad)} | ({} if seq is None else {"seq": seq})
    if kind == "too long" and seq is None:
        measured(called(model, tmp_path, **options | {"data": str(bad)}))
        return
    for message in refused(called(model, tmp_path, **options)):
        assert f"{bad}:4: " in message


@pytest.mark.parametrize("where", ["data", "eval_data"])
def test_prepared_data_of_another_shape_are_refused_first(model, tmp_path, where):
    path = tmp_path / "a.records"
    with RecordWriter(path, seq=32, pad_token=0, vocab_size=320, source="x") as writer:
        writer.add([1, 2], [2, 3], example=0)
    for message in refused(called(model, tmp_path, seq=64, **{where: str(path)})):
        assert "prepared for sequences of 32" in message
    measured(called(model, tmp_path, seq=32, **{where: str(path)}))


def test_a_module_takes_no_files(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD) + "\n")
    for message in refused(called("wide_regression:regression", tmp_path, data=str(tmp_path / "a.jsonl"))):
        assert "a module trains on batches of tensors" in message


def test_batches_are_no_data_of_a_language_model(model, tmp_path):
    with pytest.raises(InputError, match="a language model trains on a file of samples"):
        library.train(str(model), [[1]], tmp_path, steps=2, memory="600MiB")


def test_looking_beforehand_takes_little_memory():
    """It is done in the process that reads the data, whose memory counts against the budget."""
    import subprocess

    code = "import sys, tightfit.runtime.session.beforehand; print({'torch', 'numpy', 'ortools'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
