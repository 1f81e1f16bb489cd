"""Checkpoints: directories with everything that a run needs to go on as if it had never stopped.

``checkpoint-N/``, made after step N, holds the trained tensors (as an adapter that PEFT loads, or in a module's
``model.safetensors``), ``optimizer.safetensors`` (Adam's two moments of each, and the gradients summed so far where an
update takes several steps) and ``state.json`` (the run's conditions, the files' checksums, the result of the evaluation
before the first step, and how many labels the summed gradients are over). It is written under another name, forced to
disk and renamed, so that a directory with this name is always whole. The order of the data is a function of the step
number (`tightfit.runtime.engine.training.records`), so that no other state exists.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.files import sync_directory
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.run_folder import find_checkpoints, how_to_continue
from tightfit.runtime.common.strict_json import read_json

STEP_BY_STEP = "given step by step"
"""stands in the place of the data's fingerprint in checkpoints of a Session, whose batches come from the user's loop"""
STATE = "state.json"
VERSION = 1
OPERATORS = "operators"
"""key of the condition that holds the version of tightfit's operators: another version may round differently, so that
results differ in their last bits even for equal shapes"""
PACKING = "samples share rows"
"""key of the condition that holds whether they do"""
UNSAID_OPERATORS = 6
"""the operators' version of checkpoints that state none: the last one before it was recorded"""


@dataclass(frozen=True, kw_only=True)
class FoundCheckpoint:
    path: str
    step: int
    state: dict[str, Any]


def load_latest(directory: str, expected: Mapping[str, Any], data: str = "this run has") -> FoundCheckpoint:
    """The newest checkpoint in `directory`, which must have been made under the conditions `expected`.

    Raises InputError if there is none, it is damaged, or a condition differs. `data` names this run's data in that
    message.
    """
    found = find_checkpoints(directory)
    if not found:
        raise InputError(
            f"{directory} holds no checkpoint to resume from; give {spelled('overwrite', True)} in place of"
            f" {spelled('resume', True)} to start from the beginning"
        )
    step, path = found[-1]
    try:
        state = read_json(os.path.join(path, STATE))
        if not isinstance(state, dict) or state["version"] != VERSION or state["step"] != step:
            raise ValueError
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}/{STATE} is missing or damaged; remove this checkpoint and resume from the one before"
        ) from error
    made = {OPERATORS: UNSAID_OPERATORS} | state["conditions"]
    for key, value in expected.items():
        if made.get(key) != value:
            told = _difference(key, made.get(key), value)
            same = "the tightfit that began the run" if key == OPERATORS else "the same"
            if key == "data":
                told = f"with other data than {data}"
                if STEP_BY_STEP in (made.get(key), value):
                    whose = "`run`" if value == STEP_BY_STEP else "a Session"
                    told, same = f"by {whose}", f"{whose}, on the same data,"
            raise InputError(f"{path} was made {told}; resume with {same} or start a new output directory")
    return FoundCheckpoint(path=path, step=step, state=state)


def _difference(key: str, was: Any, now: Any) -> str:
    if key == OPERATORS:
        return f"by another version of tightfit's operators ({was}, this one has {now}), which may round otherwise"
    if key == PACKING:
        return f"with{'' if was else 'out'} samples that share rows (--{'' if was else 'no-'}packing)"
    if key == "graph":  # a hash
        return "by another version of tightfit or for another model: the operators of its steps differ"
    if key == "weights":  # hashes
        return "with other weights"
    if key == "adapter":  # hashes; None where training starts from new values
        return "from another adapter" if was and now else f"from {'a given' if was else 'no'} adapter"
    if key == "steps of an update":  # None where every step makes an update
        return f"with {was or 1} step{'s' * bool(was)} to an update, this run has {now or 1}"
    if key == "largest norm of gradients":  # None where they are not clipped
        told = [
            "without clipped gradients" if limit is None else f"with gradients clipped to {limit:g}"
            for limit in (was, now)
        ]
        return f"{told[0]}, this run is {told[1]}"
    if isinstance(was, dict) and isinstance(now, dict):
        differ = [f"{name} {was[name]!r}, now {now[name]!r}" for name in was if name in now and was[name] != now[name]]
        return f"with another {key}: {'; '.join(differ)}"
    return f"with {key} {was!r}, this run has {now!r}"


def save(
    directory: str, step: int, conditions: Mapping[str, Any], fill: Callable[[str], dict[str, Any]], keep: int
) -> str:
    """Write ``checkpoint-<step>``: `fill(path)` writes its files and returns further entries of ``state.json``.

    Returns the path. Removes all but the newest `keep` checkpoints, at least one. Raises RunError if the disk refuses;
    earlier checkpoints are then intact.
    """
    import shutil  # imported here: with its compressors it takes 1 MiB, which a run's supervisor need not hold

    path = os.path.join(directory, f"checkpoint-{step}")
    partial = os.path.join(directory, f".checkpoint-{step}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        state = {"version": VERSION, "step": step, "conditions": dict(conditions), **fill(partial)}
        write_json(os.path.join(partial, STATE), state)
        sync_directory(partial)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(partial, path)
        sync_directory(directory)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        found = find_checkpoints(directory)
        last = f"the last good checkpoint is {found[-1][1]}" if found else "there is no earlier checkpoint"
        raise RunError(
            f"saving {path} failed: {error.strerror}; {last}; free disk space and {how_to_continue(directory)}"
        ) from error
    for _, old in find_checkpoints(directory)[: -max(1, keep)]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def write_json(path: str, content: Any) -> None:
    """Write and fsync a JSON file."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def partial_directories(directory: str) -> Iterator[str]:
    """Half-written checkpoints in `directory`, left by a process that was killed."""
    for name in os.listdir(directory):
        if name.startswith(".checkpoint-") and name.endswith(".partial"):
            yield os.path.join(directory, name)
