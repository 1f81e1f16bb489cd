"""A tokenizer as a table on disk gives the ids and places that the `tokenizers` library gives."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import SOURCES
from tiny_models import SPECIAL, TEXT, byte_level_tokenizer, sentence_piece_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tightfit.profiles.sources.directory_tokenizer import directory_vocabulary, library_tokenizer
from tightfit.profiles.sources.gguf_tokenizer import SPLITS
from tightfit.profiles.token_tables import kept_table
from tightfit.profiles.token_tables.tokenizer_json import vocabulary_bytes
from tightfit.profiles.token_tables.tokenizer_table import TokenizerTable
from tightfit.runtime.common.errors import CapError

MIB = 1 << 20
SCRIPTS = "naïve café — 日本語のテキスト 한국어 русский текст ελληνικά العربية עברית हिन्दी ไทย 🙂👩‍👩‍👧 🇫🇷 e\u0301 ﬁ Ⅷ"
WRITTEN = [*TEXT, SCRIPTS, "for i in range(10):\n    print(i)\n\n\n\treturn   x  # 12345"]


def trained(tokenizer: Tokenizer, size: int = 500, **options: Any) -> Tokenizer:
    options = {"special_tokens": SPECIAL, "show_progress": False} | options
    tokenizer.train_from_iterator(WRITTEN, trainers.BpeTrainer(vocab_size=size, **options))
    return tokenizer


def qwen() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLITS["qwen2"]), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def llama_3() -> Tokenizer:
    """Words of the vocabulary are tokens whatever the merges say; a text begins with a token."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(SPLITS["llama3"]), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trained(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    content = json.loads(tokenizer.to_str())
    content["model"]["merges"] = content["model"]["merges"][::2]
    joined = {"".join(merge) for merge in content["model"]["merges"]}
    content["model"]["merges"] = [
        merge for merge in content["model"]["merges"] if all(len(part) == 1 or part in joined for part in merge)
    ]
    return Tokenizer.from_str(json.dumps(content))


def sentence_piece() -> Tokenizer:
    """A text is one word, as in Llama 2, whose vocabulary has tokens with spaces inside."""
    tokenizer = sentence_piece_tokenizer(600)
    tokenizer.add_tokens(["\n\n", "▁▁▁▁"])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = sentence_piece_tokenizer()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def gemma() -> Tokenizer:
    tokenizer = sentence_piece_tokenizer(600)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


def unknown(fuse: bool, token: str | None = "<|endoftext|>") -> Tokenizer:
    """Letters outside the vocabulary are unknown, each or together, or left out."""
    tokenizer = Tokenizer(models.BPE(unk_token=token, fuse_unk=fuse))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return trained(tokenizer, limit_alphabet=40)


def few_bytes() -> Tokenizer:
    """Of some letters all bytes are tokens, others are unknown."""
    content = json.loads(sentence_piece_tokenizer().to_str())
    gone = {f"<0x{byte:02X}>" for byte in range(0xE4, 0x100)}
    names = [name for name in content["model"]["vocab"] if name not in gone]
    content["model"]["vocab"] = {name: number for number, name in enumerate(names)}
    content["added_tokens"] = [
        token | {"id": content["model"]["vocab"][token["content"]]}
        for token in content["added_tokens"]
        if token["content"] not in gone
    ]
    return Tokenizer.from_str(json.dumps(content))


def marked_places() -> Tokenizer:
    """As GPT-1 and CLIP have them: tokens at the end of a word are others, here also those inside."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[0], continuing_subword_prefix="##", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return trained(tokenizer, continuing_subword_prefix="##", end_of_word_suffix="</w>")


def added() -> Tokenizer:
    """With added tokens of every form, outside the vocabulary too."""
    tokenizer = byte_level_tokenizer()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens([AddedToken("<tool>", lstrip=True), AddedToken("the", single_word=True)])
    tokenizer.add_tokens([AddedToken("NAÏVE", normalized=True), AddedToken("<x>", rstrip=True, normalized=False)])
    return tokenizer


def bert() -> Tokenizer:
    """WordPiece, without some letters: words that have them are unknown as a whole, as are long ones."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=20))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    options = {"special_tokens": special, "limit_alphabet": 70, "show_progress": False}
    tokenizer.train_from_iterator(WRITTEN, trainers.WordPieceTrainer(vocab_size=400, **options))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def unigram(*steps: Any, split: Any = None) -> Tokenizer:
    """A unigram model as SentencePiece trains it; the text of its unknown token may be written."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = split or pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    options = {"special_tokens": special, "unk_token": "<unk>", "show_progress": False}
    tokenizer.train_from_iterator(WRITTEN, trainers.UnigramTrainer(vocab_size=400, **options))
    return tokenizer


def t5() -> Tokenizer:
    tokenizer = unigram(normalizers.NFKC())
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return tokenizer


def xlm_roberta() -> Tokenizer:
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer = unigram(normalizers.Nmt(), normalizers.NFKC(), split=split)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def albert() -> Tokenizer:
    """Some unknown letters, and where bytes are tokens none."""
    quotes = (normalizers.Replace("``", '"'), normalizers.Replace("''", '"'))
    content = json.loads(
        unigram(*quotes, normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()).to_str()
    )
    content["model"]["byte_fallback"] = True
    content["model"]["vocab"] += [[f"<0x{byte:02X}>", 0.0] for byte in range(0xE8)]
    return Tokenizer.from_str(json.dumps(content))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "SmolLM2": byte_level_tokenizer,
    "Qwen2": qwen,
    "Llama 3": llama_3,
    "Llama 2": sentence_piece,
    "Metaspace": metaspace,
    "Gemma": gemma,
    "unknown letters": lambda: unknown(False),
    "unknown letters together": lambda: unknown(True),
    "left out": lambda: unknown(False, None),
    "few bytes": few_bytes,
    "GPT-1": marked_places,
    "added tokens": added,
    "BERT": bert,
    "T5": t5,
    "XLM-R": xlm_roberta,
    "ALBERT": albert,
}
PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *SPECIAL,
                "<s>",
                "</s>",
                "<unk>",
                "[UNK]",
                "##ing",
                "<tool>",
                "<x>",
                " the ",
                "NaÏve",
                "▁",
                "▁▁▁▁",
                "\n\n",
                "\ue000",
            ]
        ),
        st.sampled_from([word for text in WRITTEN for word in text.split(" ")]),
        st.text(" \n\t\x00\x7f\u200b\u200d\u0301", max_size=4),
        st.text(max_size=6),
        st.text(SCRIPTS, max_size=8),
    ),
    max_size=14,
)


def written(folder: Path, tokenizer: Tokenizer) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def table_of(folder: Path) -> TokenizerTable:
    vocabulary = directory_vocabulary(folder)
    assert vocabulary is not None
    assert isinstance(vocabulary.tokenizer, TokenizerTable)
    return vocabulary.tokenizer


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, TokenizerTable]:
    """A tokenizer as the library has it, and its table."""
    folder = written(tmp_path_factory.mktemp("tokenizer"), KINDS[request.param]())
    return library_tokenizer(folder), table_of(folder)


@given(pieces=PIECES)
def test_ids_and_places_are_the_library_s(pair: tuple[Tokenizer, TokenizerTable], pieces: list[str]) -> None:
    library, table = pair
    text = "".join(pieces)
    for around in (True, False):
        due, found = library.encode(text, add_special_tokens=around), table.encode(text, add_special_tokens=around)
        assert found.ids == due.ids
        assert found.offsets == due.offsets


def test_a_long_text_is_the_library_s(pair: tuple[Tokenizer, TokenizerTable]) -> None:
    library, table = pair
    for text in (
        "".join(WRITTEN) * 3,
        "a" * 3000,
        " " * 500 + "x",
        "".join(random.Random(0).choices("abcde▁é日", k=2000)),
    ):
        assert table.encode(text).ids == library.encode(text).ids


def test_the_vocabulary_is_the_library_s(pair: tuple[Tokenizer, TokenizerTable]) -> None:
    library, table = pair
    assert table.get_vocab_size() == library.get_vocab_size()
    for token, number in library.get_vocab().items():
        assert table.token_to_id(token) == library.token_to_id(token) == number
        assert table.id_to_token(number) == library.id_to_token(number)
    assert table.token_to_id("no such token") is None
    assert [table.id_to_token(number) for number in (-1, 1 << 20)] == [None, None]
    due, found = library.get_added_tokens_decoder(), table.get_added_tokens_decoder()
    assert found.keys() == due.keys()
    assert all(found[number].content == due[number].content for number in due)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object], **layout: Any) -> Path:
    """The same tokenizer.json with a change, in another layout."""
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content, **layout))
    return folder


@pytest.mark.parametrize("layout", [{"indent": 2}, {"ensure_ascii": False, "separators": (",", ":")}, {}])
def test_the_table_is_the_same_in_whatever_layout_the_file_is(layout: dict[str, Any], tmp_path: Path) -> None:
    first = table_of(written(tmp_path / "first", gemma())).path
    second = table_of(rewritten(written(tmp_path / "second", gemma()), lambda content: None, **layout)).path
    assert first != second
    assert first.read_bytes() == second.read_bytes()


def test_files_of_earlier_years_are_read(tmp_path: Path) -> None:
    """They write a merge as one text, and name neither the kind of the model nor what was invented later."""

    def older(content: dict[str, Any]) -> None:
        model = content["model"]
        model["merges"] = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
        content["model"] = {name: model[name] for name in ("vocab", "merges")}

    folder = rewritten(written(tmp_path / "model", byte_level_tokenizer()), older)
    text = "".join(WRITTEN)
    assert table_of(folder).encode(text).ids == byte_level_tokenizer().encode(text).ids


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["model"].update(dropout=0.5),
        lambda content: content["model"].update(unk_token="no such token"),
        lambda content: content["added_tokens"][-1].update(id=7000),
        lambda content: content["model"]["vocab"].update(twin=5),
        lambda content: content["model"]["vocab"].update(far=4_000_000_000),
    ],
)
def test_other_kinds_are_the_library_s(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    folder = rewritten(written(tmp_path / "model", added()), change)
    vocabulary = directory_vocabulary(folder)
    assert vocabulary is not None
    assert isinstance(vocabulary.tokenizer, Tokenizer)


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"),
        models.WordPiece({"a": 0}, unk_token="[UNK]"),
        models.Unigram([("a", -1.0), ("b", -2.0)]),
        models.Unigram([("<unk>", 0.0), ("a", -1.0), ("a", -2.0)], 0),
    ],
)
def test_other_models_are_the_library_s(model: Any, tmp_path: Path) -> None:
    vocabulary = directory_vocabulary(written(tmp_path / "model", Tokenizer(model)))
    assert vocabulary is not None
    assert isinstance(vocabulary.tokenizer, Tokenizer)
    assert vocabulary.tokenizer.encode("a").ids == Tokenizer(model).encode("a").ids


def test_a_table_is_made_once_and_again_where_it_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "cache"))
    folder = written(tmp_path / "model", gemma())
    path = table_of(folder).path
    content, made = path.read_bytes(), path.stat().st_mtime_ns
    assert table_of(folder).path.stat().st_mtime_ns == made
    for damaged in (content[:-1], content[:20], b"", content[:-9] + b"damaged.."):
        path.write_bytes(damaged)
        assert table_of(folder).path == path
        assert path.read_bytes() == content


def test_a_process_of_its_own_makes_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "model", gemma())
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "here"))
    here = table_of(folder).path.read_bytes()
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "apart"))
    monkeypatch.setattr(kept_table, "SMALL_BYTES", 0)
    assert table_of(folder).path.read_bytes() == here
    other = directory_vocabulary(written(tmp_path / "other", Tokenizer(models.WordLevel({"a": 0}, "a"))))
    assert other is not None
    assert isinstance(other.tokenizer, Tokenizer)


def test_a_table_for_which_there_is_no_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_table, "SMALL_BYTES", 0)
    monkeypatch.setattr(kept_table, "free_memory", lambda: (30 * MIB, "30 MiB are left of the 64 MiB of the cgroup x"))
    folder = written(tmp_path / "model", gemma())
    told = "its tokenizer's table takes about 32.* while it is made, and 30 MiB are left of the 64 MiB of the cgroup x; free some"
    with pytest.raises(CapError, match=told):
        directory_vocabulary(folder)


HELD = """
import resource, sys
from pathlib import Path
from tightfit.profiles.sources import directory_tokenizer
from tightfit.runtime.engine.device.resident import memory

before = memory().peak
tokenizer = getattr(directory_tokenizer, sys.argv[1])(Path(sys.argv[2]))
tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
tokenizer.encode("".join(map(chr, range(97, 123))) * 50)
print(memory().peak - before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10)
"""


def many_words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(100,000 words with their ids, merges that make them of letters)."""
    letters = [chr(number) for number in range(97, 123)]
    vocabulary, merges, chosen = dict.fromkeys(letters), [], random.Random(0)
    while len(vocabulary) < 100_000:
        word = chosen.choice(letters) + "".join(chosen.choices(letters, k=7))
        for end in range(2, 9):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = None
                merges.append((word[: end - 1], word[end - 1]))
    return {token: number for number, token in enumerate(vocabulary)}, merges


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "above", "library"), [("BPE", 1.6, 40 * MIB), ("WordPiece", 2, 18 * MIB), ("Unigram", 2, 18 * MIB)]
)
def test_a_large_vocabulary_stays_on_disk(
    kind: str, above: float, library: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "cache"))
    ids, merges = many_words()
    model = {
        "BPE": lambda: models.BPE(ids, merges),
        "WordPiece": lambda: models.WordPiece(ids, unk_token="a"),
        "Unigram": lambda: models.Unigram([(token, -float(len(token))) for token in ids], 0),
    }[kind]()
    folder = written(tmp_path / "model", Tokenizer(model))

    def held(name: str) -> list[int]:
        """(bytes that a process holds, most of the process that made the table)."""
        words = [sys.executable, "-c", HELD, name, str(folder)]
        environment = {"PYTHONPATH": str(SOURCES), "TIGHTFIT_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        return [int(word) for word in done.stdout.split()]

    predicted = kept_table.making_bytes(vocabulary_bytes(folder / "tokenizer.json"))
    by_table, maker = held("directory_vocabulary")
    assert by_table < 12 * MIB
    assert predicted / above < maker < predicted
    assert held("directory_vocabulary")[1] == 0
    assert held("library_tokenizer")[0] > library
