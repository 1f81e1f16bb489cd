"""What other trainers call an option is told what it is called here, at the command line and in a file of options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from tightfit.profiles.option_fields import options_of, word_of
from tightfit.runtime.cli import main
from tightfit.runtime.cli.config_file import FOR_ONE_CALL
from tightfit.runtime.cli.options import key_of
from tightfit.runtime.cli.other_tools import NEEDLESS, OTHER_NAMES, STAGES, hint

COMMANDS: Any = typer.main.get_command(main.app).commands  # type: ignore[attr-defined]
KEYS = {name: {key_of(one) for one in command.params} for name, command in COMMANDS.items() if name != "fleet"}


def test_what_is_named_is_an_option_and_what_it_is_named_for_is_none() -> None:
    assert {*OTHER_NAMES.values()} <= KEYS["train"]
    assert not {*OTHER_NAMES, *NEEDLESS} & KEYS["train"]
    assert not {*OTHER_NAMES} & {*NEEDLESS}
    assert all({*words(record)} <= KEYS["train"] for record in STAGES.values())


def words(record: Any) -> list[str]:
    """The keys of a record's options in a file."""
    return [word_of(*item).removeprefix("--").replace("-", "_") for item in options_of(record).items()]


@pytest.mark.parametrize("name", [*OTHER_NAMES, *NEEDLESS])
def test_a_name_of_another_trainer_is_understood_at_every_door(name: str, tightfit: Any, tmp_path: Path) -> None:
    written = f"--{name.replace('_', '-')}"
    code, _, err = tightfit("train", "model", "--data", "data.jsonl", "-o", tmp_path / "out", written, "1")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"tightfit: No such option: {written}; ")
    file = tmp_path / "options.toml"
    file.write_text(f"{name} = 1\n")
    code, _, told = tightfit("train", "model", "--data", "data.jsonl", "-o", tmp_path / "out", "--config", file)
    assert code == 2
    if OTHER_NAMES.get(name) in FOR_ONE_CALL:
        assert told.endswith(f"{name}: this is said on the command line, not in a file; leave it out\n")
        return
    assert told.startswith(f"tightfit: {file}: {name}: no option of `tightfit train`; ")
    if name in OTHER_NAMES:
        ours = OTHER_NAMES[name]
        assert f"; it is {'MODEL' if ours == 'model' else '--' + ours.replace('_', '-')} here; " in err
        assert told.endswith(f"; it is {ours} here\n")
    else:
        assert "`" not in err.replace("`tightfit", "").replace("--to`", "").partition("; try")[0]


@pytest.mark.parametrize("command", ["profile", "plan", "run"])
def test_another_command_that_has_it_is_named(command: str, tightfit: Any) -> None:
    argument = {"profile": [], "plan": ["--memory", "1GB"], "run": ["--data", "d", "-o", "out"]}[command]
    having: dict[str, list[str]] = {}
    for other, record in STAGES.items():
        for option in {*words(record)} - KEYS[command]:
            having.setdefault(f"--{option.replace('_', '-')}", []).append(f"`tightfit {other}`")
    for word, others in having.items():
        _, _, err = tightfit(command, "x", *argument, word, "1")
        assert f"No such option: {word}; {', '.join(others)} and `tightfit train` have it: {word}; " in err


def test_of_a_name_that_nobody_has_there_is_nothing_to_say() -> None:
    assert hint("xyzzy_plugh", {"lr": "--lr"}, near=True) == ""
    assert hint("lora_rnk", {"lora_rank": "lora_rank"}, near=True) == "; the nearest is lora_rank"
