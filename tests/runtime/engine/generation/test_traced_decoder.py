"""Greedy answers of decoders that transformers builds, with a cache, against transformers' own, and the same bits
whatever stays in memory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from answering import answered_by_transformers, greedy, opened, packed, plan_of, planned, problem_of
from decoder_families import FAMILIES, NO_ANSWERS
from peft_adapters import merged_by_peft, save_adapter, save_model
from reference import stored_weights, take

from tightfit.profiles.models.answer_steps import INSTEAD
from tightfit.profiles.models.decoder_config import handwritten
from tightfit.profiles.models.transformers_decoder import facts
from tightfit.profiles.steps.answer_tracing import answer_steps
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import cache_directory
from tightfit.runtime.engine.cpu.cached_attention_sizes import GROUP
from tightfit.runtime.engine.generation.job import PACKED, STATES, STREAMED
from tightfit.runtime.engine.generation.sizes import SLACK
from tightfit.runtime.engine.training.adapter import BODY
from tightfit.runtime.engine.weights import native

pytestmark = pytest.mark.filterwarnings("ignore")
TRACED = [name for name, config in FAMILIES.items() if not handwritten(config) and name not in NO_ANSWERS]
PROMPT, ANSWER = 45, 12
"""tokens: a group and a part of one, and fewer in all than the 64 positions that the models have"""
BUDGET = 1 << 40


def exact(config: dict[str, Any], store: Path) -> Any:
    """transformers' model with the weights that are in the store."""
    made = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    take(model, stored_weights(store), config, f"{facts(config).prefix}.")
    model.generation_config.eos_token_id = None
    return model


def prompt_of(config: dict[str, Any], count: int = PROMPT) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    made: list[int] = torch.randint(3, config["vocab_size"], (count,), generator=generator).tolist()
    return made


@pytest.mark.slow_but_for("GPT-2")
@pytest.mark.parametrize("name", TRACED)
def test_greedy_answers_are_those_of_transformers_on_the_same_weights(name: str, tmp_path: Path) -> None:
    config = FAMILIES[name]
    store = packed(save_model(tmp_path / "model", config))
    problem = problem_of(config, store, PROMPT, ANSWER)
    model, ids = exact(config, store), prompt_of(config)
    with opened(problem, planned(problem, BUDGET), store) as decoder:
        answer, logits = greedy(decoder, ids, ANSWER)
    with torch.no_grad():
        whole = model(torch.tensor([ids + answer])).logits[0]
    torch.testing.assert_close(logits, whole[PROMPT - 1 : -1], rtol=1e-4, atol=1e-4)
    assert answer == answered_by_transformers(model, ids, ANSWER)


@pytest.mark.slow
def test_long_answers_past_what_the_cache_of_a_window_holds(tmp_path: Path) -> None:
    """After a prompt whose last group is a single token."""
    config, prompt = FAMILIES["OLMo 3"] | {"max_position_embeddings": 256}, 2 * GROUP + 1
    store = packed(save_model(tmp_path / "model", config))
    problem, ids = problem_of(config, store, prompt, SLACK), prompt_of(config, prompt)
    with opened(problem, planned(problem, BUDGET), store) as decoder:
        answer, _ = greedy(decoder, ids, SLACK)
    assert answer == answered_by_transformers(exact(config, store), ids, SLACK)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"use_dora": True}])
@pytest.mark.parametrize("name", ["Phi-3", "OLMo 2", "GPT-2", "GPT-NeoX, Pythia"])
def test_with_an_adapter_they_are_those_of_the_model_that_peft_merges(
    name: str, more: dict[str, Any], tmp_path: Path
) -> None:
    config = FAMILIES[name]
    store = packed(save_model(tmp_path / "model", config))
    adapter = save_adapter(
        exact(config, store),
        tmp_path / "adapter",
        str(tmp_path / "model"),
        r=4,
        lora_alpha=12,
        target_modules="all-linear",
        **more,
    )
    model, ids = merged_by_peft(exact(config, store), adapter), prompt_of(config)
    problem = problem_of(config, store, PROMPT, 8, adapter=adapter)
    body = facts(config).config.get("adapter_body", BODY)
    for plan in (planned(problem, BUDGET), plan_of(problem, [STREAMED], PROMPT)):
        with opened(problem, plan, store, adapter, body) as decoder:
            answer, logits = greedy(decoder, ids, 8)
        with torch.no_grad():
            whole = model(torch.tensor([ids + answer])).logits[0]
        torch.testing.assert_close(logits, whole[PROMPT - 1 : -1], rtol=1e-3, atol=1e-3)
        assert answer == answered_by_transformers(model, ids, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Phi-4-mini", "OLMo 3", "GPT-J"])
@pytest.mark.parametrize("prompt", [PROMPT, GROUP + 1])
def test_the_bits_do_not_depend_on_what_stays_in_memory_or_on_the_passes(
    name: str, prompt: int, tmp_path: Path
) -> None:
    config = FAMILIES[name]
    store = packed(save_model(tmp_path / "model", config))
    problem = problem_of(config, store, prompt, 12)
    ids, found = prompt_of(config, prompt), []
    for states, size in ((STATES, 32), (STATES[::-1], 64), *(((state,), prompt) for state in STATES)):
        with opened(problem, plan_of(problem, states, size), store) as decoder:
            found.append(greedy(decoder, ids, 12)[1])
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.slow
def test_products_with_packed_rows_keep_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.delenv(native.VARIABLE, raising=False)
    dots = native.dots(native.library(cache_directory()))
    if not dots:
        pytest.skip("no C compiler here")
    config = FAMILIES["SmolLM3"]
    store = packed(save_model(tmp_path / "model", config))
    problem, ids, found = problem_of(config, store, GROUP + 1, 6), prompt_of(config, GROUP + 1), []
    monkeypatch.setattr("tightfit.runtime.engine.weights.store._dots", dots)
    for states, size in (([PACKED], GROUP + 1), ([STREAMED], GROUP), ([STREAMED, PACKED], 64)):
        with opened(problem, plan_of(problem, states, size), store) as decoder:
            found.append(greedy(decoder, ids, 6)[0:2])
    assert all(torch.equal(one[1], found[0][1]) for one in found)
    assert found[0][0] == answered_by_transformers(exact(config, store), ids, 6)


@pytest.mark.slow
def test_tokens_that_two_prompts_share_need_not_be_computed_again(tmp_path: Path) -> None:
    config = FAMILIES["OLMo 2"]
    store = packed(save_model(tmp_path / "model", config))
    problem, ids = problem_of(config, store, 50, 8), prompt_of(config, 50)
    with opened(problem, planned(problem, BUDGET), store) as decoder:
        whole = decoder.run([*ids[:20], 7], lambda: None).clone()
        assert decoder.return_to(0) == 0
        decoder.run(ids, lambda: None)
        assert decoder.return_to(20) == 20
        torch.testing.assert_close(decoder.run([7], lambda: None), whole)


@pytest.mark.slow_but_for("Qwen3.5 (text)")
@pytest.mark.parametrize("name", NO_ANSWERS)
def test_what_has_no_cache_is_refused_by_name(name: str) -> None:
    config = FAMILIES[name]
    with pytest.raises(InputError, match=re.escape(f"a {config['model_type']} decoder")) as error:
        answer_steps(config, (), 60)
    assert NO_ANSWERS[name] in str(error.value)
    assert str(error.value).endswith(INSTEAD)


@pytest.mark.slow
def test_short_answers_with_longrope_have_the_short_frequencies(tmp_path: Path) -> None:
    config = FAMILIES["Phi-4-mini"]
    store = packed(save_model(tmp_path / "model", config))
    problem, ids = problem_of(config, store, 20, 8), prompt_of(config, 20)
    with opened(problem, planned(problem, BUDGET), store) as decoder:
        answer, logits = greedy(decoder, ids, 8)
    assert answer == answered_by_transformers(exact(config, store), ids, 8)
    longer = problem_of(config, store, 20, 20)
    with opened(longer, planned(longer, BUDGET), store) as decoder:
        assert not torch.allclose(greedy(decoder, ids, 8)[1], logits)
