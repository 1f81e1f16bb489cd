"""Renders conversations to text with the model's own chat template, and finds which parts of it are the assistant's."""

from __future__ import annotations

import datetime as dt
import json
import traceback
from collections.abc import Sequence
from functools import partial
from os.path import commonprefix
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from tightfit.profiles.sources.vocabulary import Vocabulary
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.data.bounded_template import BoundedEnvironment
from tightfit.runtime.data.samples import SPOKEN, Message, Tools, texts_in

DAY = dt.date(2024, 7, 26)
"""The date that templates get as today, always the same (the one Llama's templates default to), so that a run that is
resumed on another day sees the same data."""
ROLES = ("system", "developer", "user", "assistant", "tool")
Segment = tuple[str, bool]
"""A piece of text, and whether it is to be predicted."""


class ChatTemplate:
    """A model's chat template, compiled. Templates are untrusted programs, so they run in Jinja's sandbox.

    The settings are those of transformers. Raises InputError if the model has no template or it is not valid Jinja.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        if not vocabulary.chat_template:
            raise InputError("the model has no chat template; write prompts as strings instead of messages")
        environment = BoundedEnvironment(
            [loopcontrols, _GenerationTag], {"raise_exception": _refuse, "strftime_now": DAY.strftime}
        )
        environment.replace_filter("tojson", _to_json)
        self._environment = environment
        self._plain = _compiled(environment, vocabulary.chat_template)
        tool_template = vocabulary.tool_template
        self._with_tools = _compiled(environment, tool_template) if tool_template else self._plain
        tokens = {
            "bos_token": vocabulary.bos_token,
            "eos_token": vocabulary.eos_token,
            "pad_token": vocabulary.pad_token,
        }
        self._tokens: dict[str, Any] = {key: token or "" for key, token in tokens.items()} | vocabulary.special_tokens

    def render(self, messages: Sequence[Message], *, generation_prompt: bool, tools: Tools | None = None) -> str:
        """The text of `messages`; with `generation_prompt`, followed by what precedes the assistant's next turn.

        Raises InputError if the template does not show tools that are given, or refuses the messages.
        """
        source, template = self._plain if tools is None else self._with_tools
        self._check_roles(messages, source)
        for key, used in (("tools", tools), ("tool_calls", any(message.get("tool_calls") for message in messages))):
            if used and key not in source:
                raise InputError(
                    f'the model\'s chat template does not show "{key}"; leave them out, or write them as text'
                )
        self._environment.allow(sum(map(len, texts_in([messages, tools]))))
        try:
            return template.render(
                messages=list(messages),
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=generation_prompt,
                **self._tokens,
            )
        except Exception as error:  # a stranger's program
            raise InputError(f"the model's chat template refuses these messages {_describe_error(error)}") from error

    def _check_roles(self, messages: Sequence[Message], source: str) -> None:
        for index, message in enumerate(messages):
            role = message["role"]
            if role not in ROLES and not any(f"{quote}{role}{quote}" in source for quote in "'\""):
                raise InputError(
                    f"message {index} has the role {role[:60]!r}; the roles are {', '.join(ROLES)}, and those that the"
                    " model's chat template names"
                )

    def completion(
        self, prompt: Sequence[Message], completion: str | Message, tools: Tools | None = None
    ) -> list[Segment]:
        """Segments of the prompt and of the completion, which ends with the template's end of turn."""
        turn = {"role": "assistant", "content": completion} if isinstance(completion, str) else completion
        return self.conversation([*prompt, turn], last_only=True, tools=tools)

    def conversation(
        self, messages: Sequence[Message], *, last_only: bool = False, tools: Tools | None = None
    ) -> list[Segment]:
        """Segments of the text up to the assistant's last turn. Each of its turns is predicted, end-of-turn token
        included.

        With `last_only`, only the last one is. Templates may rewrite earlier turns once later ones follow (Qwen3
        removes thoughts): a turn whose own rendering is not in the whole text is not predicted. Raises InputError if
        that happens to the last turn, or the template refuses the messages.
        """
        self._check_roles(messages, (self._plain if tools is None else self._with_tools)[0])
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        messages = messages[: last + 1]
        render = partial(self.render, tools=tools)
        text = render(messages, generation_prompt=False)
        segments: list[Segment] = []
        done = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or (last_only and index != last):
                continue
            turn = text if index == last else render(messages[: index + 1], generation_prompt=False)
            end = len(turn.rstrip())
            if index:
                head = render(messages[:index], generation_prompt=True)
            else:  # a template may refuse an empty list: compare renderings with other words to find where they begin
                others = [render([_with_words(words, message)], generation_prompt=False) for words in ("x", "y")]
                head = commonprefix([turn, *others])  # noqa: RUF071  characters are meant
                head = head if len(head) < end else ""  # the template does not show the words at all
            if text.startswith(turn[:end]) and turn.startswith(head) and done <= len(head) < end:
                segments += [(text[done : len(head)], False), (text[len(head) : end], True)]
                done = end
            elif index == last:
                raise InputError(
                    "the model's chat template does not continue its own generation prompt; write prompts as strings"
                    " instead of messages"
                )
        return [(part, predicted) for part, predicted in segments if part]


def _compiled(environment: BoundedEnvironment, source: str) -> tuple[str, jinja2.Template]:
    try:
        return source, environment.compiled(source)
    except Exception as error:
        raise InputError(
            f"the model's chat template is not valid Jinja {_describe_error(error)}; write prompts as strings instead"
            " of messages"
        ) from error


def _describe_error(error: Exception) -> str:
    """For messages: a template's error in brackets, and its line if that is known."""
    text = f"({error})" if isinstance(error, jinja2.TemplateError) else f"({type(error).__name__}: {error})"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
    return text if line is None else f"{text} in its line {line}"


def _with_words(words: str, message: Message) -> Message:
    """A message with the content `words` and no thoughts or tool calls."""
    return {key: value for key, value in message.items() if key not in SPOKEN} | {"content": words}


class _GenerationTag(Extension):
    """Lets templates use ``{% generation %}``, with which transformers marks the assistant's text; it has no effect
    here.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
