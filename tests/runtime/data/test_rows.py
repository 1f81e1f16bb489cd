"""A row is one sample, a folder one kind of data, and what people write is text: whatever would be dropped or read as
something else is refused by name, with its line.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_models import CHAT, SPECIAL, byte_level_tokenizer, sentence_piece_tokenizer

from tightfit.profiles.sources.vocabulary import Vocabulary
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.data.samples import AnswerPair, data_files, parse_prompt, parse_sample, read_samples
from tightfit.runtime.data.tables import PARTS
from tightfit.runtime.data.tokenization import Encoder, prepare

TALK = [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": "It is."}]
FORMS: dict[str, dict[str, Any]] = {
    "text": {"text": "Some words."},
    "completion": {"prompt": "Good?", "completion": "yes"},
    "messages": {"messages": TALK, "tools": [{"name": "f"}]},
    "conversations": {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "system": "c",
        "tools": [{"name": "f"}],
    },
    "instruction": {"instruction": "Say", "input": "it", "output": "no", "system": "c"},
    "choices": {"prompt": "Good?", "choices": ["yes", "no"], "answer": 0},
    "chosen": {"prompt": "Good?", "chosen": "yes", "rejected": "no"},
}
OTHERS: dict[str, Any] = {name: f"other {name}" for name in PARTS} | {
    "messages": [{"role": "assistant", "content": "other"}],
    "conversations": [{"from": "gpt", "value": "other"}],
    "choices": ["other 1", "other 2"],
    "answer": 1,
    "tools": [{"name": "g"}],
}
BLANK = st.text(alphabet=" \t\n\r\x0b\x0c\x1f\x85\u00a0\u2003\u2028\u3000", max_size=6)
VOCABULARY = Vocabulary(
    tokenizer=byte_level_tokenizer(), chat_template=CHAT, eos_token="<|im_end|>", pad_token="<|endoftext|>"
)


def parsed(row: Any) -> Any:
    return parse_sample((row if isinstance(row, str) else json.dumps(row)).encode())


# One form a row


@pytest.mark.parametrize(
    ("form", "part"), [(form, part) for form in FORMS for part in PARTS if part not in FORMS[form]]
)
def test_a_part_that_would_be_left_out_is_refused_by_name(form: str, part: str) -> None:
    row = FORMS[form]
    if (form, part) in [("completion", "tools"), ("choices", "tools"), ("chosen", "tools")]:
        with pytest.raises(InputError, match='"tools" are shown by the chat template'):
            parsed(row | {part: OTHERS[part]})
        return
    with pytest.raises(
        InputError, match=r'^"(\w+)" and "(\w+)" in one row, of which only the first would be read'
    ) as told:
        parsed(row | {part: OTHERS[part]})
    assert {part, form} & set(str(told.value).split('"')[1:4:2])
    for nothing in (None, "", " ", []):
        assert parsed(row | {part: nothing}) == parsed(row)


def test_a_part_that_repeats_what_is_read_is_let_be() -> None:
    """As in data sets with a column for each form: ultrachat's prompt, UltraFeedback's messages."""
    assert parsed({"prompt": "Is it good?", "messages": TALK}) == parsed({"messages": TALK})
    answers = {"chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "No."}]}
    assert isinstance(parsed(answers | {"messages": TALK, "prompt": "Is it good?"}), AnswerPair)
    with pytest.raises(InputError, match=r'"messages" and "prompt" in one row'):
        parsed({"prompt": "Is it good? Really?", "messages": TALK})


@pytest.mark.parametrize("beside", [{"from": "gpt"}, {"value": "b"}, {"from": "gpt", "value": "b"}])
def test_a_message_has_one_form_too(beside: dict[str, str]) -> None:
    with pytest.raises(
        InputError, match=r'^message 1 of "messages" has "role" and "content", and "from" and "value" beside'
    ):
        parsed({"messages": [TALK[0], TALK[1] | beside]})
    nothing = dict.fromkeys(beside, None)
    assert parsed({"messages": [TALK[0], TALK[1] | nothing]}).messages[0] == TALK[0]


def test_the_parts_that_are_named_are_the_ones_that_count() -> None:
    row = json.dumps({"messages": TALK, "text": "x"}).encode()
    assert parse_sample(row, {"text": "text"}) == parsed({"text": "x"})
    assert parse_sample(row, {"messages": "messages"}) == parsed({"messages": TALK})


# Nothing to learn


@given(BLANK)
@pytest.mark.parametrize("part", ["completion", "output", "chosen", "rejected", "choices", "instruction"])
def test_what_is_blank_is_refused_by_name(part: str, blank: str) -> None:
    form = next(form for form, row in FORMS.items() if part in row)
    with pytest.raises(InputError, match=f'^"{part}" is (empty|blank)'):
        parsed(FORMS[form] | {part: ["no", blank] if part == "choices" else blank})


@given(BLANK, st.booleans())
def test_an_assistant_that_says_nothing_is_refused_by_name(blank: str, last: bool) -> None:
    said = {"role": "assistant", "content": blank}
    turns = [*TALK, TALK[0], said] if last else [TALK[0], said, *TALK]
    with pytest.raises(
        InputError, match=rf'^message {3 if last else 1} of "messages", what the assistant says, is blank'
    ):
        parsed({"messages": turns})
    told = [{"from": "gpt" if turn["role"] == "assistant" else "human", "value": turn["content"]} for turn in turns]
    with pytest.raises(InputError, match=r"what the assistant says, is blank"):
        parsed({"conversations": told})
    calling = [said | {"tool_calls": [{"name": "f"}]} if turn is said else turn for turn in turns]
    assert parsed({"messages": calling}).messages[1:] == tuple(calling[1:])


# Keys that stand twice, and what is no JSON


@given(st.sampled_from(sorted(FORMS)), st.data())
def test_a_key_that_stands_twice_is_refused_by_name(form: str, data: st.DataObject) -> None:
    row = FORMS[form]
    key = data.draw(st.sampled_from(sorted(row)))
    text = json.dumps(row)[:-1] + f", {json.dumps(key)}: {json.dumps(OTHERS[key])}}}"
    with pytest.raises(InputError, match=f"^the key '{key}' stands twice in one object"):
        parsed(text)
    with pytest.raises(InputError, match=r"^the key 'role' stands twice"):
        parsed('{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}')
    with pytest.raises(InputError, match=r"^the key 'prompt' stands twice"):
        parse_prompt(b'{"prompt": "a", "prompt": "b"}')


def test_a_cell_of_a_table_is_read_as_strictly(tmp_path: Path) -> None:
    cells = [
        '[{"role": "assistant", "role": "user", "content": "a"}]',
        "[" * 5000 + "]" * 5000,
        '[{"role": "assistant", "x": NaN}]',
    ]
    (tmp_path / "a.csv").write_text("messages\n" + "".join('"' + cell.replace('"', '""') + '"\n' for cell in cells))
    told = [str(one) for _, one in read_samples(tmp_path / "a.csv")]
    assert ["stands twice" in told[0], "nested more than 100 deep" in told[1], "NaN is no number" in told[2]] == [
        True
    ] * 3


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a", "messages": TALK}, '"messages" and "text" in one row'),
        ({"prompt": "a", "completion": " "}, '"completion" is blank'),
        ({"messages": [*TALK, {"role": "asistant", "content": "a"}, *TALK]}, "message 2 has the role 'asistant'; the roles are"),
        ({"messages": [*TALK, {"role": "asistant", "content": "a"}]}, "message 2 has the role 'asistant'"),
        ({"prompt": [{"role": "User", "content": "a"}], "completion": "b"}, "message 0 has the role 'User'"),
        ('{"text": "a", "text": "b"}', "the key 'text' stands twice in one object"),
        ('{"text": "a", "score": NaN}', "NaN is no number in JSON"),
        ('{"text": "a", "x": ' + "[" * 200 + "]" * 200 + "}", "lists or objects nested more than 100 deep"),
    ],
)  # fmt: skip
def test_each_is_told_with_its_file_and_line(row: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{row if isinstance(row, str) else json.dumps(row)}\n')
    with pytest.raises(InputError) as caught:
        prepare(str(path), VOCABULARY, tmp_path, seq=128, vocab_size=420)
    assert f"{path}:3: {said}" in str(caught.value)


def test_a_role_that_the_template_names_is_known(tmp_path: Path) -> None:
    named = CHAT + "{% if false and messages[0]['role'] == 'observation' %}{% endif %}"
    own = Vocabulary(tokenizer=VOCABULARY.tokenizer, chat_template=named)
    turns = [TALK[0], {"role": "observation", "content": "a"}, *TALK]
    assert Encoder(own, 420).conversation(turns)[0]
    with pytest.raises(InputError, match="message 1 has the role 'observation'"):
        Encoder(VOCABULARY, 420).conversation(turns)


# Folders


NAMES = ["a.jsonl", "b.JSONL", "c.jsonl.gz", "d.csv", "e.tsv.gz", "f.parquet", "g.arrow", "h.jsonl.zst", "i.ndjson", "j.csv.bz2", "README.md"]  # fmt: skip
LINES, CSV = {"a.jsonl", "b.JSONL", "c.jsonl.gz"}, {"d.csv", "e.tsv.gz"}


@given(st.sets(st.sampled_from(NAMES), min_size=1))
def test_a_folder_is_read_whole_or_refused(tmp_path_factory: pytest.TempPathFactory, names: set[str]) -> None:
    folder = tmp_path_factory.mktemp("data")
    for name in names:
        (folder / name).touch()
    data = names - {"README.md"}
    if data and any(data <= kind for kind in (LINES, CSV, {"f.parquet"}, {"g.arrow"})):
        assert {file.name for file in data_files(str(folder))} == data
    else:
        with pytest.raises(InputError, match=str(folder)) as caught:
            data_files(str(folder))
        told = str(caught.value)
        assert any(Path(name).suffix in told for name in names) or "tables of several kinds" in told


def test_a_list_beside_lines_is_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "dataset_info.json").write_text("{}")
    assert [file.name for file in data_files(str(tmp_path))] == ["a.jsonl"]
    (tmp_path / "b.json").write_text('[{"text": "b"}]')
    with pytest.raises(InputError, match=r"b\.json would not be read beside a\.jsonl; take it out of the folder"):
        data_files(str(tmp_path))


# What people write is text


PIECES = st.lists(st.sampled_from([*SPECIAL, "<s>", "</s>", "<0x0A>", "<|im_", "end|>", "<", "|>", "é", "\ue000", "[ab]", " a", "b"]), min_size=1, max_size=6)  # fmt: skip
WORDS = PIECES.map("".join).filter(str.strip)


@pytest.fixture(scope="module", params=["byte level", "sentence piece", "overlapping"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    if request.param == "sentence piece":
        chat = CHAT.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
        return Vocabulary(
            tokenizer=sentence_piece_tokenizer(), chat_template=chat, bos_token="<s>", eos_token="</s>", add_bos=True
        )
    tokenizer = byte_level_tokenizer()
    if request.param == "overlapping":
        tokenizer.add_special_tokens(["[ab", "ab]"])
    return Vocabulary(tokenizer=tokenizer, chat_template=CHAT, eos_token="<|im_end|>")


def control(vocabulary: Vocabulary, ids: list[int]) -> list[int]:
    """The special tokens of `ids`, without those that stand for bytes."""
    added = vocabulary.tokenizer.get_added_tokens_decoder()
    return [token for token in ids if token in added and not added[token].content.startswith("<0x")]


def spelled(vocabulary: Vocabulary, ids: list[int]) -> str:
    return vocabulary.tokenizer.decode(ids, skip_special_tokens=False)


@given(prompt=st.just("") | WORDS, completion=WORDS)
def test_prompts_and_completions_have_no_control_tokens(vocabulary: Vocabulary, prompt: str, completion: str) -> None:
    """What they have in their place is what the library makes of them where it is told so."""
    ids, wanted = Encoder(vocabulary, 1000).completion(prompt, completion, ended=True)
    begin = [vocabulary.token_id("<s>")] if vocabulary.add_bos else []
    assert control(vocabulary, ids) == [*begin, vocabulary.token_id(vocabulary.eos_token)]
    assert wanted[-1]
    text = spelled(vocabulary, ids[len(begin) : -1])
    assert text.replace(" ", "") == (prompt + completion).replace(" ", "")
    if not vocabulary.add_bos:
        assert text == prompt + completion


@given(question=WORDS, answer=WORDS, system=WORDS, tool=WORDS)
def test_messages_have_the_control_tokens_of_their_template_alone(
    vocabulary: Vocabulary, question: str, answer: str, system: str, tool: str
) -> None:
    def conversation(*words: str) -> list[dict[str, Any]]:
        roles = ("system", "user", "assistant", "tool", "user", "assistant")
        return [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]

    encoder = Encoder(vocabulary, 1000)
    turns = conversation(system, question, answer, tool, question, answer)
    harmless = encoder.conversation(conversation(*["ab"] * 6))[0]
    ids = encoder.conversation(turns)[0]
    assert control(vocabulary, ids) == control(vocabulary, harmless)
    if not vocabulary.add_bos:
        assert spelled(vocabulary, ids) == encoder.chat.render(turns, generation_prompt=False).rstrip()
    asked = control(vocabulary, encoder.asked(turns[:2]))
    assert asked == control(vocabulary, encoder.asked(conversation(*["ab"] * 6)[:2]))
    pair = [
        encoder.completion(turns[:2], one, ended=True)[0] for one in (answer, {"role": "assistant", "content": tool})
    ]
    assert control(vocabulary, pair[0]) == control(vocabulary, pair[1])
    assert control(vocabulary, pair[0])[-1] == vocabulary.token_id(vocabulary.eos_token)


GLUE = st.sampled_from(["", "<|im_", "<|", "<", "[a", "end|>", "|>", ">", "b]", " ", "x"])
"""what a template may have beside the words of a message, which makes a special token with some"""
HALVES = st.sampled_from(
    ["<|im_", "<|", "<", "end|>", "|>", ">", "im_end", "im_start", "[a", "[", "b]", "]", "b", "s", "/s"]
)
BESIDE = st.builds(lambda blank, half, word: blank + half + word, st.sampled_from(["", " "]), HALVES, st.sampled_from(["", "é", " a"])) | WORDS  # fmt: skip


@given(before=GLUE, after=GLUE, trim=st.booleans(), words=st.lists(BESIDE.filter(str.strip), min_size=6, max_size=6))
@example(before="x", after="end|>", trim=False, words=["<|im_"] * 6)
@example(before="<|im_", after="x", trim=False, words=["end|>"] * 6)
@example(before="<|", after="|>", trim=True, words=[" im_end "] * 6)
@example(before="", after="b]", trim=False, words=["[a", "é", "[a", "[", "[a", "[a"])
def test_no_control_token_comes_of_words_and_what_stands_beside_them(
    vocabulary: Vocabulary, before: str, after: str, trim: bool, words: list[str]
) -> None:
    shown = "message['content']" + (" | trim" if trim else "")
    template = (vocabulary.chat_template or "").replace("message['content']", f"'{before}' + ({shown}) + '{after}'")
    template = template.replace("assistant\n", f"assistant\n{before}")
    glued = dataclasses.replace(vocabulary, chat_template=template)
    encoder, roles = Encoder(glued, 1000), ("system", "user", "assistant", "tool", "user", "assistant")
    turns = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
    harmless = [turn | {"content": "é"} for turn in turns]
    ids = encoder.conversation(turns)[0]
    assert control(glued, ids) == control(glued, encoder.conversation(harmless)[0])
    assert control(glued, encoder.asked(turns[:2])) == control(glued, encoder.asked(harmless[:2]))
    if not vocabulary.add_bos:
        assert spelled(glued, ids) == encoder.chat.render(turns, generation_prompt=False).rstrip()


def test_words_that_could_begin_a_control_token_have_their_usual_tokens() -> None:
    """Nothing parts them where none comes of them: an answer that is a word in the name of a special token, a
    quotation.
    """
    encoder = Encoder(VOCABULARY, 420)
    for words in ("end", "im", "start", "<", "> a", "a <", "|"):
        turns = [{"role": "user", "content": words}, {"role": "assistant", "content": words}]
        text = encoder.chat.render(turns, generation_prompt=False).rstrip()
        assert encoder.conversation(turns)[0] == VOCABULARY.tokenizer.encode(text, add_special_tokens=False).ids


def test_texts_keep_their_control_tokens(tmp_path: Path) -> None:
    """They may have been rendered already; a row of each kind with the same words."""
    rendered = "<|im_start|>user\nIs it?<|im_end|>\n"
    rows: list[dict[str, Any]] = [{"text": rendered}, {"prompt": rendered, "completion": rendered}]
    rows += [{"messages": [{"role": "user", "content": rendered}, {"role": "assistant", "content": rendered}]}]
    counts = []
    for number, row in enumerate(rows):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        with prepare(str(path), VOCABULARY, tmp_path / f"{number}", seq=256, vocab_size=420) as records:
            counts.append(len(control(VOCABULARY, records.read(0).input_ids.tolist())))
    assert counts == [3, 0, 5]


@given(st.text(max_size=30).filter(str.strip), st.text(max_size=30).filter(str.strip))
def test_other_words_have_the_tokens_that_the_template_gives_them(question: str, answer: str) -> None:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    encoder = Encoder(VOCABULARY, 420)
    if any(token in question + answer for token in SPECIAL):
        return
    text = encoder.chat.render(turns, generation_prompt=False)
    whole = VOCABULARY.tokenizer.encode(text, add_special_tokens=False).ids
    ids = encoder.conversation(turns)[0]
    assert ids == whole[: len(ids)]
