"""Messages name an option as the door does through which the user came: in Python by its name, at the command line by
its words, with a file of options by its key.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reference import CONFIGS

from tightfit.planner.search_options import PlanOptions
from tightfit.profiles.api import profile
from tightfit.profiles.option_fields import options_of
from tightfit.profiles.options import ProfileOptions
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.interpreter import PACKAGE
from tightfit.runtime.common.option_names import named_as, on_command_line
from tightfit.runtime.results.answer_options import AnswerOptions
from tightfit.runtime.session.options import TrainingOptions

RECORDS: tuple[Any, ...] = (ProfileOptions, PlanOptions, TrainingOptions, AnswerOptions)
NAMES = {name for record in RECORDS for name in options_of(record)}
UNDERSCORED = re.compile(rf"\b({'|'.join(sorted(name for name in NAMES if '_' in name))})\b")
VALUES: tuple[Any, ...] = (-3, 0, 1.5, math.nan, math.inf, 10**13, "zzz")
DOORS = (
    "runtime/cli",
    "runtime/supervision/failure.py",
    "planner/service",
    "runtime/federated/node.py",
    "runtime/federated/fleet_api.py",
    "runtime/federated/device.py",
)
"""the command line and the service; and the process of a device of federated rounds, which its own command line
starts
"""


def refusals(record: Any, **beside: Any) -> Iterator[tuple[str, str]]:
    """(option, what is said of it) for every option and value that a record refuses."""
    for name in options_of(record):
        for value in VALUES:
            try:
                record(**beside | {name: value})
            except InputError as error:
                yield name, str(error)
            except TypeError:  # words where a number is due
                continue


@pytest.mark.parametrize("record", [TrainingOptions, AnswerOptions])
def test_a_record_names_its_options_as_the_door_does(record: Any) -> None:
    in_python = list(refusals(record))
    with named_as(on_command_line):
        in_words = list(refusals(record))
    assert len({name for name, _ in in_python}) > 5
    assert [name for name, _ in in_python] == [name for name, _ in in_words]
    for (name, python), (_, words) in zip(in_python, in_words):
        assert name in python
        assert "--" not in python
        assert f"--{name.replace('_', '-')}" in words
        assert not UNDERSCORED.search(words)


@pytest.mark.slow_but_for("lora_rank-100000", "batch-0", "accumulate-0", "threads-0")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seq", 0), ("seq", 10**6), ("batch", 0), ("accumulate", 0), ("accumulate", 1 << 20), ("threads", 0),
        ("lora_rank", 0), ("lora_rank", 10**5), ("lora_alpha", math.nan), ("lora_dropout", 2.0), ("lora_targets", "nothing"),
        ("lora_targets", ".*nothing"), ("lora_layers", "99"), ("lora_layers", "3-1"), ("dtype", "int3"), ("loss", "mse"), ("beta", 0.1),
        ("base", "3bit"), ("embeddings", "3bit"), ("side_blocks", 2), ("side_rank", 10**6),
    ],
)  # fmt: skip
def test_a_step_that_cannot_be_profiled_is_refused_in_the_names_of_the_door(
    name: str, value: Any, tmp_path: Path, tightfit: Any
) -> None:
    model = tmp_path / "config.json"
    model.write_text(json.dumps(CONFIGS["llama"] | {"max_position_embeddings": 1024}))
    with pytest.raises(InputError) as caught:
        profile(model, **{name: value})
    assert name in str(caught.value)
    assert "--" not in str(caught.value)
    code, _, err = tightfit("profile", model, f"--{name.replace('_', '-')}", value, "-o", tmp_path / "profile.json")
    assert code == 2
    assert f"--{name.replace('_', '-')}" in err
    assert not UNDERSCORED.search(err)


def test_options_of_a_file_are_named_by_their_keys(tmp_path: Path, tightfit: Any) -> None:
    file = tmp_path / "options.toml"
    train = ("train", "model", "--data", "data.jsonl", "-o", tmp_path / "out", "--config", file)
    file.write_text("steps = 3\nearly_stopping = 2\n")
    assert tightfit(*train)[2].startswith(
        "tightfit: early_stopping: there is one evaluation, after the last step; give eval_every,"
    )
    file.write_text("epochs = 3\n")
    assert tightfit(*train, "--steps", 4)[2] == "tightfit: --steps 4 and epochs = 3.0: give one of them\n"


def raised_words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, words) of a file's raised errors, but for names that are given to `spelled`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None and "InputError" in ast.unparse(node.exc):
            parts = list(ast.walk(node.exc))
            calls = [part for part in parts if isinstance(part, ast.Call) and ast.unparse(part.func) == "spelled"]
            named = {id(one) for call in calls for one in ast.walk(call)}
            texts = [part for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            yield node.lineno, "…".join(str(part.value) for part in texts if id(part) not in named)


def sentences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, words) of a file's texts of several words, whoever says them later, but for docstrings and what is said of
    options.
    """
    silent = [node for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    silent += [node for node in calls if node.func.id in ("option", "Field")]
    left_out = {id(one) for node in silent for one in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) not in left_out and isinstance(node, ast.JoinedStr | ast.Constant):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            left_out |= {id(part) for part in parts}
            words = "…".join(str(part.value) for part in parts if isinstance(part, ast.Constant))
            if " " in words.strip():
                yield node.lineno, words


@pytest.mark.slow
def test_no_error_of_the_library_has_an_option_of_the_command_line_in_it() -> None:
    """But in commands, which stand in backquotes, those of other programs and styles of pages; nor a name of Python's
    with more than one word.
    """
    rooms = [PACKAGE / name for name in ("planner", "profiles", "runtime")]
    files = {
        f"{room.name}/{file.relative_to(room.resolve())}": file
        for room in rooms
        for file in room.resolve().rglob("*.py")
    }
    assert len(files) > 300
    trees = {name: ast.parse(file.read_text()) for name, file in sorted(files.items()) if not name.startswith(DOORS)}
    in_words = re.compile(r"(?<![\w-])--[a-z]")
    found = [
        f"{name}:{line}: {words}"
        for name, tree in trees.items()
        for line, words in sentences(tree)
        if in_words.search(re.sub(r"`[^`]*`|pip install .*|gguf-split --merge|--kind-\S+:", "", words))
    ]
    found += [
        f"{name}:{line}: {words}"
        for name, tree in trees.items()
        for line, words in raised_words(tree)
        if UNDERSCORED.search(words)
    ]
    assert found == []
