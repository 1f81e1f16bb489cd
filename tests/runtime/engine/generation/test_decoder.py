"""Greedy answers of the decoder with a cache against transformers' own, and the same bits whatever stays in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import answering
import pytest
import torch
import transformers
from answering import answered_by_transformers, greedy, opened, packed, plan_of, planned, problem_of
from peft_adapters import merged_by_peft, save_adapter, save_model
from reference import CONFIGS, VARIANTS, stored_weights, take

from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.engine.generation.job import PACKED, STATES, STREAMED
from tightfit.runtime.engine.generation.sizes import SLACK
from tightfit.runtime.engine.weights import native
from tightfit.runtime.engine.weights.layout import read_header

pytestmark = pytest.mark.filterwarnings("ignore:.*tie:UserWarning")
LLAMA3 = {
    "rope_scaling": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip
FORMS = (
    CONFIGS
    | VARIANTS
    | {
        "llama3 scaling, head of its own": CONFIGS["llama"] | LLAMA3 | {"tie_word_embeddings": False},
        "qwen2 with windows": CONFIGS["qwen2"]
        | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    }
)
PROMPT, ANSWER = 75, SLACK
"""tokens: more than two groups, and so many in all that what lies before a window has to make room"""
BUDGET = 1 << 40


def prompt_of(config: dict[str, Any], count: int = PROMPT) -> list[int]:
    made: list[int] = torch.randint(
        3, config["vocab_size"], (count,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    return made


def exact(config: dict[str, Any], store: Path) -> Any:
    """transformers' model with the weights that are in the store."""
    made = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    take(model, stored_weights(store), config)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("name", FORMS)
def test_greedy_answers_are_those_of_transformers_on_the_same_weights(name: str, tmp_path: Path) -> None:
    config = FORMS[name]
    store = packed(save_model(tmp_path / "model", config))
    problem = problem_of(config, store, PROMPT, ANSWER)
    model, ids = exact(config, store), prompt_of(config)
    with opened(problem, planned(problem, BUDGET), store) as decoder:
        answer, logits = greedy(decoder, ids, ANSWER)
        again, _ = greedy(decoder, answer[-1:], 1)  # one more: the cache still has what it needs
    assert answer == answered_by_transformers(model, ids, ANSWER)
    with torch.no_grad():
        whole = model(torch.tensor([ids + answer])).logits[0]
    torch.testing.assert_close(logits, whole[PROMPT - 1 : -1], rtol=1e-4, atol=1e-4)
    assert again == [int(whole[-1].argmax())]


@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}, {"use_dora": True}])
@pytest.mark.parametrize("name", ["qwen2", "gemma3_text with biases"])
def test_with_an_adapter_they_are_those_of_the_model_that_peft_merges(
    name: str, more: dict[str, Any], tmp_path: Path
) -> None:
    config = FORMS[name]
    store = packed(save_model(tmp_path / "model", config))
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    adapter = save_adapter(
        exact(config, store),
        tmp_path / "adapter",
        str(tmp_path / "model"),
        r=4,
        lora_alpha=12,
        target_modules=targets,
        **more,
    )
    model, ids = merged_by_peft(exact(config, store), adapter), prompt_of(config)
    problem = problem_of(config, store, PROMPT, 8, adapter=adapter)
    for plan in (planned(problem, BUDGET), plan_of(problem, [STREAMED], PROMPT)):
        with opened(problem, plan, store, adapter) as decoder:
            answer, logits = greedy(decoder, ids, 8)
        with torch.no_grad():
            whole = model(torch.tensor([ids + answer])).logits[0]
        torch.testing.assert_close(logits, whole[PROMPT - 1 : -1], rtol=1e-3, atol=1e-3)
        assert answer == answered_by_transformers(model, ids, 8)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_the_bits_do_not_depend_on_what_stays_in_memory_or_on_the_passes(name: str, tmp_path: Path) -> None:
    config = FORMS[name]
    store = packed(save_model(tmp_path / "model", config))
    problem = problem_of(config, store, PROMPT, 12)
    ids, found = prompt_of(config), []
    for states, size in ((STATES, 32), (STATES[::-1], 64), *(((state,), PROMPT) for state in STATES)):
        with opened(problem, plan_of(problem, states, size), store) as decoder:
            found.append(greedy(decoder, ids, 12)[1])
    assert all(torch.equal(one, found[0]) for one in found)


def test_products_with_packed_rows_keep_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """One row of activations is multiplied with packed rows where there is a compiler: a token's, and that of a group
    of one.
    """
    monkeypatch.delenv(native.VARIABLE, raising=False)
    dots = native.dots(native.library(cache_directory()))
    if not dots:
        pytest.skip("no C compiler here")
    config = FORMS["qwen2"]
    store = packed(save_model(tmp_path / "model", config))
    problem, ids, found = problem_of(config, store, 65, 6), prompt_of(config, 65), []
    with opened(problem, plan_of(problem, [PACKED], 65), store) as decoder:
        due = greedy(decoder, ids, 6)[1]
    monkeypatch.setattr("tightfit.runtime.engine.weights.store._dots", dots)
    for states, size in (([PACKED], 65), ([STREAMED], 32), ([STREAMED, PACKED], 64)):
        with opened(problem, plan_of(problem, states, size), store) as decoder:
            found.append(greedy(decoder, ids, 6)[1])
    assert all(torch.equal(one, found[0]) for one in found)
    assert not torch.equal(found[0], due)
    torch.testing.assert_close(found[0], due, rtol=1e-4, atol=1e-4)


def test_a_narrow_cache_differs_by_its_rounding_alone(tmp_path: Path) -> None:
    config = FORMS["gemma3_text"]
    store = packed(save_model(tmp_path / "model", config))
    wide, narrow = (problem_of(config, store, PROMPT, 4, cache_dtype=kind) for kind in ("float32", "bfloat16"))
    found = []
    for problem in (wide, narrow):
        with opened(problem, planned(problem, BUDGET), store) as decoder:
            found.append(decoder.run(prompt_of(config), lambda: None).clone())
    assert planned(narrow, BUDGET).cache_bytes < 0.6 * planned(wide, BUDGET).cache_bytes
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert 0 < error < 0.02


def test_tokens_that_two_prompts_share_need_not_be_computed_again(tmp_path: Path) -> None:
    config = FORMS["gemma3_text"]
    store = packed(save_model(tmp_path / "model", config))
    problem, ids = problem_of(config, store, 200, 8), prompt_of(config, 200)
    with opened(problem, planned(problem, BUDGET), store) as decoder:
        whole = decoder.run([*ids[:50], 7], lambda: None).clone()
        decoder.run(ids[51:60], lambda: None)
        assert decoder.return_to(50) == 50
        torch.testing.assert_close(decoder.run([7], lambda: None), whole)
        decoder.run(ids[50:190], lambda: None)
        assert decoder.return_to(30) == 0  # its window is not in the cache any more
        torch.testing.assert_close(decoder.run([*ids[:50], 7], lambda: None), whole)


def test_an_adapter_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    config = FORMS["llama"]
    store = packed(save_model(tmp_path / "model", config))
    entries = read_header(store).entries
    saved = save_adapter(
        exact(config, store),
        tmp_path / "saved",
        str(tmp_path / "model"),
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
    )
    with pytest.raises(InputError, match=r"lm_head\.weight, trained in full, which tightfit cannot generate with"):
        problem_of(config, store, 4, 4, adapter=saved)
    other = config | {"num_hidden_layers": 4}
    more = save_adapter(
        exact(other, packed(save_model(tmp_path / "other", other))),
        tmp_path / "more",
        str(tmp_path / "other"),
        r=2,
        target_modules=["q_proj"],
    )
    with pytest.raises(
        InputError, match=r"a pair for model\.layers\.3\.self_attn\.q_proj\.weight, which the model lacks"
    ):
        problem_of(config, store, 4, 4, adapter=more)
    assert "model.layers.3.self_attn.q_proj.weight" not in entries


HEAP = """
import ctypes, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from answering import opened, plan_of, problem_of
from reference import CONFIGS

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena b c d e f g h i j".split()]

library = ctypes.CDLL("libc.so.6")
library.mallinfo2.restype = Heap
torch.set_num_threads(1)
problem = problem_of(CONFIGS["llama"], Path(sys.argv[2]), 3200, 4)
with opened(problem, plan_of(problem, ["packed"], 3200), Path(sys.argv[2])) as decoder:
    decoder.run([1] * 40, lambda: None)
    decoder.return_to(0)
    held = [library.mallinfo2().arena]
    decoder.run([1] * 3200, lambda: held.append(library.mallinfo2().arena))
    print(max(held) - held[0])
"""
"""prints by how much the heap grows while a long prompt goes through the layers"""


@pytest.mark.slow
def test_the_heap_does_not_grow_with_a_prompt(tmp_path: Path) -> None:
    """The buffers in which products with keys arrange their operands are there from the beginning; with each group of a
    prompt they would become larger, and leave holes in the heap.
    """
    store = packed(save_model(tmp_path / "model", CONFIGS["llama"]))
    words = [sys.executable, "-c", HEAP, str(Path(answering.__file__).parent), str(store)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 512 << 10  # 880 KiB and more without them
