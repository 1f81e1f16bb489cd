"""The process of a conversation: reads what a person writes, puts it into the chat template, and shows the answers.

    python -m tightfit.runtime.results.chat ORDER    holds the conversation of an `AnswerOrder`
    python -m tightfit.runtime.results.chat --measure FOLDER TOKENS    prints the bytes that this takes

Its memory counts against the budget: it imports the library `tokenizers` and Jinja beside the standard library, and no
more. It loads the tokenizer, and gives back what only loading took, before the model is there; what it holds beside the
model counts from then on.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tightfit.profiles.sources.directory_tokenizer import read_vocabulary
from tightfit.runtime.common import interpreter
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.strict_json import to_json
from tightfit.runtime.data.samples import Message
from tightfit.runtime.data.tokenization import Encoder
from tightfit.runtime.engine.device.resident import begin_peak_anew, memory
from tightfit.runtime.engine.start.process import trim_heap
from tightfit.runtime.supervision import answering
from tightfit.runtime.supervision.answering import AnswerOrder, Answers, answers, carried_out, sentence

MODULE = "tightfit.runtime.results.chat"
BYTES_PER_TOKEN = 8
"""A message may have so many bytes for each token that a conversation may have."""
ANEW = "/new"
SAMPLE = "So it is: 12 of 345, naïve café. "
SLACK_BYTES = 1 << 20


class ChatPrompt:
    """The turns so far, and how they become a prompt of at most `longest` tokens. Raises InputError without a chat
    template.
    """

    def __init__(self, encoder: Encoder, system: str | None, longest: int) -> None:
        self._encoder, self._longest = encoder, longest
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[Message] = []
        self.forgotten = 0
        """turns that were left out because there was no room"""
        encoder.chat  # noqa: B018  raises where there is none

    def anew(self) -> None:
        self._turns.clear()
        self.forgotten = 0

    def ask(self, text: str) -> list[int]:
        """The tokens of the conversation with this question; the oldest questions are forgotten, with their answers,
        where there is no room for them. Raises InputError where there is none for the question itself, which is then
        not asked.
        """
        if len(text.encode()) > BYTES_PER_TOKEN * self._longest:
            raise InputError(f"{len(text.encode())} bytes are more than a conversation can have here; write less")
        self._turns.append({"role": "user", "content": text})
        try:
            while len(ids := self._tokens()) > self._longest:
                if len(self._turns) < 3:
                    raise InputError(
                        f"{len(ids)} tokens, and there is room for {self._longest}; write less, or give a larger"
                        f" {spelled('context')}"
                    )
                del self._turns[:2]
                self.forgotten += 2
        except InputError:
            self._turns.pop()
            raise
        return ids

    def answered(self, text: str) -> None:
        self._turns.append({"role": "assistant", "content": text})

    def _tokens(self) -> list[int]:
        return self._encoder.asked([*self._system, *self._turns])


def converse(order: AnswerOrder) -> None:
    """Hold a conversation until its end: of the input, or Ctrl-C while nothing is answered."""
    encoder = _loaded(order.run.directory, order.vocabulary)
    talk = ChatPrompt(encoder, order.system, order.plan["context"] - order.max_tokens)
    with answers(order) as asking, _interrupts(asking):
        if sys.stdin.isatty():
            sys.stderr.write(f"{ANEW} begins anew, Ctrl-C ends an answer, Ctrl-D the conversation\n")
        for text in _written():
            if text.strip() == ANEW:
                talk.anew()
                continue
            forgotten = talk.forgotten
            try:
                ids = talk.ask(text)
            except InputError as error:
                sys.stderr.write(f"tightfit: {error}\n")
                continue
            if talk.forgotten > forgotten:
                sys.stderr.write("(the oldest turns are forgotten: there is no room for them)\n")
            for part in asking.ask(ids, keep=True):
                if not order.as_json:
                    sys.stdout.write(part)
                    sys.stdout.flush()
            talk.answered(asking.answered["text"])
            if order.as_json:
                sys.stdout.write(to_json({"prompt": text, **asking.answered}) + "\n")
            else:
                sys.stdout.write("\n")
                sys.stderr.write(f"{sentence(asking.answered)}\n")
            sys.stdout.flush()


def _loaded(folder: str, vocab_size: int) -> Encoder:
    """An encoder by the vocabulary in `folder`. This process's peak is counted from now on."""
    encoder = Encoder(read_vocabulary(Path(folder)), vocab_size)
    encoder.chat  # noqa: B018  compiles the template
    trim_heap()
    begin_peak_anew()
    return encoder


def _written() -> Iterator[str]:
    """The lines that a person writes, without empty ones."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            return
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


@contextmanager
def _interrupts(asking: Answers) -> Iterator[None]:
    """While entered, Ctrl-C ends the present answer, and the conversation where nothing is answered."""

    def take(number: int, frame: Any) -> None:
        if not asking.answering:
            raise KeyboardInterrupt
        asking.child.process.send_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, take)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def measure(folder: str, tokens: int) -> int:
    """Peak bytes of this process in conversations of so many tokens at most, by the vocabulary in `folder`, once that
    is loaded.
    """
    encoder = _loaded(folder, 1 << 62)
    longest = BYTES_PER_TOKEN * tokens
    for text in (SAMPLE * (longest // len(SAMPLE.encode()) + 1), "7" * tokens):
        talk = ChatPrompt(encoder, None, tokens * longest)
        talk.ask(text[:longest])
    return max(answering.measure(), memory().peak + SLACK_BYTES)


def command(*arguments: str) -> list[str]:
    """The command line of this process."""
    return interpreter.command(MODULE, *arguments)


def main(arguments: list[str]) -> int:
    if arguments[0] == "--measure":
        sys.stdout.write(f"{measure(arguments[1], int(arguments[2]))}\n")
        return 0
    return carried_out(arguments[0], converse)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
