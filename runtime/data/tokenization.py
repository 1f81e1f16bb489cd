"""Tokenises samples into a record file, from which the training process reads them one by one.

`tightfit.runtime.engine.training.records` describes the file. Labels are shifted: labels[t] is the token that position
t must predict. Prompts, padding and the step from one text to the next are not predicted. Completions end with the
model's end-of-text token, conversations with the chat template's end of turn. A choice of a question is scored without
such an end, so that choices differ in nothing but their words.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar

from tightfit.profiles.sources.vocabulary import Vocabulary, refusals
from tightfit.runtime.common.errors import InputError, RunError, named
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.data import kept_tokens
from tightfit.runtime.data.kept_tokens import TokenSequence
from tightfit.runtime.data.preparation import LOOKED_AT, Preparation
from tightfit.runtime.data.samples import (
    PAIR_FORM,
    SPOKEN,
    AnswerPair,
    Completion,
    Conversation,
    Message,
    Prompt,
    Question,
    Sample,
    Text,
    Tools,
    checked_columns,
    data_files,
    read_samples,
    texts_in,
)
from tightfit.runtime.engine.training.records import IGNORED, RecordFile, RecordWriter

if TYPE_CHECKING:
    from tightfit.runtime.data.chat import ChatTemplate, Segment

Purpose = Literal["train", "evaluate"]
TooLong = Literal["refuse", "truncate"]
RANDOM, PREPARED = "random", ".records"
"""data that need no tokenizer: made-up tokens, and how the name of a file ends that was prepared before"""
RANDOM_RECORDS = 256
REPORTED_LINES = 20
Advice = Callable[[int], str]
"""advice(positions of the longest sample), for a message that refuses samples as too long"""

SAID, NAMES = {"content", *SPOKEN}, {"type", "id", "name"}
"""keys of a message whose values are somebody's words, and keys within these whose values only templates look at"""
PRIVATE = range(0xE000, 0xF900)
"""characters to which Unicode gives no meaning"""
Words = TypeVar("Words")
Tokens = tuple[list[int], list[bool]]
"""Token ids and, for each, whether it is to be predicted."""


def prepare(
    data: str,
    vocabulary: Vocabulary | None,
    directory: Path,
    *,
    seq: int,
    vocab_size: int,
    columns: Mapping[str, str] | None = None,
    purpose: Purpose = "train",
    too_long: TooLong = "refuse",
    seed: int = 0,
    pairs: bool = False,
    warn: Callable[[str], None] | None = None,
    progress: Callable[[int], None] | None = None,
    preparation: Preparation | None = None,
    kept: Path | None = None,
    positions: int | None = None,
) -> RecordFile:
    """Tokenise `data` into ``directory/<purpose>.records`` and open it.

    `data` is a file or directory of samples (`tightfit.runtime.data.samples`), ``random`` (tokens drawn with `seed`,
    for sizing), or a record file that was prepared before, which is copied. `columns` maps the names of a sample's
    parts to those in the data. With the purpose "train" a question becomes one record with its right answer, with
    "evaluate" a record for each choice. A sample of more than `seq` positions is refused or, if `too_long` is
    "truncate", cut: first at the front, as far as nothing there is predicted, then at the end. With `pairs` the samples
    have to be pairs of answers, and become two records each; `warn` is called with what is odd about them all, in
    words. `progress(samples)` is called after each sample with their number so far. `preparation` limits the length of
    lines and checks this process's memory. `kept` is a file of these data as tokens
    (`tightfit.runtime.data.kept_tokens`), which is read in their stead, and for which there need be no vocabulary.
    `positions` are those that the model was made for, None if that is unknown.

    Raises InputError, which names the bad lines (at most `REPORTED_LINES`) and counts the rest, RunError if the disk is
    full, and CapError if `preparation` does.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{purpose}.records"
    if data.endswith(PREPARED):
        return _copy_records(Path(data), path, seq=seq, vocab_size=vocab_size, pairs=pairs)
    pad = pad_token_of(padding_tokens(vocabulary) if kept is None else kept_tokens.padding(kept), vocab_size)
    with RecordWriter(path, seq=seq, pad_token=pad, vocab_size=vocab_size, source=data, pairs=pairs) as writer:
        if data == RANDOM:
            _write_random(writer, seed)
        else:
            encoder = encoder_for(data, vocabulary, vocab_size) if kept is None else None
            samples = DataPass(writer, encoder, purpose, too_long, plan_again(positions), pairs=pairs)
            if kept is not None:
                samples.replay(kept, vocab_size, progress, preparation)
            else:
                samples.run(data_files(data), progress, preparation, checked_columns(columns))
            if samples.equal and warn:
                warn(
                    f"in {samples.equal} of {samples.example} pairs of {data} the chosen answer and the rejected one"
                    " are equal: nothing is learned from comparing them"
                )
    return RecordFile.open(path)


def length_advice(room: Callable[[int], str], positions: int | None) -> Advice:
    """Advice for samples that are too long. `room(longest)` says what would have room for the longest; if that is
    longer than the `positions` that the model was made for, nothing has.
    """

    def words(longest: int) -> str:
        cut = f"cut them with {spelled('truncate', True)}"
        if positions is not None and longest > positions:
            return (
                f"the model was made for {positions} positions, and the longest sample has {longest}; shorten the"
                f" samples, or {cut}"
            )
        return f"{room(longest)} has room for every sample; or shorten them, or {cut}"

    return words


def plan_again(positions: int | None) -> Advice:
    """Advice for samples that are too long for a plan."""
    return length_advice(lambda longest: f"a profile with {spelled('seq', longest)}, and a plan of it,", positions)


def longest_sample(
    data: str,
    vocabulary: Vocabulary | None,
    *,
    most: int,
    purpose: Purpose = "train",
    too_long: TooLong = "refuse",
    advice: Advice,
    columns: Mapping[str, str] | None = None,
    pairs: bool = False,
    progress: Callable[[int], None] | None = None,
    preparation: Preparation | None = None,
    keep: Path | None = None,
) -> int:
    """Positions of the longest sample of `data`, which are files of samples as for `prepare`; the samples as tokens are
    written to the file `keep`, for `prepare`.

    Samples of more than `most` positions are refused or, if `too_long` is "truncate", counted in full; texts always
    are, since they are packed into windows. `advice` ends the message about samples that are refused. The rest is as in
    `prepare`, errors too.
    """
    with writing(keep) if keep is not None else nullcontext() as file:
        encoder = encoder_for(data, vocabulary)
        if file is not None:
            kept_tokens.begin(file, padding_tokens(vocabulary))
        samples = DataPass(_LengthCounter(most), encoder, purpose, too_long, advice, pairs=pairs, keep=file)
        samples.run(data_files(data), progress, preparation, checked_columns(columns))
    return max(samples.longest, samples.longest_text)


def tokens_file(folder: Path, purpose: Purpose) -> Path:
    """Path of the file in `folder` that keeps the data of a purpose as tokens."""
    return folder / f"{purpose}.tokens"


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A new file in which tokens are kept. Raises RunError where the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            yield file
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; free some space and start again") from error


def encoder_for(data: str, vocabulary: Vocabulary | None, vocab_size: int | None = None) -> Encoder:
    """An encoder for a model of `vocab_size` tokens, by default those of its tokenizer."""
    if vocabulary is None:
        raise no_tokenizer(data)
    return Encoder(vocabulary, vocabulary.tokenizer.get_vocab_size() if vocab_size is None else vocab_size)


def no_tokenizer(data: str) -> InputError:
    """What is wrong where a model without a tokenizer gets data."""
    return InputError(
        f"{data}: the model has no tokenizer; put tokenizer.json beside its config.json, or use"
        f" {spelled('data', 'random')}"
    )


def _copy_records(source: Path, path: Path, *, seq: int, vocab_size: int, pairs: bool) -> RecordFile:
    """A copy of a record file, which has to be of the same shape."""
    check_prepared(source, seq=seq, vocab_size=vocab_size, pairs=pairs)
    try:
        shutil.copyfile(source, path)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; free some space and start again") from error
    return RecordFile.open(path)


def check_prepared(source: Path, *, seq: int, vocab_size: int | None, pairs: bool) -> None:
    """Raise InputError for a record file that is of another shape; without a `vocab_size`, that is not looked at."""
    with RecordFile.open(source) as records:
        vocab_size = records.vocab_size if vocab_size is None else vocab_size
        if (records.seq, records.vocab_size) != (seq, vocab_size):
            raise InputError(
                f"{source}: prepared for sequences of {records.seq} and a vocabulary of {records.vocab_size}, and the"
                f" plan is for {seq} and {vocab_size}; prepare the data again"
            )
        if records.pairs != pairs:
            contents, expected = ("pairs of answers", "none") if records.pairs else ("no pairs of answers", "such")
            raise InputError(f"{source}: holds {contents}, and the plan is for {expected}; prepare the data again")


class Encoder:
    """Turns text into tokens, with the special tokens that the model was trained with."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        self.vocabulary = vocabulary
        self.vocab_size = vocab_size
        self.begin = vocabulary.token_id(vocabulary.bos_token) if vocabulary.add_bos else None
        self.end = vocabulary.token_id(vocabulary.eos_token)
        self._chat: ChatTemplate | None = None
        special = (vocabulary.bos_token, vocabulary.eos_token, vocabulary.pad_token)
        added = vocabulary.tokenizer.get_added_tokens_decoder().values()
        control = sorted(
            (each.content for each in added if len(each.content) > 1 and (each.special or each.content in special)),
            key=len,
        )
        self._control = re.compile("|".join(map(re.escape, reversed(control)))) if control else None
        self._known = "\0".join(["", *control, ""])

    @property
    def chat(self) -> ChatTemplate:
        if self._chat is None:
            from tightfit.runtime.data.chat import ChatTemplate  # imports Jinja, which takes 6 MiB

            self._chat = ChatTemplate(self.vocabulary)
        return self._chat

    def written(self, value: Words, render: Callable[[Words], Sequence[Segment]]) -> Tokens:
        """Tokens of the segments that `render` makes of what people write, in which special tokens are text.

        What people write must not become control tokens, neither by itself nor with its neighbours: only a chat
        template, and a text that may have been rendered by one, say where a turn ends. Where it would, a mark keeps its
        characters apart: a character that no text here has, and that has no tokens (`segments`). A text is enclosed in
        marks only if it makes a special token with its neighbours, since marks part words, too.
        """
        texts = list(texts_in(value))
        control = self._control
        if control is None or not any(control.search(text) or self._open(text) for text in texts):
            return self.segments(render(value))
        texts += [self.vocabulary.chat_template or "", self.vocabulary.tool_template or ""]
        mark = next((mark for mark in map(chr, PRIVATE) if not any(mark in text for text in texts)), None)
        if mark is None:
            raise InputError("every character for private use stands in it; leave some of them out")
        parted = _map_texts(value, lambda text, _: _part_control_tokens(text, control, mark))
        segments = render(parted)
        enclosed = _map_texts(parted, lambda text, said: _enclose(text, mark) if said and self._open(text) else text)
        if enclosed != parted:
            enclosed_segments = render(enclosed)
            if self._controls(enclosed_segments) != self._controls(segments):
                segments = enclosed_segments
        return self.segments(segments, mark)

    def _controls(self, segments: Sequence[Segment]) -> list[str]:
        """The special tokens in a text."""
        assert self._control is not None
        return self._control.findall("".join(part for part, _ in segments))

    def _open(self, text: str) -> bool:
        """Whether a text and its neighbours may make a special token together."""
        words, known = text.strip(), self._known
        for length in range(1, len(words) + 1):
            if words[:length] not in known:
                break
            if length == len(words) or f"{words[:length]}\0" in known:
                return True
        for length in range(1, len(words)):
            if words[-length:] not in known:
                break
            if f"\0{words[-length:]}" in known:
                return True
        return False

    def tokens(self, text: str, mark: str | None = None) -> list[int]:
        """Tokens of a whole text, which begin with the beginning-of-text token if the model has one."""
        ids = self._encoded(text, mark)
        if self.begin is not None and ids[:1] != [self.begin]:
            ids.insert(0, self.begin)
        return ids

    def _encoded(self, text: str, mark: str | None) -> list[int]:
        with refusals("the tokenizer has no tokens for it", "change the text, or download the tokenizer again"):
            encoding = self.vocabulary.tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if mark is None or mark not in text:
            return ids
        return [token for token, (begin, end) in zip(ids, encoding.offsets, strict=True) if text[begin:end] != mark]

    def segments(self, segments: Iterable[Segment], mark: str | None = None) -> Tokens:
        """Tokens of consecutive segments. None spans two, so that a prompt has the tokens that it has when generating.

        `mark` is a character that keeps texts apart and has no tokens (`as_text`). Raises InputError for a token
        outside the model's vocabulary.
        """
        text = ""
        ids: list[int] = []
        flags: list[bool] = []
        for part, predicted in segments:
            text += part
            all_ids = self.tokens(text, mark)
            if all_ids[: len(ids)] != ids:
                all_ids = ids + self._encoded(part, mark)
            flags += [predicted] * (len(all_ids) - len(flags))
            ids = all_ids
        check_ids(ids, self.vocab_size)
        return ids, flags

    def completion(
        self, prompt: Prompt, completion: str | Message, *, ended: bool, tools: Tools | None = None
    ) -> Tokens:
        """Tokens of a prompt and its completion, in which special tokens are text; with `ended`, an end-of-text or
        end-of-turn token follows.
        """
        if not isinstance(prompt, str):
            return self.written((prompt, completion, tools), partial(self._shown, ended=ended))
        assert isinstance(completion, str)
        spoken = (prompt, completion) if prompt else (completion,)
        ids, predicted = self.written(spoken, lambda said: [*((text, False) for text in said[:-1]), (said[-1], True)])
        if ended and self.end is not None:
            return [*ids, self.end], [*predicted, True]
        return ids, predicted

    def _shown(self, said: tuple[Any, Any, Any], *, ended: bool) -> list[Segment]:
        """Segments of a prompt of messages, of what completes it, and of tools."""
        prompt, completion, tools = said
        if ended:
            return self.chat.completion(prompt, completion, tools)
        return [(self.chat.render(prompt, generation_prompt=True, tools=tools), False), (completion, True)]

    def conversation(self, messages: Sequence[Message], tools: Tools | None = None) -> Tokens:
        """Tokens of a conversation, in whose messages special tokens are text."""
        return self.written((tuple(messages), tools), lambda spoken: self.chat.conversation(spoken[0], tools=spoken[1]))

    def asked(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of messages, in which special tokens are text, and of what precedes the assistant's answer."""
        return self.written(tuple(messages), lambda said: [(self.chat.render(said, generation_prompt=True), False)])[0]


def check_ids(ids: list[int], vocab_size: int) -> None:
    """Raise InputError for a token outside the model's vocabulary."""
    if ids and max(ids) >= vocab_size:
        raise InputError(
            f"token {max(ids)} is outside the model's vocabulary of {vocab_size}; the tokenizer belongs to another"
            " model"
        )


def _map_texts(value: Any, change: Callable[[str, bool], str], *, said: bool = True, inside: bool = False) -> Any:
    """The same lists and objects with `change(text, said)` in the place of their texts, keys too. `said` is True for
    somebody's words: prompts and answers, and in messages what is `inside` their contents and calls, but for names.
    """
    if isinstance(value, str):
        return change(value, said)
    if isinstance(value, dict):
        return {
            change(key, False): _map_texts(
                item,
                change,
                said=key in SAID or (inside and key not in NAMES),
                inside=inside or key in SAID,
            )
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(_map_texts(item, change, said=said, inside=inside) for item in value)
    return value


def _part_control_tokens(text: str, control: re.Pattern[str], mark: str) -> str:
    """The text with `mark` after the first character of each control token in it."""
    while control.search(text):  # once more where tokens overlap
        text = control.sub(lambda match: match[0][0] + mark + match[0][1:], text)
    return text


def _enclose(text: str, mark: str) -> str:
    """The text with `mark` before its first and behind its last word: templates take blanks away."""
    words = text.strip()
    return text.replace(words, f"{mark}{words}{mark}", 1)


class _LengthCounter:
    """Stands in for a `RecordWriter` where nothing is to be written."""

    def __init__(self, seq: int) -> None:
        self.seq = seq
        self.count = 0

    def add(self, input_ids: list[int], labels: list[int], **columns: int) -> None:
        self.count += 1


class DataPass:
    """One pass over the data, which tokenises and writes every sample and collects what is wrong with bad lines. It
    needs no encoder for samples that were kept as tokens.
    """

    def __init__(
        self,
        writer: RecordWriter | _LengthCounter,
        encoder: Encoder | None,
        purpose: Purpose,
        too_long: TooLong,
        advice: Advice,
        *,
        pairs: bool = False,
        keep: IO[bytes] | None = None,
    ) -> None:
        self.writer, self.encoder, self.keep = writer, encoder, keep
        self.purpose, self.too_long, self.advice = purpose, too_long, advice
        self.pairs = pairs
        self.equal = 0
        """pairs whose two answers are equal"""
        self.stream: list[int] = []
        self.labels: list[int] = []
        self.example = 0
        self.bad: list[str] = []
        self.count_bad = 0
        self.longest = 0
        """positions of the longest sample so far; texts, which are packed into windows, do not count"""
        self.longest_text = 0

    def run(
        self,
        files: list[Path],
        progress: Callable[[int], None] | None,
        preparation: Preparation | None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        done = 0
        longest = preparation.longest_line() if preparation else None
        for file, number, sequences in self.each(files, longest, columns):
            if isinstance(sequences, InputError):
                self.count_bad += 1
                if len(self.bad) < REPORTED_LINES:
                    self.bad.append(f"{file}:{number}: {sequences}")
            done += 1
            if progress:
                progress(done)
            if preparation and done % LOOKED_AT == 0:
                preparation.check("tokenising the data")
        self.flush(everything=True)
        if self.bad:
            more = f"\nand {self.count_bad - len(self.bad)} more" if self.count_bad > len(self.bad) else ""
            plural = "line" if self.count_bad == 1 else "lines"
            if self.too_long == "refuse" and self.longest > self.writer.seq:
                more += "\n" + self.advice(self.longest)
            raise InputError(f"{self.count_bad} bad {plural} of {done} in the data:\n" + "\n".join(self.bad) + more)
        if not self.writer.count:
            raise InputError(f"{files[0] if len(files) == 1 else files[0].parent}: no samples; the data are empty")

    def each(
        self, files: Sequence[Path], longest: int | None, columns: Mapping[str, str] | None
    ) -> Iterator[tuple[Path, int | str, list[TokenSequence] | InputError]]:
        """Write every sample; yields its file and line, and the sample as tokens or what is wrong with it."""
        for file in files:
            for number, sample in read_samples(file, longest, columns):
                try:
                    if isinstance(sample, InputError):
                        raise sample
                    sequences = self.tokenise(sample)
                    if self.keep:
                        kept_tokens.write(self.keep, sequences)
                    self.write_sample(sequences)
                except InputError as error:
                    yield file, number, error
                else:
                    yield file, number, sequences

    def replay(
        self, kept: Path, vocab_size: int, progress: Callable[[int], None] | None, preparation: Preparation | None
    ) -> None:
        """The same for samples that were kept as tokens, and checked when they were kept."""
        for done, sample in enumerate(kept_tokens.read(kept), start=1):
            for sequence in sample:
                check_ids(sequence.ids, vocab_size)
            self.write_sample(sample)
            if progress:
                progress(done)
            if preparation and done % LOOKED_AT == 0:
                preparation.check("reading the tokens of the data")
        self.flush(everything=True)

    def tokenise(self, sample: Sample) -> list[TokenSequence]:
        """A sample as tokens: several sequences for the choices of a question. Raises InputError, which says what is
        wrong with it.
        """
        encoder = self.encoder
        assert encoder is not None
        if self.pairs != isinstance(sample, AnswerPair):
            raise InputError(
                f"no pair of answers, and the plan's loss is of such; write {PAIR_FORM}"
                if self.pairs
                else (
                    f"a pair of answers, and the plan's loss is not of such; profile with {spelled('loss', 'dpo')} or"
                    f" {spelled('loss', 'orpo')}"
                )
            )
        if isinstance(sample, AnswerPair):
            answers = (sample.chosen, sample.rejected)
            pair = (encoder.completion(sample.prompt, answer, ended=True, tools=sample.tools) for answer in answers)
            return [
                TokenSequence(ids=ids, predicted=predicted, choice=choice, answer=choice == 0)
                for choice, (ids, predicted) in enumerate(pair)
            ]
        if isinstance(sample, Text):
            ids, _ = encoder.segments([(sample.text, True)])
            self.longest_text = max(self.longest_text, len(ids))
            return [TokenSequence(ids=ids if encoder.end is None else [*ids, encoder.end], predicted=None)]
        if isinstance(sample, Question) and self.purpose == "evaluate":
            choices = (
                encoder.completion(sample.prompt, answer, ended=False, tools=sample.tools) for answer in sample.choices
            )
            return [
                TokenSequence(ids=ids, predicted=predicted, choice=choice, answer=choice == sample.answer)
                for choice, (ids, predicted) in enumerate(choices)
            ]
        if isinstance(sample, Question):
            tokens = encoder.completion(sample.prompt, sample.choices[sample.answer], ended=True, tools=sample.tools)
        elif isinstance(sample, Completion):
            tokens = encoder.completion(sample.prompt, sample.completion, ended=True, tools=sample.tools)
        else:
            assert isinstance(sample, Conversation)
            tokens = encoder.conversation(sample.messages, sample.tools)
        return [TokenSequence(ids=tokens[0], predicted=tokens[1])]

    def write_sample(self, sample: Sequence[TokenSequence]) -> None:
        """Write the records of one sample. Raises InputError, which says what is wrong with it."""
        text = sample[0]
        if text.predicted is None:
            self.stream += text.ids
            self.labels += [*self.stream[len(self.labels) + 1 :], IGNORED]
            self.flush(everything=False)
            return
        tokens = [(sequence.ids, sequence.predicted) for sequence in sample if sequence.predicted is not None]
        self.longest = max(self.longest, *(len(ids) - 1 for ids, _ in tokens))
        shifted = self.shifted_pair(tokens) if self.pairs else [self.shift(pair) for pair in tokens]
        for sequence, (inputs, labels) in zip(sample, shifted, strict=True):
            self.writer.add(inputs, labels, example=self.example, choice=sequence.choice, answer=sequence.answer)
        self.example += 1

    def shifted_pair(self, tokens: Sequence[Tokens]) -> list[tuple[list[int], list[int]]]:
        """The inputs and labels of a pair, the chosen answer's first. What is cut at the front is the same of both."""
        with named('prompt and "chosen"'):
            front = self.front(tokens[0])
        with named('prompt and "rejected"'):
            front = max(front, self.front(tokens[1]))
        with named('prompt and "chosen"'):
            chosen = self.shift(tokens[0], front)
        with named('prompt and "rejected"'):
            rejected = self.shift(tokens[1], front)
        self.equal += chosen == rejected
        return [chosen, rejected]

    def front(self, tokens: Tokens) -> int:
        """Tokens at the front, none of which is predicted, that are cut off a sample of more than `seq` positions.

        Raises InputError if it is not to be cut.
        """
        ids, predicted = tokens
        excess = len(ids) - 1 - self.writer.seq
        if excess <= 0:
            return 0
        if self.too_long == "refuse":
            raise InputError(f"{len(ids) - 1} positions where the plan has {self.writer.seq}")
        return min(excess, max(0, predicted.index(True) - 1) if True in predicted else 0)

    def shift(self, tokens: Tokens, front: int | None = None) -> tuple[list[int], list[int]]:
        """(inputs, shifted labels) of at most `seq` positions, without the first `front` tokens; None: as many as
        `front` says.

        Raises InputError if there are more and they are not to be cut, or if no label is left.
        """
        front = self.front(tokens) if front is None else front
        end = front + self.writer.seq + 1
        ids, flags = tokens[0][front:end], tokens[1][front:end]
        labels = [token if predicted else IGNORED for token, predicted in zip(ids[1:], flags[1:], strict=True)]
        if all(label == IGNORED for label in labels):
            raise InputError("nothing is left to predict; the sample is empty or cut before its completion")
        return ids[:-1], labels

    def flush(self, *, everything: bool) -> None:
        """Write full windows of the packed texts; with `everything` also what is left, as a shorter record."""
        seq = self.writer.seq
        while len(self.stream) >= seq or (everything and self.stream):
            inputs, labels = self.stream[:seq], self.labels[:seq]
            del self.stream[:seq], self.labels[:seq]
            if any(label != IGNORED for label in labels):
                self.writer.add(inputs, labels, example=self.example)
                self.example += 1


def _write_random(writer: RecordWriter, seed: int) -> None:
    generator = random.Random(seed)
    for example in range(RANDOM_RECORDS):
        tokens = [generator.randrange(writer.vocab_size) for _ in range(writer.seq + 1)]
        if not writer.pairs:
            writer.add(tokens[:-1], tokens[1:], example=example)
            continue
        prompt = writer.seq // 2  # places without a label, the same in both rows
        for choice in (0, 1):
            answer = [generator.randrange(writer.vocab_size) for _ in range(writer.seq + 1 - prompt)]
            whole = [*tokens[:prompt], *answer]
            labels = [*[IGNORED] * prompt, *whole[prompt + 1 :]]
            writer.add(whole[:-1], labels, example=example, choice=choice, answer=choice == 0)


def padding_tokens(vocabulary: Vocabulary | None) -> list[int]:
    """The tokens of a vocabulary that rows may be padded with, the preferred first."""
    if vocabulary is None:
        return []
    tokens = (vocabulary.token_id(token) for token in (vocabulary.pad_token, vocabulary.eos_token))
    return [token for token in tokens if token is not None]


def pad_token_of(padding: Sequence[int], vocab_size: int) -> int:
    """A token to pad rows with; it is never predicted, and causal attention never reads it from an earlier position."""
    return next((token for token in padding if token < vocab_size), 0)
