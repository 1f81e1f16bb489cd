"""Samples to records: what is read, rendered, tokenised, shifted, shuffled, and what is refused."""

from __future__ import annotations

import errno
import gzip
import json
import os
import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import opened_below
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from tiny_models import CHAT, byte_level_tokenizer, sentence_piece_tokenizer

from tightfit.profiles.sources.directory_tokenizer import directory_vocabulary
from tightfit.profiles.sources.vocabulary import Vocabulary
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.data.chat import ChatTemplate
from tightfit.runtime.data.samples import CONVERSION, FORMS, data_files, parse_sample
from tightfit.runtime.data.tokenization import (
    RANDOM_RECORDS,
    DataPass,
    Encoder,
    pad_token_of,
    padding_tokens,
    plan_again,
    prepare,
)
from tightfit.runtime.engine.training.batches import TokenBatches
from tightfit.runtime.engine.training.pairs import PairBatches
from tightfit.runtime.engine.training.records import HEADER_BYTES, IGNORED, RecordFile, RecordWriter, shuffled

TALK = [
    {"role": "user", "content": "Is it good?"},
    {"role": "assistant", "content": "It's positive."},
    {"role": "user", "content": "And 12 more?"},
    {"role": "assistant", "content": "negative\n"},
]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(
        tokenizer=byte_level_tokenizer(),
        chat_template=CHAT,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


@pytest.fixture(scope="module")
def beginning() -> Vocabulary:
    """A model that wants a token before every text."""
    return Vocabulary(tokenizer=sentence_piece_tokenizer(), bos_token="<s>", eos_token="</s>", add_bos=True)


def lines(path: Path, *samples: Any) -> str:
    path.write_text("".join((sample if isinstance(sample, str) else json.dumps(sample)) + "\n" for sample in samples))
    return str(path)


def made(data: str, vocabulary: Vocabulary | None, tmp_path: Path, *, seq: int = 128, **options: Any) -> RecordFile:
    return prepare(data, vocabulary, tmp_path / "work", seq=seq, vocab_size=420, **options)


def record(file: RecordFile, index: int) -> tuple[list[int], list[int]]:
    ids, labels = (torch.zeros(1, file.seq, dtype=torch.int64) for _ in range(2))
    (found,) = file.fill([index], ids, labels)
    assert found.length == file.length(index)
    assert ids[0, found.length :].tolist() == [file.pad_token] * (file.seq - found.length)
    assert labels[0, found.length :].tolist() == [IGNORED] * (file.seq - found.length)
    return found.input_ids.tolist(), found.labels.tolist()


def answered(labels: list[int], vocabulary: Vocabulary) -> str:
    return vocabulary.tokenizer.decode([label for label in labels if label != IGNORED], skip_special_tokens=False)


# Records


@settings(max_examples=200)
@given(count=st.integers(1, 300), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_an_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled(place, count, seed, epoch) for place in range(count)) == list(range(count))


def test_epochs_and_seeds_differ_and_look_random() -> None:
    orders = {
        (seed, epoch): [shuffled(place, 1000, seed, epoch) for place in range(1000)]
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(order) for order in orders.values()}) == 4
    for order in orders.values():
        assert abs(torch.corrcoef(torch.stack([torch.arange(1000.0), torch.tensor(order).float()]))[0, 1]) < 0.1
        assert sum(b == a + 1 for a, b in pairwise(order)) < 10


SAMPLES = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=8)


@settings(max_examples=60)
@given(samples=SAMPLES, batch=st.integers(1, 4), seed=st.integers(0, 100), start=st.integers(0, 30))
def test_records_come_back_and_any_step_can_be_asked_for(
    tmp_path_factory: pytest.TempPathFactory, samples: list[list[int]], batch: int, seed: int, start: int
) -> None:
    path = tmp_path_factory.mktemp("records") / "x.records"
    with RecordWriter(path, seq=9, pad_token=7, vocab_size=100, source="test") as writer:
        for example, tokens in enumerate(samples):
            writer.add(
                tokens,
                [t + 1 if t % 2 else IGNORED for t in tokens],
                example=example,
                choice=example % 3,
                answer=example % 3 == 1,
            )
    with RecordFile.open(path) as file:
        assert (file.count, file.examples, file.tokens) == (len(samples), len(samples), sum(map(len, samples)))
        assert file.labelled == sum(t % 2 for tokens in samples for t in tokens)
        for index, tokens in enumerate(samples):
            assert record(file, index) == (tokens, [t + 1 if t % 2 else IGNORED for t in tokens])
            found = file.read(index)
            assert (found.example, found.choice, found.answer) == (index, index % 3, index % 3 == 1)
        ids, labels = torch.zeros(batch, 9, dtype=torch.int64), torch.zeros(batch, 9, dtype=torch.int64)
        batches = TokenBatches(str(path), seed)
        seen = []
        for step in range(start, start + 5):
            places = (divmod(step * batch + row, len(samples)) for row in range(batch))
            due = [file.read(shuffled(place, len(samples), seed, epoch)).example for epoch, place in places]
            assert batches.training(step, (ids, labels)) == sum(len(samples[example]) for example in due)
            assert batches.samples == batch
            for row, example in enumerate(due):
                tokens = samples[example]
                assert ids[row].tolist() == tokens + [7] * (9 - len(tokens))
                seen.append((step * batch + row, example))
        for epoch in {place // len(samples) for place, _ in seen}:
            within = [example for place, example in seen if place // len(samples) == epoch]
            assert len(within) == len(set(within))
        batches.close()
        last, again = ids.clone(), TokenBatches(str(path), seed)
        again.training(start + 4, (ids, labels))
        assert torch.equal(ids, last)
        again.close()


def test_an_order_is_that_of_every_version() -> None:
    """A run may be gone on with by another one, and nothing in its checkpoint tells the order."""
    assert [shuffled(place, 10, 5, 2) for place in range(10)] == [4, 8, 5, 0, 2, 9, 7, 1, 6, 3]
    expected = [11, 5, 16, 18, 6, 13, 3, 12, 10, 9, 2, 7, 19, 4, 8, 17, 0, 14, 15, 1]
    assert [shuffled(place, 20, 0, 0) for place in range(20)] == expected


def test_records_are_on_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.append([path.read_bytes() for path in tmp_path.iterdir()])
        assert not (tmp_path / "x").exists()

    monkeypatch.setattr(os, "fsync", noted)
    with RecordWriter(tmp_path / "x", seq=4, pad_token=0, vocab_size=9, source="") as writer:
        writer.add([1, 2], [2, 3], example=0)
        for tokens, labels in (([1, 2], [2]), ([1] * 5, [2] * 5)):
            with pytest.raises(ValueError, match="do not fit a record of 4"):
                writer.add(tokens, labels, example=1)
    assert synced == [[(tmp_path / "x").read_bytes()]]


def test_the_last_evaluation_batch_is_filled_up_with_padding(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "x", seq=4, pad_token=3, vocab_size=9, source="") as writer:
        for example in range(5):
            writer.add([example], [8], example=example)
    with RecordFile.open(tmp_path / "x") as file:
        ids, labels = torch.ones(3, 4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.int64)
        batches = TokenBatches(str(tmp_path / "x"), 0)
        assert [row.example for row in batches.evaluation(0, (ids, labels))] == [0, 1, 2]
        assert [row.example for row in batches.evaluation(1, (ids, labels))] == [3, 4]
        batches.close()
        assert ids.tolist() == [[3, 3, 3, 3], [4, 3, 3, 3], [3, 3, 3, 3]]
        assert labels[2].tolist() == [IGNORED] * 4
        with pytest.raises(ValueError, match=r"4 records do not fit a batch of shape \[3, 4\]"):
            file.fill([0, 1, 2, 3], ids, labels)


def test_a_long_name_of_the_data_stays_in_the_header(tmp_path: Path) -> None:
    path = tmp_path / "x.records"
    with RecordWriter(path, seq=4, pad_token=0, vocab_size=9, source="\U0001f600" * 1024) as writer:
        writer.add([1, 2], [2, 3], example=0)
    with RecordFile.open(path) as file:
        assert record(file, 0) == ([1, 2], [2, 3])


def test_damaged_record_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.records"
    with RecordWriter(path, seq=4, pad_token=0, vocab_size=9, source="") as writer:
        writer.add([1, 2], [2, 3], example=0)
        writer.add([1, 2], [2, 3], example=1)
    data = path.read_bytes()
    with RecordFile.open(path) as file:
        end = file.header["index"]
    for bit in (0, 17, end - HEADER_BYTES - 1):
        broken = bytearray(data)
        broken[HEADER_BYTES + bit] ^= 1
        path.write_bytes(broken)
        with (
            RecordFile.open(path) as file,
            pytest.raises(
                InputError, match=r"x\.records: record [01] is damaged \(checksum differs\); prepare the data again"
            ),
        ):
            file.read(0 if bit < 50 else 1)
    for other in (data[:-1], data + b"\0"):
        path.write_bytes(other)
        with pytest.raises(InputError, match=r"bytes where 2 records need .*truncated or damaged"):
            RecordFile.open(path)
    path.write_bytes(data)
    with RecordFile.open(path) as file:
        file.read(0)
        os.truncate(path, HEADER_BYTES + (file.header["index"] - HEADER_BYTES) // 2)
        with pytest.raises(InputError, match="record 1 is damaged"):
            file.read(1)
    for head in (b"", b"{}", b"[1]", b"\xff"):
        path.write_bytes(head + data[5:])
        with pytest.raises(InputError, match="not a record file"):
            RecordFile.open(path)
    path.write_bytes(data.replace(b'"version": 2', b'"version": 9'))
    with pytest.raises(InputError, match="record file of version 9, this tightfit reads version 2"):
        RecordFile.open(path)
    path.unlink()
    with pytest.raises(InputError, match=r"x\.records: No such file or directory") as caught:
        RecordFile.open(path)
    assert caught.value.exit_code == 2
    assert opened_below(tmp_path) == []


# Lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "not JSON (Expecting value: line 1 column 1 (char 0))"),
        ("[1, 2]", "a JSON list where an object is due"),
        ('"text"', "a JSON string where an object is due"),
        ("3", "a JSON number where an object is due"),
        ("null", "a JSON missing or null where an object is due"),
        pytest.param("[" * 100_000, "lists or objects nested more than 100 deep", id="deep"),
        (
            r'{"text": "bad \ud83d half"}',
            r""""text" has half a character ('\ud83d', a lone surrogate); write the whole one""",
        ),
        (r'{"prompt": "\udead", "completion": "a"}', '"prompt" has half a character'),
        (r'{"messages": [{"role": "assistant", "content": "\ud83d"}]}', '"messages" has half a character'),
        (r'{"prompt": "a", "choices": ["b", "\ud83d"], "answer": 0}', '"choices" has half a character'),
        ('{"txt": "a"}', "unknown keys (txt); write"),
        ("{}", "unknown keys (none)"),
        ('{"text": ""}', '"text" is empty'),
        ('{"text": 3}', '"text" is number'),
        ('{"prompt": "a", "completion": ""}', '"completion" is empty'),
        ('{"completion": "a"}', '"prompt" is missing or null; write a string or a list of messages'),
        ('{"prompt": 1, "completion": "a"}', '"prompt" is number'),
        ('{"prompt": [], "completion": "a"}', '"prompt" must be a list of {"role", "content"} objects'),
        (
            '{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}',
            '"completion" as a list must be one message of role "assistant"',
        ),
        (
            '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]}',
            '"completion" as a list must be one message of role "assistant"',
        ),
        ('{"instruction": "a"}', '"output" is missing or null'),
        ('{"instruction": 3, "output": "b"}', '"instruction" is number'),
        (
            '{"instruction": "a", "output": "b", "history": [["c", "d"]]}',
            '"history" is not read; write the turns as {"messages"}',
        ),
        ('{"messages": "a"}', '"messages" must be a list'),
        (
            '{"messages": [{"role": "user"}]}',
            'message 0 of "messages" must be an object with the strings "role" and "content"',
        ),
        ('{"messages": [{"role": "user", "content": "a"}]}', 'no turn of role "assistant"'),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', '"choices" must be a list of at least two strings'),
        ('{"prompt": "a", "choices": ["b", "b"], "answer": 0}', '"choices" names the same answer twice'),
        (
            '{"prompt": "a", "choices": ["b", "c"], "answer": 2}',
            '"answer" is 2; write one of the choices or its index from 0 to 1',
        ),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": -1}', '"answer" is -1'),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', '"answer" is True'),
        ('{"prompt": "a", "choices": ["b", "c"]}', '"answer" is None'),
        ('{"messages": [{"role": "assistant", "content": "a"}], "tools": "f"}', '"tools" must be a list of objects'),
        ('{"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}', 'write "prompt" as a list of messages'),
        (
            '{"prompt": "a", "completion": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}',
            '"tool_calls" are shown by the chat template; write "prompt" as a list of messages',
        ),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": ""}]}',
            '"completion" is empty',
        ),
        ('{"messages": [{"role": "assistant", "tool_calls": []}]}', 'message 0 of "messages" must be an object with'),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "url": "b"}]}]}',
            """message 0 of "messages" has a part of type 'image'; only text is trained on: {"type": "text", "text": "..."}""",
        ),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', 'message 0 of "messages" has a part without a type'),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
            'message 0 of "messages" has a text part whose "text" is missing or null; write a string',
        ),
        (
            '{"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "b"}]}',
            """message 1 of "conversations" is from 'observation'; write human, gpt, system, or "role" and "content\"""",
        ),
        ('{"conversations": [{"from": [], "value": "a"}]}', 'message 0 of "conversations" is from []'),
        (
            '{"conversations": [{"from": "gpt", "value": 3}]}',
            'message 0 of "conversations" must be an object with the strings "from" and "value"',
        ),
        ('{"messages": null, "conversations": null}', '"messages" must be a list of'),
        (
            '{"prompt": "a", "chosen": "b"}',
            '"rejected" is missing or null; a pair of answers is {"prompt", "chosen", "rejected"}',
        ),
        ('{"prompt": "a", "chosen": null, "rejected": "b"}', '"chosen" is missing or null'),
        ('{"prompt": "a", "chosen": "", "rejected": "b"}', '"chosen" is empty'),
        ('{"chosen": "a", "rejected": "b"}', '"prompt" is missing or null; write a string or a list of messages'),
        (
            '{"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}',
            """"chosen" ends with a message of role 'user'; its last message is the answer, of role "assistant\"""",
        ),
        (
            '{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}',
            '"chosen" and "rejected" differ before their last message; what comes before it is the prompt of both',
        ),
        ('{"system": 3, "conversations": [{"from": "gpt", "value": "a"}]}', '"system" is number'),
        ('{"conversations": [{"from": "human", "value": "a"}]}', '"conversations" has no turn of role "assistant"'),
    ],
)
def test_a_bad_line_says_what_is_wrong(line: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_sample(line.encode())
    assert message in str(caught.value)


def test_every_bad_line_is_named_with_its_place(vocabulary: Vocabulary, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    lines(folder / "a.jsonl", {"text": "fine"}, "", "oops", {"prompt": "x", "completion": "y"})
    (folder / "b.jsonl").write_bytes(b'{"text": "\xff"}\n{"text": "fine"}\n[]\n')
    (folder / "c.txt").write_text("not read")
    with pytest.raises(InputError) as caught:
        made(str(folder), vocabulary, tmp_path)
    told = str(caught.value).splitlines()
    assert told[0] == "3 bad lines of 6 in the data:"
    assert told[1].startswith(f"{folder}/a.jsonl:3: not JSON")
    assert told[2].startswith(f"{folder}/b.jsonl:1: not UTF-8 (byte 10 of the line)")
    assert told[3].startswith(f"{folder}/b.jsonl:3: a JSON list where an object is due")
    assert caught.value.exit_code == 2
    assert list((tmp_path / "work").iterdir()) == []


def test_a_flood_of_bad_lines_is_cut_short(vocabulary: Vocabulary, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        made(lines(tmp_path / "a.jsonl", *["bad"] * 50), vocabulary, tmp_path)
    told = str(caught.value).splitlines()
    assert (told[0], len(told), told[-1]) == ("50 bad lines of 50 in the data:", 22, "and 30 more")


def test_no_data_is_refused(vocabulary: Vocabulary, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent: no such file; data are a \.jsonl or \.jsonl\.gz file"):
        made(str(tmp_path / "absent"), vocabulary, tmp_path)
    with pytest.raises(InputError, match=r"^'' names no data; data are a \.jsonl or \.jsonl\.gz file"):
        made("", vocabulary, tmp_path)
    with pytest.raises(InputError, match=r"^/dev/null: a pipe or device, not a regular file; write the data to a file"):
        made("/dev/null", vocabulary, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError, match=r"empty: no \.jsonl or \.jsonl\.gz file in this directory, which is empty; data are"
    ):
        made(str(tmp_path / "empty"), vocabulary, tmp_path)
    with pytest.raises(InputError, match=r"a\.jsonl: no samples; the data are empty"):
        made(lines(tmp_path / "a.jsonl", "", " "), vocabulary, tmp_path)
    with pytest.raises(
        InputError,
        match=r"the model has no tokenizer; put tokenizer\.json beside its config\.json, or use data='random'",
    ):
        made(lines(tmp_path / "b.jsonl", {"text": "a"}), None, tmp_path)


# Tokens and labels


def test_a_completion_is_predicted_and_its_prompt_is_not(vocabulary: Vocabulary, tmp_path: Path) -> None:
    file = made(
        lines(tmp_path / "a.jsonl", {"prompt": "Is this good? Answer:", "completion": " positive"}),
        vocabulary,
        tmp_path,
    )
    encode = vocabulary.tokenizer.encode
    prompt, completion = encode("Is this good? Answer:").ids, encode(" positive").ids
    whole = [*prompt, *completion, vocabulary.token_id("<|im_end|>")]
    inputs, labels = record(file, 0)
    assert inputs == whole[:-1]
    assert labels == [IGNORED] * (len(prompt) - 1) + whole[len(prompt) :]
    assert file.pad_token == vocabulary.token_id("<|endoftext|>")


def test_an_empty_prompt_predicts_all_but_the_first_token(
    vocabulary: Vocabulary, beginning: Vocabulary, tmp_path: Path
) -> None:
    data = lines(tmp_path / "a.jsonl", {"prompt": "", "completion": "positive negative"})
    inputs, labels = record(made(data, vocabulary, tmp_path), 0)
    assert inputs[1:] == labels[:-1]
    assert IGNORED not in labels
    inputs, labels = record(made(data, beginning, tmp_path), 0)
    assert inputs[0] == beginning.token_id("<s>")
    assert labels == [
        *beginning.tokenizer.encode("positive negative", add_special_tokens=False).ids,
        beginning.token_id("</s>"),
    ]


def test_a_token_never_straddles_prompt_and_completion(vocabulary: Vocabulary, tmp_path: Path) -> None:
    encode = vocabulary.tokenizer.encode
    assert len(encode(" positive").ids) < len(encode(" posi").ids + encode("tive").ids)
    inputs, labels = record(
        made(lines(tmp_path / "a.jsonl", {"prompt": "It is posi", "completion": "tive"}), vocabulary, tmp_path), 0
    )
    assert inputs[: len(encode("It is posi").ids)] == encode("It is posi").ids
    assert answered(labels, vocabulary) == "tive<|im_end|>"


WORDS = st.text(alphabet="ab é\n'9日 positive", max_size=12)


@settings(max_examples=100)
@given(prompt=WORDS, completion=WORDS.filter(bool))
def test_inputs_and_labels_spell_the_sample(vocabulary: Vocabulary, prompt: str, completion: str) -> None:
    ids, wanted = Encoder(vocabulary, 420).completion(prompt, completion, ended=True)
    tokenizer = vocabulary.tokenizer
    first = wanted.index(True)
    assert all(wanted[first:])
    assert tokenizer.decode(ids[:first], skip_special_tokens=False) == prompt
    assert tokenizer.decode(ids[first:], skip_special_tokens=False) == completion + "<|im_end|>"


@pytest.mark.parametrize("messages", [TALK[:2], TALK, [{"role": "system", "content": "Say."}, *TALK]])
@pytest.mark.parametrize("generation_prompt", [False, True])
def test_conversations_are_rendered_as_transformers_does(
    vocabulary: Vocabulary, messages: list[dict[str, str]], generation_prompt: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary.tokenizer, chat_template=CHAT)
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    assert ChatTemplate(vocabulary).render(messages, generation_prompt=generation_prompt) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}\n{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}",
        "{% for m in messages %}{{ m | tojson(ensure_ascii=False, separators=(',', ':'), sort_keys=True) }}{% endfor %}",
        "{{ strftime_now('%d %b %Y') | length }}{{ messages[0].content }}",
    ],
)
def test_what_transformers_adds_to_jinja_is_known(vocabulary: Vocabulary, template: str) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary.tokenizer, chat_template=template)
    own = ChatTemplate(Vocabulary(tokenizer=vocabulary.tokenizer, chat_template=template))
    expected = reference.apply_chat_template(TALK, tokenize=False)
    assert own.render(TALK, generation_prompt=False) == expected


@pytest.mark.parametrize("files", [True, False])
def test_a_model_may_have_a_template_of_its_own_for_tools(files: bool, vocabulary: Vocabulary, tmp_path: Path) -> None:
    """In files or in tokenizer_config.json, as transformers writes and reads them."""
    transformers = pytest.importorskip("transformers")
    templates = {"default": CHAT, "tool_use": "{{ tools | tojson }} may be called. " + CHAT}
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary.tokenizer, chat_template=templates)
    reference.save_pretrained(tmp_path, save_jinja_files=files)
    assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").exists() == files
    found = directory_vocabulary(tmp_path)
    assert found is not None
    own = ChatTemplate(found)
    for tools in (None, [{"name": "f"}]):
        expected = reference.apply_chat_template(TALK, tools=tools, tokenize=False)
        assert own.render(TALK, generation_prompt=False, tools=tools and tuple(tools)) == expected


def test_today_is_one_day_for_ever(vocabulary: Vocabulary) -> None:
    """A run that is resumed tomorrow must see the same data."""
    dated = ChatTemplate(Vocabulary(tokenizer=vocabulary.tokenizer, chat_template="{{ strftime_now('%d %b %Y') }}"))
    assert dated.render(TALK, generation_prompt=False) == "26 Jul 2024"


def test_what_the_assistant_says_is_predicted_to_the_end_of_its_turn(vocabulary: Vocabulary, tmp_path: Path) -> None:
    file = made(lines(tmp_path / "a.jsonl", {"messages": TALK}, {"messages": TALK[:3]}), vocabulary, tmp_path)
    inputs, labels = record(file, 0)
    assert answered(labels, vocabulary) == "It's positive.<|im_end|>negative\n<|im_end|>"
    text = vocabulary.tokenizer.decode(inputs, skip_special_tokens=False)
    assert ChatTemplate(vocabulary).render(TALK, generation_prompt=False).startswith(text)
    assert answered(record(file, 1)[1], vocabulary) == "It's positive.<|im_end|>"


@pytest.mark.parametrize("words", [" How are you? ", "x", "s", "end"])
def test_what_stands_before_an_assistant_that_begins_is_not_predicted(vocabulary: Vocabulary, words: str) -> None:
    talk = [{"role": "assistant", "content": words}, *TALK]
    opening, first, *_ = ChatTemplate(vocabulary).conversation(talk)
    assert opening == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>assistant\n", False)
    assert first == (f"{words}<|im_end|>", True)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": "a", "tool_calls": [{"name": "f"}]}, "call f"),
        ({"content": "", "tool_calls": [{"name": "xy"}]}, "call xy"),
        ({"content": "a", "reasoning_content": "xyz"}, "think xyz, a"),
        ({"content": "xa", "reasoning_content": "xyz"}, "think xyz, xa"),
    ],
    ids=str,
)
def test_an_assistant_that_begins_with_more_than_words_is_predicted(
    vocabulary: Vocabulary, message: dict[str, Any], said: str
) -> None:
    template = """{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}call {{ m.tool_calls[0].name }}{% else %}\
{% if m.reasoning_content %}think {{ m.reasoning_content }}, {% endif %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}\
{% if add_generation_prompt %}<assistant>{% endif %}"""
    chatty = ChatTemplate(Vocabulary(tokenizer=vocabulary.tokenizer, chat_template=template))
    turn = {"role": "assistant"} | message
    for talk in ([turn], [turn, *TALK]):
        assert chatty.conversation(talk)[:2] == [("<assistant>", False), (f"{said}<|im_end|>", True)]


def test_an_assistant_that_begins_with_what_no_words_change_is_predicted_whole(vocabulary: Vocabulary) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.audio }}<|im_end|>{% endfor %}"
    chatty = ChatTemplate(Vocabulary(tokenizer=vocabulary.tokenizer, chat_template=template))
    turn = {"role": "assistant", "content": "", "audio": "tune"}
    assert chatty.conversation([turn]) == [("<assistant>tune<|im_end|>", True)]


def test_the_template_shows_the_tools(vocabulary: Vocabulary, tmp_path: Path) -> None:
    template = "{% if tools is not none %}{{ tools | length }} tools. {% endif %}" + CHAT.replace(
        "message['content'] + ",
        "(message.content or '') + (message.tool_calls | string if message.tool_calls else '') + ",
    )
    chatty = Vocabulary(tokenizer=vocabulary.tokenizer, chat_template=template, eos_token="<|im_end|>")
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    tools = {"tools": [{"name": "f"}, {"name": "g"}]}
    samples = [
        {"messages": [*TALK[:1], call, {"role": "tool", "content": "4"}, *TALK[-1:]]} | tools,
        {"prompt": TALK[:1], "completion": "negative"} | tools,
        {"prompt": TALK[:1], "choices": ["negative", "positive"], "answer": 0} | tools,
        {"messages": [call, *TALK]},
        {"messages": TALK, "tools": []},
        {"prompt": TALK[:1], "completion": [call]},
        {"prompt": TALK[:1], "completion": [call | {"content": "Well: "}]},
    ]
    file = made(lines(tmp_path / "a.jsonl", *samples), chatty, tmp_path, seq=200)
    texts = [vocabulary.tokenizer.decode(record(file, n)[0], skip_special_tokens=False) for n in range(len(samples))]
    assert [text.startswith("2 tools. <|im_start|>") for text in texts] == [True, True, True, *[False] * 4]
    assert answered(record(file, 0)[1], vocabulary).startswith("[{'name': 'f'}]<|im_end|>")
    assert answered(record(file, 3)[1], vocabulary).startswith("[{'name': 'f'}]<|im_end|>It's positive.")
    assert answered(record(file, 5)[1], vocabulary) == "[{'name': 'f'}]<|im_end|>"
    assert answered(record(file, 6)[1], vocabulary) == "Well: [{'name': 'f'}]<|im_end|>"


def test_a_prompt_of_messages_goes_through_the_template(vocabulary: Vocabulary, tmp_path: Path) -> None:
    prompt = TALK[:1]
    samples = [
        {"prompt": prompt, "completion": "negative"},
        {"prompt": prompt, "completion": [{"role": "assistant", "content": "negative"}]},
        {"messages": [*prompt, {"role": "assistant", "content": "negative"}]},
    ]
    file = made(lines(tmp_path / "a.jsonl", *samples), vocabulary, tmp_path)
    assert record(file, 0) == record(file, 1) == record(file, 2)
    assert answered(record(file, 0)[1], vocabulary) == "negative<|im_end|>"


@pytest.mark.parametrize(
    "sample",
    [
        {"messages": [message | {"content": [{"type": "text", "text": message["content"]}]} for message in TALK]},
        {
            "prompt": [
                *TALK[:2],
                TALK[2] | {"content": [{"type": "text", "text": part} for part in ("And 12", " more?")]},
            ],
            "completion": [TALK[3] | {"content": [{"type": "text", "text": "negative\n"}]}],
        },
        {
            "conversations": [
                {"from": "human" if message["role"] == "user" else "gpt", "value": message["content"]}
                for message in TALK
            ]
        },
        {"conversations": TALK},
        {"messages": None, "conversations": TALK},
    ],
)
def test_conversations_may_be_written_in_other_forms(
    sample: dict[str, Any], vocabulary: Vocabulary, tmp_path: Path
) -> None:
    plain: dict[str, Any] = {"messages": TALK}
    if "prompt" in sample:
        plain = {"prompt": TALK[:3], "completion": TALK[3:]}
    file = made(lines(tmp_path / "a.jsonl", plain, sample), vocabulary, tmp_path)
    assert record(file, 0) == record(file, 1)


def test_a_system_beside_conversations_is_their_first_turn() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    beside = parse_sample(json.dumps({"system": "Be brief.", "conversations": turns}).encode())
    assert beside == parse_sample(
        json.dumps({"conversations": [{"from": "system", "value": "Be brief."}, *turns]}).encode()
    )


@pytest.mark.parametrize("given", [{"input": "12"}, {"input": ""}, {"input": None}, {}])
def test_an_instruction_is_a_turn_of_the_user(given: dict[str, Any]) -> None:
    """As Alpaca has it; the sample that it writes out as "text" beside is not trained on."""
    asked = {"role": "user", "content": "Double it.\n12" if given.get("input") else "Double it."}
    sample = {"instruction": "Double it.", "output": "24"} | given
    sample["text"] = f"Below ...\n{asked['content']}\n### Response: 24"
    for system in ((), ({"role": "system", "content": "Be brief."},)):
        beside = {"system": system[0]["content"]} if system else {"history": [], "system": ""}
        sample["text"] = "".join(turn["content"] for turn in system) + sample["text"]
        due = {"prompt": [*system, asked], "completion": "24"}
        assert parse_sample(json.dumps(sample | beside).encode()) == parse_sample(json.dumps(due).encode())


def test_packed_lines_are_read_as_they_are(vocabulary: Vocabulary, tmp_path: Path) -> None:
    samples = [{"prompt": f"{n}:", "completion": f" number {n}"} for n in range(40)]
    plain = Path(lines(tmp_path / "a.jsonl", *samples[:20]))
    packed = tmp_path / "folder" / "b.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert made(str(packed), vocabulary, tmp_path).fingerprint == made(str(plain), vocabulary, tmp_path).fingerprint
    lines(packed.parent / "c.jsonl", *samples[20:])
    assert made(str(packed.parent), vocabulary, tmp_path).examples == 40
    whole = packed.read_bytes()
    for damaged in (whole[: len(whole) // 2], plain.read_bytes(), whole[:20] + b"\0\0\0\0" + whole[24:]):
        packed.write_bytes(damaged)
        with pytest.raises(InputError, match=r"b\.jsonl\.gz: not a whole gzip file \(.*; copy or download it again"):
            made(str(packed), vocabulary, tmp_path)
    packed.write_bytes(gzip.compress(b'[{"text": "a"}]'))
    with pytest.raises(InputError, match="a JSON list where JSON lines are due; unpack it with gunzip"):
        made(str(packed), vocabulary, tmp_path)


def test_what_the_template_does_not_show_is_refused(vocabulary: Vocabulary, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    for sample, key in (({"messages": [*TALK[:1], call]}, "tool_calls"), ({"messages": TALK, "tools": [{}]}, "tools")):
        with pytest.raises(InputError, match=f'template does not show "{key}"; leave them out, or write them as text'):
            made(lines(tmp_path / "a.jsonl", sample), vocabulary, tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a list.json", '\n[\n  {"text": "fünf"},\n  {"text": "six"}\n]\n'),
        ("list.jsonl", '[{"text": "fünf"}, {"text": "six"}]'),
        ("taken.json", '\ufeff[{"text": "fünf"}, {"text": "six"}]'),
    ],
)
def test_a_file_of_another_kind_is_refused_with_the_command_that_converts_it(
    name: str, content: str, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "taken.jsonl").write_text("another's")
    with pytest.raises(InputError, match=r"JSON lines are due; .*convert it: python3 -c") as caught:
        made(str(tmp_path / name), vocabulary, tmp_path)
    command = str(caught.value).split("convert it: ")[1]
    here = Path(sys.executable).parent
    subprocess.run(command, shell=True, check=True, env={"PATH": f"{here}:/usr/bin:/bin"})
    converted = next(path for path in tmp_path.glob("*.jsonl") if path.name not in (name, "taken.jsonl"))
    assert (tmp_path / "taken.jsonl").read_text() == "another's"
    assert [json.loads(line) for line in converted.read_text().splitlines()] == [{"text": "fünf"}, {"text": "six"}]
    file = made(str(converted), vocabulary, tmp_path)
    assert vocabulary.tokenizer.decode(record(file, 0)[0]).startswith("fünf")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "which is empty; data are files named .jsonl or .jsonl.gz, with lines of {FORMS}{TABLES}"),
        (
            {"README": "", "b.txt": "", "c.txt": "", "lines.json": '{"text": "a"}'},
            "but 1 file, 2 .txt files, 1 .json file; data are files named .jsonl or .jsonl.gz, with lines of {FORMS}{TABLES}",
        ),
        (
            {"a.json": "{}", "b.json": "\n [1, 2]"},
            'but 2 .json files; b.json: a JSON list where JSON lines are due; convert it: python3 -c "{CONVERSION}" {b.json} > {b.jsonl}',
        ),
    ],
    ids=lambda it: "" if isinstance(it, str) else "+".join(it) or "nothing",
)
def test_a_folder_without_lines_is_told_with_what_it_holds(files: dict[str, str], told: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    told = told.replace("{FORMS}", FORMS).replace("{CONVERSION}", CONVERSION)
    told = told.replace("{TABLES}", ", or tables (.csv, .tsv, .parquet, .arrow) with such columns")
    for name in ("b.jsonl", "b.json"):
        told = told.replace(f"{{{name}}}", str(tmp_path / name))
    with pytest.raises(InputError) as caught:
        data_files(str(tmp_path))
    assert str(caught.value) == f"{tmp_path}: no .jsonl or .jsonl.gz file in this directory, {told}"


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(InputError, match="Permission denied; check the path and its permissions"):
        data_files(str(tmp_path))


def test_a_template_that_rewrites_earlier_turns_predicts_the_last_one(vocabulary: Vocabulary) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}(thought){% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    thinking = ChatTemplate(Vocabulary(tokenizer=vocabulary.tokenizer, chat_template=template))
    assert [part for part, wanted in thinking.conversation(TALK) if wanted] == ["(thought)negative\n<|im_end|>"]
    with pytest.raises(InputError, match="does not continue its own generation prompt"):
        ChatTemplate(
            Vocabulary(
                tokenizer=vocabulary.tokenizer, chat_template="{{ messages | length }}{{ messages[-1].content }}"
            )
        ).conversation(TALK)


def test_a_token_that_the_model_lacks_is_nothing_to_its_template() -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token }}"
    own = Vocabulary(
        tokenizer=byte_level_tokenizer(),
        chat_template=template,
        eos_token="<|im_end|>",
        special_tokens={"unk_token": "<unk>"},
    )
    assert ChatTemplate(own).render(TALK[:1], generation_prompt=False) == "Is it good?<|im_end|><unk>"


def test_no_stretch_of_a_conversation_is_learnt_twice() -> None:
    """A template that shows the last turn alone, which begins as an earlier one did."""
    template = "{{ messages[-1].content if messages[-1].role == 'assistant' else '' }}"
    own = Vocabulary(tokenizer=byte_level_tokenizer(), chat_template=template)
    turns = [TALK[0], {"role": "assistant", "content": "Yes"}, TALK[2], {"role": "assistant", "content": "Yes, sir"}]
    with pytest.raises(InputError, match="does not continue its own generation prompt"):
        ChatTemplate(own).conversation(turns)


def test_chat_templates_that_fail_say_so(vocabulary: Vocabulary, tmp_path: Path) -> None:
    data = lines(tmp_path / "a.jsonl", {"messages": TALK})
    cases = {
        None: "the model has no chat template; write prompts as strings instead of messages",
        "{% if %}": "the model's chat template is not valid Jinja",
        "{{ raise_exception('roles must alternate') }}": "the model's chat template refuses these messages (roles must alternate)",
        "{{ messages.append(1) }}": "the model's chat template refuses these messages",
        "{{ ''.__class__.__mro__ }}": "the model's chat template refuses these messages",
    }
    for template, message in cases.items():
        with pytest.raises(InputError) as caught:
            made(data, Vocabulary(tokenizer=vocabulary.tokenizer, chat_template=template), tmp_path)
        assert f"a.jsonl:1: {message}" in str(caught.value)


def test_a_question_is_one_record_per_choice_to_evaluate_and_its_answer_to_train(
    vocabulary: Vocabulary, tmp_path: Path
) -> None:
    questions = [
        {"prompt": "Good?", "choices": [" positive", " negative", " no"], "answer": " negative"},
        {"prompt": TALK[:1], "choices": ["yes", "no"], "answer": 0},
        {"prompt": "Good?", "completion": " positive"},
    ]
    data = lines(tmp_path / "a.jsonl", *questions)
    file = made(data, vocabulary, tmp_path, purpose="evaluate")
    found = [(r.example, r.choice, r.answer) for r in map(file.read, range(file.count))]
    assert found == [(0, 0, False), (0, 1, True), (0, 2, False), (1, 0, True), (1, 1, False), (2, -1, False)]
    assert [answered(record(file, i)[1], vocabulary) for i in range(6)] == [
        " positive",
        " negative",
        " no",
        "yes",
        "no",
        " positive<|im_end|>",
    ]
    assert file.examples == 3
    trained = made(data, vocabulary, tmp_path)
    assert [answered(record(trained, i)[1], vocabulary) for i in range(3)] == [
        " negative<|im_end|>",
        "yes<|im_end|>",
        " positive<|im_end|>",
    ]


def test_a_pair_is_two_records_in_whatever_form_it_is_written(vocabulary: Vocabulary, tmp_path: Path) -> None:
    asked, (good, bad) = TALK[:1], ({"role": "assistant", "content": words} for words in ("yes", "negative"))
    forms = [
        {"prompt": asked, "chosen": "yes", "rejected": "negative"},
        {"prompt": asked, "chosen": [good], "rejected": [bad]},
        {"chosen": [*asked, good], "rejected": [*asked, bad]},
        {"prompt": "not read", "chosen": [*asked, good], "rejected": [*asked, bad]},
    ]
    file = made(lines(tmp_path / "a.jsonl", *forms), vocabulary, tmp_path, pairs=True)
    assert file.pairs
    found = [(r.example, r.choice, r.answer) for r in map(file.read, range(file.count))]
    assert found == [(pair, choice, not choice) for pair in range(4) for choice in (0, 1)]
    assert [answered(record(file, i)[1], vocabulary) for i in (0, 1)] == ["yes<|im_end|>", "negative<|im_end|>"]
    for row in range(2, 8):
        assert record(file, row) == record(file, row % 2)
    plain = lines(tmp_path / "b.jsonl", {"prompt": "Good? ", "chosen": [good], "rejected": "negative"})
    file = made(plain, vocabulary, tmp_path, pairs=True)
    assert [answered(record(file, i)[1], vocabulary) for i in (0, 1)] == ["yes<|im_end|>", "negative<|im_end|>"]


def test_pairs_that_are_too_long_lose_the_same_part_of_their_prompt(vocabulary: Vocabulary, tmp_path: Path) -> None:
    pair = {"prompt": "The quick brown fox " * 3, "chosen": "positive", "rejected": "positive negative positive"}
    data = lines(tmp_path / "a.jsonl", pair)
    with pytest.raises(
        InputError, match=r'a\.jsonl:1: prompt and "chosen": \d+ positions where the plan has 8\n.*seq='
    ):
        made(data, vocabulary, tmp_path, seq=8, pairs=True)
    ids, _ = Encoder(vocabulary, 420).completion(pair["prompt"], pair["rejected"], ended=True)
    file = made(data, vocabulary, tmp_path, seq=len(ids) - 3, too_long="truncate", pairs=True)
    (chosen, _), (rejected, labels) = record(file, 0), record(file, 1)
    assert rejected == ids[2:-1]
    assert chosen[: len(chosen) - 2] == rejected[: len(chosen) - 2]
    assert answered(labels, vocabulary) == "positive negative positive<|im_end|>"


def test_pairs_and_other_samples_are_not_taken_for_each_other(vocabulary: Vocabulary, tmp_path: Path) -> None:
    pair = {"prompt": "Good? ", "chosen": "yes", "rejected": "yes"}
    data, text = lines(tmp_path / "a.jsonl", pair), lines(tmp_path / "b.jsonl", {"text": "no"})
    with pytest.raises(
        InputError, match="a pair of answers, and the plan's loss is not of such; profile with loss='dpo' or"
    ):
        made(data, vocabulary, tmp_path)
    with pytest.raises(InputError, match="no pair of answers, and the plan's loss is of such"):
        made(text, vocabulary, tmp_path, pairs=True)
    told: list[str] = []
    file = made(data, vocabulary, tmp_path, pairs=True, warn=told.append)
    assert told == [
        f"in 1 of 1 pairs of {data} the chosen answer and the rejected one are equal: nothing is learned from comparing them"
    ]
    with pytest.raises(InputError, match=r"holds pairs of answers, and the plan is for none; prepare the data again"):
        made(str(file.path), vocabulary, tmp_path / "other")
    with pytest.raises(InputError, match=r"its samples are no pairs of answers; prepare the data again"):
        PairBatches(str(made(text, vocabulary, tmp_path / "text").path), 0, "dpo")
    random = made("random", None, tmp_path / "random", seq=9, pairs=True)
    (first, labels), (second, _) = record(random, 0), record(random, 1)
    assert first[:4] == second[:4]
    assert first[4:] != second[4:]
    assert labels == [*[IGNORED] * 4, *labels[4:]]
    assert labels[4:-1] == first[5:]


def test_a_sample_that_is_too_long_is_refused_with_its_lengths(vocabulary: Vocabulary, tmp_path: Path) -> None:
    long = {"prompt": "The quick brown fox " * 6, "completion": " positive"}
    ids, _ = Encoder(vocabulary, 420).completion(long["prompt"], long["completion"], ended=True)
    data = lines(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, long)
    with pytest.raises(
        InputError,
        match=rf"1 bad line of 2 in the data:\n.*a\.jsonl:2: {len(ids) - 1} positions where the plan has 16\na profile with seq={len(ids) - 1}, and a plan of it, has room for every sample; or shorten them, or cut them with truncate=True",
    ):
        made(data, vocabulary, tmp_path, seq=16)
    assert made(data, vocabulary, tmp_path, seq=len(ids) - 1).count == 2
    file = made(data, vocabulary, tmp_path, seq=16, too_long="truncate")
    inputs, labels = record(file, 1)
    assert inputs == ids[-17:-1]
    assert answered(labels, vocabulary) == " positive<|im_end|>"


def test_one_length_is_told_that_is_enough_for_every_sample(vocabulary: Vocabulary, tmp_path: Path) -> None:
    question = {"prompt": "Is it good? " * 6, "choices": ["negative " * 9, "positive " * 20], "answer": 0}
    data = lines(tmp_path / "a.jsonl", {"prompt": "quick " * 20, "completion": "fox"}, question, "bad")
    with pytest.raises(InputError) as caught:
        made(data, vocabulary, tmp_path, seq=16, purpose="evaluate")
    assert str(caught.value).count("seq=") == 1
    length = int(str(caught.value).partition("seq=")[2].partition(",")[0])
    lines(tmp_path / "a.jsonl", question)
    assert made(data, vocabulary, tmp_path, seq=length, purpose="evaluate").count == 2
    with pytest.raises(InputError, match=f"{length} positions where the plan has {length - 1}"):
        made(data, vocabulary, tmp_path, seq=length - 1, purpose="evaluate")


def test_truncation_cuts_the_end_of_a_long_completion(vocabulary: Vocabulary, tmp_path: Path) -> None:
    sample = {"prompt": "The quick brown fox", "completion": " positive negative" * 20}
    ids, wanted = Encoder(vocabulary, 420).completion(sample["prompt"], sample["completion"], ended=True)
    first = wanted.index(True)
    inputs, labels = record(
        made(lines(tmp_path / "a.jsonl", sample), vocabulary, tmp_path, seq=10, too_long="truncate"), 0
    )
    assert inputs == ids[first - 1 : first + 9]
    assert labels == ids[first : first + 10]


@settings(max_examples=40)
@given(
    texts=st.lists(st.text(alphabet="abc de.", min_size=1, max_size=30), min_size=1, max_size=8), seq=st.integers(2, 20)
)
def test_texts_are_packed_into_windows_without_loss(
    vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory, texts: list[str], seq: int
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    file = made(lines(folder / "a.jsonl", *({"text": text} for text in texts)), vocabulary, folder, seq=seq)
    end = vocabulary.token_id("<|im_end|>")
    stream, labels = [], []
    for text in texts:
        tokens = [*vocabulary.tokenizer.encode(text).ids, end]
        stream += tokens
        labels += [*tokens[1:], IGNORED]
    windows = [(stream[at : at + seq], labels[at : at + seq]) for at in range(0, len(stream), seq)]
    windows = [window for window in windows if set(window[1]) != {IGNORED}]
    assert [record(file, index) for index in range(file.count)] == windows
    assert file.examples == file.count


def test_random_data_need_no_tokenizer_and_follow_their_seed(tmp_path: Path) -> None:
    first = made("random", None, tmp_path / "a", seq=8)
    assert first.count == RANDOM_RECORDS
    inputs, labels = record(first, 5)
    assert inputs[1:] == labels[:-1]
    assert len({token for index in range(50) for token in record(first, index)[0]}) > 200
    assert made("random", None, tmp_path / "b", seq=8).fingerprint == first.fingerprint
    assert made("random", None, tmp_path / "c", seq=8, seed=1).fingerprint != first.fingerprint


def test_a_tokenizer_of_another_model_is_refused(vocabulary: Vocabulary, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"a\.jsonl:1: token \d+ is outside the model's vocabulary of 50; the tokenizer belongs to another model",
    ):
        prepare(lines(tmp_path / "a.jsonl", {"text": "zebra"}), vocabulary, tmp_path / "work", seq=8, vocab_size=50)
    ids = vocabulary.tokenizer.encode("zebra").ids
    assert Encoder(vocabulary, max(ids) + 1).segments([("zebra", True)])[0] == ids
    with pytest.raises(InputError, match=f"token {max(ids)} is outside the model's vocabulary of {max(ids)};"):
        Encoder(vocabulary, max(ids)).segments([("zebra", True)])


def test_a_text_that_brings_its_first_token_gets_no_second_one(beginning: Vocabulary) -> None:
    encoder = Encoder(beginning, 420)
    assert encoder.tokens("<s>good")[:2] == [encoder.begin, *beginning.tokenizer.encode("<s>good").ids[1:2]]


def test_a_sample_without_a_token_to_predict_is_refused(vocabulary: Vocabulary, tmp_path: Path) -> None:
    """As of a choice that a tokenizer makes nothing of."""
    with RecordWriter(tmp_path / "x", seq=4, pad_token=0, vocab_size=9, source="") as writer:
        samples = DataPass(writer, Encoder(vocabulary, 420), "train", "refuse", plan_again(None))
        for ids in ([1, 2, 3], [1], []):
            with pytest.raises(InputError, match="nothing is left to predict"):
                samples.shift((ids, [False] * len(ids)))


def test_a_padding_token_that_the_model_has_no_row_for_is_not_used(vocabulary: Vocabulary) -> None:
    tokens = sorted(vocabulary.tokenizer.get_vocab().items(), key=lambda item: item[1])
    (low, _), (high, last) = tokens[5], tokens[-1]
    for pad, end, found in ((high, low, 5), (high, high, 0), (low, high, 5)):
        own = Vocabulary(tokenizer=vocabulary.tokenizer, pad_token=pad, eos_token=end)
        assert pad_token_of(padding_tokens(own), last) == found
        assert pad_token_of(padding_tokens(own), last + 1) == (5 if pad == low else last)


def test_progress_counts_samples(vocabulary: Vocabulary, tmp_path: Path) -> None:
    seen: list[int] = []
    made(
        lines(tmp_path / "a.jsonl", *[{"prompt": "a", "completion": "b"}] * 5),
        vocabulary,
        tmp_path,
        progress=seen.append,
    )
    assert seen == [1, 2, 3, 4, 5]


FULL_DISK = """
import resource, sys
from pathlib import Path
from tightfit.runtime.common.errors import TightfitError
from tightfit.runtime.data.tokenization import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    prepare("random", None, Path(sys.argv[1]), seq=256, vocab_size=1000)
except TightfitError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_full_disk_is_a_run_error_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 4, done.stderr
    assert done.stdout == f"{tmp_path}/train.records: File too large; free some space and start again\n"
    assert list(tmp_path.iterdir()) == []


def test_reading_records_keeps_nothing_in_memory(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "x", seq=4096, pad_token=0, vocab_size=9, source="") as writer:
        for example in range(600):
            writer.add([1] * 4096, [2] * 4096, example=example)
    assert (tmp_path / "x").stat().st_size > 18 << 20
    inputs = torch.zeros(2, 4096, dtype=torch.int64), torch.zeros(2, 4096, dtype=torch.int64)
    batches = TokenBatches(str(tmp_path / "x"), 0)
    batches.training(0, inputs)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step in range(300):
        batches.training(step, inputs)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KiB
    batches.close()


@pytest.mark.parametrize("longest", [17, 64, 65, 20_002])
@pytest.mark.parametrize("positions", [None, 64, 8192])
def test_no_length_is_advised_that_the_model_was_not_made_for(longest: int, positions: int | None) -> None:
    said = plan_again(positions)(longest)
    assert (f"seq={longest}" in said) == (positions is None or longest <= positions)
    assert "truncate=True" in said
    assert (f"made for {positions} positions" in said) == (positions is not None and longest > positions)
