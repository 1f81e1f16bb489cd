"""What docs/small-device.md tells, word for word, on two machines: a planner, and a device in a memory cgroup of 256
MiB; and whatever can go wrong between them is said within seconds and loses nothing.

TIGHTFIT_TRIAL=model.gguf,data.jsonl tries another model than a tiny one.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from damage import CONFIG, ROWS, lines
from tiny_models import byte_level_tokenizer, random_weights, write_directory
from two_machines import NAME, Machines, two_machines

from tightfit.runtime.common import interpreter
from tightfit.runtime.supervision.cgroup import MemoryCgroup

pytestmark = pytest.mark.slow
DOCS = Path(__file__).parents[2] / "docs"
MIB = 1 << 20
LIMIT = 256 * MIB
WITHIN = 120.0
"""seconds in which a failure has to be told: it takes 2 on an idle machine, and on a busy one Python alone takes 20 to
start
"""
PATIENCE = 400.0
TOKEN = "a-token-of-some-length"
WITHOUT = ("ortools", "transformers", "matplotlib", "networkx", "pandas")


def documented(page: str, beginning: str) -> str:
    """The first command of a page that begins so, in one line."""
    text = (DOCS / page).read_text().replace("\\\n", "")
    found = re.search(rf"^(?:\w+=\S+ )?{re.escape(beginning)}.*$", text, re.MULTILINE)
    assert found, f"docs/{page} has no {beginning}"
    return found[0].partition("  #")[0]


@dataclass
class Trial:
    machines: Machines
    folder: Path
    words: dict[str, str]
    """what the pages leave open -> what is meant here"""
    service: Any = None
    groups: list[MemoryCgroup] = field(default_factory=list)

    def serve(self) -> None:
        with (self.folder / "service.log").open("ab") as log:
            self.service = subprocess.Popen(
                self.machines.planner(self._shell(documented("small-device.md", "tightfit serve"), "planner")),
                stdout=log, stderr=log, cwd=self.folder,
            )  # fmt: skip
        begun = time.monotonic()
        while b'"serving"' not in (self.folder / "service.log").read_bytes():
            assert self.service.poll() is None, (self.folder / "service.log").read_text()
            assert time.monotonic() - begun < PATIENCE
            time.sleep(0.1)
        time.sleep(1.0)

    def kill(self) -> None:
        self.service.send_signal(signal.SIGKILL)
        self.service.wait()
        (self.folder / "service.log").unlink()

    def on_device(self, command: str, cache: str, **environment: str) -> subprocess.Popen[str]:
        """Begin a command of the pages on the device, in a memory cgroup of its own."""
        group = MemoryCgroup.create(LIMIT)
        if group is None:
            pytest.skip("no memory cgroup can be made here")
        self.groups.append(group)
        line = group.enter(self.machines.device(self._shell(command, "device")))
        variables = os.environ | {"TIGHTFIT_TOKEN": TOKEN, "TIGHTFIT_CACHE": str(self.folder / cache)} | environment
        return subprocess.Popen(
            line, cwd=self.folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ended(self, process: subprocess.Popen[str], within: float = PATIENCE) -> tuple[int, str, str]:
        try:
            output, errors = process.communicate(timeout=within)
        except BaseException:
            process.kill()
            raise
        assert not sum(group.oom_kills() for group in self.groups), errors
        return process.returncode, output, errors

    def _shell(self, command: str, machine: str) -> list[str]:
        for written, meant in self.words.items():
            command = command.replace(written, meant)
        path = f"{self.folder / machine}:{os.environ['PATH']}"
        return ["env", f"PATH={path}", "/bin/sh", "-c", f"exec env {command}"]


def write_program(folder: Path, left_out: tuple[str, ...]) -> None:
    """`tightfit` as an installed command, on a machine without the packages that are left out."""
    folder.mkdir()
    refusing = (
        "import sys\n"
        "class Refusing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {left_out!r}:\n"
        "            raise ModuleNotFoundError(f'no module named {name}', name=name)\n"
        "sys.meta_path.insert(0, Refusing())\n"
    )
    (folder / "sitecustomize.py").write_text(refusing)
    line = shlex.join(interpreter.command("tightfit.runtime.cli.main"))
    path = f"{folder}:{interpreter.python_path()}"
    (folder / "tightfit").write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {line} "$@"\n')
    (folder / "tightfit").chmod(0o755)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    folder = tmp_path_factory.mktemp("machines")
    write_program(folder / "planner", ())
    write_program(folder / "device", WITHOUT)
    model, data = os.environ.get("TIGHTFIT_TRIAL", f"{folder / 'model'},{folder / 'data.jsonl'}").split(",")
    write_directory(folder / "model", CONFIG, random_weights(CONFIG), tokenizer=byte_level_tokenizer())
    (folder / "data.jsonl").write_text(lines(ROWS))
    words = {
        "MODEL.gguf": model,
        "data.jsonl": data,
        "--epochs 1": "--steps 4",
        '"..."': '"It is" --max-tokens 8',
        "=...": f"={TOKEN}",
    }
    for name in ("planner", "other"):
        made = documented("service.md", "openssl req").replace("planner.", f"{name}.").replace(f"{name}.local", NAME)
        subprocess.run(["/bin/sh", "-c", made], cwd=folder, check=True, capture_output=True)
    with two_machines(folder) as machines:
        trial = Trial(machines, folder, words)
        trial.serve()
        try:
            yield trial
        finally:
            trial.service.kill()
            trial.service.wait()
            for group in trial.groups:
                group.remove()


def train() -> str:
    return documented("small-device.md", "tightfit train MODEL.gguf --data data.jsonl")


def answer() -> str:
    return documented("small-device.md", "tightfit generate MODEL.gguf --adapter")


def test_what_the_page_tells_is_what_happens(trial: Trial) -> None:
    code, _, errors = trial.ended(trial.on_device(train(), "cache"))
    assert code == 0, errors
    assert (trial.folder / "out" / "adapter" / "adapter_model.safetensors").exists()
    code, output, errors = trial.ended(trial.on_device(answer(), "cache"))
    assert code == 0, errors
    assert output
    assert " tokens in " in errors
    assert [group.oom_kills() for group in trial.groups] == [0, 0]


REFUSED = {
    "a wrong token": ({"TIGHTFIT_TOKEN": "another-token-of-that-length"}, "", 2, "set TIGHTFIT_TOKEN to the service's token"),
    "no token": ({"TIGHTFIT_TOKEN": ""}, "", 2, "set TIGHTFIT_TOKEN to the service's token"),
    "another's certificate": ({}, "other.pem", 2, "its certificate is not trusted"),
    "no certificate": ({}, "none.pem", 2, "none.pem: No such file or directory"),
    "a name that is not in it": ({}, "192.168.1.30", 4, "no answer"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_told_within_seconds(trial: Trial, case: str) -> None:
    environment, other, code, words = REFUSED[case]
    replaced = "planner.pem" if other.endswith(".pem") else NAME
    for command in (train().replace("-o out", "-o refused"), answer()):
        wrong = command.replace(replaced, other) if other else command
        ended, _, errors = trial.ended(trial.on_device(wrong, "refused", **environment), WITHIN)
        assert (ended, words in errors, "it is asked again" in errors) == (code, True, False), errors


def test_a_cable_that_is_pulled_is_told_within_seconds(trial: Trial) -> None:
    trial.machines.cable("down")
    try:
        code, _, errors = trial.ended(trial.on_device(train().replace("-o out", "-o unplugged"), "unplugged"), WITHIN)
    finally:
        trial.machines.cable("up")
    assert code == 4, errors
    assert f"https://{NAME}:8000: no answer" in errors


@pytest.mark.parametrize("what", ["the service is killed", "the cable is pulled"])
def test_nothing_is_lost_in_the_middle(trial: Trial, what: str) -> None:
    """While the device measures; it goes on from what was traced and measured when the service is back."""
    out = f"lost-{'service' if 'service' in what else 'cable'}"
    cache = f"{out}-cache"
    process = trial.on_device(train().replace("-o out", f"-o {out}"), cache)
    begun = time.monotonic()
    while not list((trial.folder / cache).glob("bundles/*/*/bundle.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begun < PATIENCE
        time.sleep(0.02)
    if "service" in what:
        trial.kill()
    else:
        trial.machines.cable("down")
    code, _, errors = trial.ended(process)
    if "service" in what:
        trial.serve()
    else:
        trial.machines.cable("up")
    assert code == 4, errors
    assert "no answer" in errors
    profile = trial.folder / out / "profile.json"
    before = profile.read_bytes()
    resume = documented("small-device.md", "tightfit train --resume -o out").replace("-o out", f"-o {out}")
    code, _, errors = trial.ended(trial.on_device(resume, cache))
    assert code == 0, errors
    assert profile.read_bytes() == before
    assert (trial.folder / out / "adapter" / "adapter_model.safetensors").exists()
