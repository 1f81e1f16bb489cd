"""The process that shows answers: it starts the one that computes them under the cap, hands prompts over, prints
tokens.

    python -m tightfit.runtime.supervision.answering ORDER    answers the prompts of an `AnswerOrder`
    python -m tightfit.runtime.supervision.answering --measure    prints the bytes of memory that this process takes

Its memory counts against the budget; so it imports the standard library only. `tightfit generate` becomes this process
once all is prepared.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from tightfit.runtime.common import interpreter
from tightfit.runtime.common.errors import RunError
from tightfit.runtime.common.files import write_all
from tightfit.runtime.common.interrupts import relayed_signals
from tightfit.runtime.common.strict_json import to_json
from tightfit.runtime.common.units import format_size
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.supervision.cgroup import MemoryCgroup
from tightfit.runtime.supervision.failure import fail
from tightfit.runtime.supervision.token_text import NO_SPACE, TokenText, write_table
from tightfit.runtime.supervision.training_process import RunOrder, TrainingProcess, started

MODULE = "tightfit.runtime.supervision.answering"
SLACK_BYTES = 256 << 10
"""allowance for what this process takes beyond what was measured"""
PLAYED = 512
"""messages of the answer that is played back to measure this process's memory"""


@dataclass(frozen=True, kw_only=True)
class AnswerOrder:
    """Prompts to be answered, or a conversation: all that the process that shows answers needs, as a JSON file."""

    run: RunOrder
    table: str
    """path of the tokens' texts"""
    prompts: str | None
    """path of JSON lines with `prompt` and its `ids`; None: a person is asked"""
    several: bool
    """whether there is more than one prompt"""
    ends: list[int]
    """tokens that end an answer"""
    max_tokens: int
    sampling: dict[str, Any]
    system: str | None
    """text of the system turn of a conversation"""
    vocabulary: int
    """tokens that the model has"""
    plan: dict[str, Any]
    """summary of the plan"""
    as_json: bool
    stream: bool
    """whether JSON has the text as it comes, too"""
    debug: bool
    counted: bool
    """whether the memory of the process that shows the answers counts; not if a program asks"""
    preparation_bytes: int
    """VmHWM of the process that prepared this"""
    stage_bytes: dict[str, dict[str, int | None]]
    """what was done before the answers -> bytes that all processes were predicted to hold meanwhile, if that was
    predicted, and held
    """
    group: tuple[str, int] | None
    """path and version of the cgroup that this process was put into"""
    home: str | None
    """path of the cgroup that it was in before"""

    def write(self, path: str) -> None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file)

    @classmethod
    def read(cls, path: str) -> Self:
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
        return cls(**fields | {"run": RunOrder(**fields["run"])})


class Answers:
    """A process that computes answers, with the descriptor of its requests."""

    def __init__(self, order: AnswerOrder, child: TrainingProcess, requests: int) -> None:
        self.order, self.child = order, child
        self._requests = requests
        self._messages = child.messages()
        self._text = TokenText(order.table)
        self._number = 0
        self.answered: dict[str, Any] = {}
        """figures of the latest answer"""
        self.answering = False

    def ask(self, ids: list[int], *, keep: bool = False) -> Iterator[str]:
        """Yields the text of the answer to a prompt, a few letters at a time. With `keep` the beginning that it shares
        with the prompt before is not computed again. Raises what the process ended with.
        """
        request = {
            "ids": ids,
            "max_tokens": self.order.max_tokens,
            "ends": self.order.ends,
            "sampling": self.order.sampling,
            "number": self._number,
            "keep": keep,
        }
        self._number += 1
        self._text.begin()
        try:
            write_all(self._requests, json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            self.child.end()
            raise RunError("the process that computes answers has ended; start again") from None
        self.answering, whole = True, ""
        for message in self._messages:
            if message["event"] == "token":
                text = "" if message["id"] in self.order.ends else self._text.add(message["id"])
            elif message["event"] == "answered":
                self.answering = False
                text = self._text.end()
                self.answered = _told(message, whole + text, self.order)
            else:
                continue
            whole += text
            if text:
                yield text
            if not self.answering:
                return
        self.answering = False
        self.child.end()
        raise RunError("the process that computes answers has ended; start again")

    def close(self) -> None:
        """Close the table of tokens, once no prompt follows."""
        self._text.close()


def _told(message: dict[str, Any], text: str, order: AnswerOrder) -> dict[str, Any]:
    """The figures of an answer: bytes and seconds, predicted beside measured."""
    later, predicted = message["tokens"] - 1, order.plan["peak_bytes"]
    shown_bytes, own_bytes = order.run.planned["supervisor_bytes"], memory().peak
    processes = {"computing": {"predicted": predicted - shown_bytes, "measured": message["peak_bytes"]}}
    if order.counted:
        processes["showing"] = {"predicted": shown_bytes, "measured": own_bytes}
    token_seconds = (message["seconds"] - message["first_seconds"]) / later if later else None
    return {
        "text": text,
        "end": message["why"],
        "prompt_tokens": message["prompt_tokens"],
        "reused_tokens": message["reused_tokens"],
        "tokens": message["tokens"],
        "seconds": message["seconds"],
        "first_seconds": message["first_seconds"],
        "token_seconds": {"predicted": order.plan["token_seconds"], "measured": token_seconds},
        "peak_bytes": {
            kind: sum(process[kind] for process in processes.values()) for kind in ("predicted", "measured")
        },
        "processes": processes,
        "budget_bytes": order.plan["budget_bytes"],
    }


@contextmanager
def answers(order: AnswerOrder) -> Iterator[Answers]:
    """Start the process that computes; yields what asks it. At the end it ends too, and what it failed with is raised.

    A signal that asks to end is passed on to it.
    """
    group = MemoryCgroup(Path(order.group[0]), order.group[1]) if order.group else None
    read, write = os.pipe()
    try:
        with relayed_signals() as passing, started(order.run, requests=read, group=group) as child:
            os.close(read)
            read = -1
            passing.to(child.process)
            asking = Answers(order, child, write)
            try:
                yield asking
            except BaseException:
                child.process.kill()
                child.process.wait()
                raise
            asking.close()
            os.close(write)
            write = -1
            try:
                child.end()
            except RunError as error:
                error.interrupted = passing.asked
                raise
    finally:
        for descriptor in (read, write):
            if descriptor >= 0:
                os.close(descriptor)


def sentence(answered: dict[str, Any]) -> str:
    """The figures of an answer in a sentence."""
    each, peak = answered["token_seconds"], answered["peak_bytes"]
    speed = f", {each['measured']:.3f} s each ({each['predicted']:.3f} predicted)" if each["measured"] else ""
    return (
        f"{answered['tokens']} tokens in {answered['seconds']:.1f} s, the first after"
        f" {answered['first_seconds']:.1f}{speed}; peak {format_size(peak['measured'])} of"
        f" {format_size(answered['budget_bytes'])} ({format_size(peak['predicted'])} predicted)"
    )


def answer_all(order: AnswerOrder) -> None:
    """Answer the prompts of an order, one after the other, and print the answers."""
    assert order.prompts is not None
    with answers(order) as asking, open(order.prompts, encoding="utf-8") as prompts:
        for line in prompts:
            request = json.loads(line)
            if order.several and not order.as_json:
                sys.stdout.write(f"> {request['prompt']}\n")
            for text in asking.ask(request["ids"]):
                if not order.as_json or order.stream:
                    sys.stdout.write(to_json({"piece": text}) + "\n" if order.as_json else text)
                    sys.stdout.flush()
            if order.as_json:
                record = {"prompt": request["prompt"], **asking.answered, "preparation_bytes": order.preparation_bytes}
                record |= {"stage_bytes": order.stage_bytes, "plan": order.plan}
                sys.stdout.write(to_json(record) + "\n")
            else:
                sys.stdout.write("\n\n" if order.several else "\n")
            sys.stdout.flush()
            if not order.as_json:
                sys.stderr.write(f"{sentence(asking.answered)}\n")


def carried_out(path: str, work: Any) -> int:
    """Do the `work` of the order at `path` and clean up; returns an exit code."""
    order = AnswerOrder.read(path)
    try:
        work(order)
    except (Exception, KeyboardInterrupt) as error:
        return fail(error, as_json=order.as_json, debug=order.debug)
    finally:
        if order.group:
            MemoryCgroup(Path(order.group[0]), order.group[1]).leave(order.home)
        shutil.rmtree(order.run.directory, ignore_errors=True)
    return 0


def measure() -> int:
    """Peak bytes of this process, which plays an answer of `PLAYED` tokens."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "table")
        write_table(path, [b"token"] * PLAYED, NO_SPACE)
        text = TokenText(path)
        for token in range(PLAYED):
            line = json.dumps({"event": "token", "id": token, "peak_bytes": 1 << 30})
            text.add(json.loads(line)["id"])
        with relayed_signals():
            subprocess.run(["/bin/true"], check=False)
    return memory().peak + SLACK_BYTES


def command(*arguments: str) -> list[str]:
    """The command line of this process."""
    return interpreter.command(MODULE, *arguments)


def main(arguments: list[str]) -> int:
    if arguments == ["--measure"]:
        sys.stdout.write(f"{measure()}\n")
        return 0
    return carried_out(arguments[0], answer_all)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
