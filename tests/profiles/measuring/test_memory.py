"""Measuring holds no more memory than it is given and was predicted; what cannot be measured within it is refused at
once.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from typing import Any

import pytest

from tightfit.profiles.api import step_of
from tightfit.profiles.measuring import measure as measuring
from tightfit.profiles.measuring import memory
from tightfit.profiles.measuring.memory import (
    LEAST_TURNING,
    MOST_CALLS,
    MOST_TURNING,
    SMALLEST_TURNING,
    Measured,
    largest_cache,
    measuring_memory,
    predicted_memory,
    unpack_buffers,
    update_buffers,
)
from tightfit.profiles.options import ProfileOptions
from tightfit.profiles.sources.lookup import resolve
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.units import MIB
from tightfit.runtime.engine.weights.layout import find_extent

CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
"""SmolLM2-135M's layers, two of them, and a sixth of its vocabulary"""


@pytest.fixture(scope="module")
def step(tmp_path_factory) -> Any:
    """(traced step, tensors, entries) of the small decoder."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    source = resolve(str(path))
    traced = step_of(source, ProfileOptions(seq=64)).trace(lambda stage, done, total: None)
    extents = {t.name: find_extent(source.entries, t.name) for t in traced.tensors if t.kind == "weight"}
    packed = [
        t if t.name not in extents else t.model_copy(update={"packed_bytes": extents[t.name].bytes})
        for t in traced.tensors
    ]
    return traced, packed, source.entries


def described(step: Any) -> Measured:
    traced, tensors, _ = step
    return Measured(
        programs=[program.model_dump() for program in traced.programs],
        compute_dtype="bfloat16",
        weights=[("q4", 32, *t.shape, t.dtype) for t in tensors if t.packed_bytes],
        updates=[t.bytes // 4 for t in tensors if t.kind == "trainable"],
    )


def measured(step: Any, folder: Any, memory: int | None) -> Mapping[str, Any]:
    traced, tensors, entries = step
    return measuring.measure(
        traced.programs, tensors, entries, compute_dtype="bfloat16", threads=len(os.sched_getaffinity(0)),
        scratch=folder, environment=dict(os.environ), layers=traced.layers, memory=memory,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("tight", [True, False])
def test_measuring_holds_what_was_predicted_and_no_more(step, tmp_path, tight):
    memory = predicted_memory(described(step), SMALLEST_TURNING).predicted_bytes if tight else None
    result = measured(step, tmp_path, memory)
    if memory is not None:
        assert result["predicted_bytes"] <= memory
    assert 0.85 * result["predicted_bytes"] < result["held_bytes"] <= result["predicted_bytes"]
    for program in step[0].programs:
        figures = result["operators"][program.name]
        assert len(figures) == len(program.operators)
        assert all(seconds > 0 and workspace >= 0 for seconds, workspace in figures)
    assert min([*result["unpack"].values(), *result["update"].values()]) > 0
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused_before_anything_starts(step, tmp_path, monkeypatch):
    def started(*words: Any, **options: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    needed = predicted_memory(described(step), SMALLEST_TURNING).predicted_bytes
    with pytest.raises(
        InputError,
        match=rf"^measuring takes {needed / MIB:.1f} MiB at least, {(needed - 1) / MIB:.1f} MiB are given for it; take a smaller batch or",
    ):
        measured(step, tmp_path, needed - 1)


def test_more_memory_gives_larger_buffers(step, monkeypatch):
    monkeypatch.setattr(
        memory, "built_for_cuda", lambda: False
    )  # with its start the floor would take more than buffers
    wanted = described(step)
    least, most = (
        measuring_memory(wanted, given) for given in (predicted_memory(wanted, SMALLEST_TURNING).predicted_bytes, None)
    )
    between = measuring_memory(wanted, (least.predicted_bytes + most.predicted_bytes) // 2)
    assert SMALLEST_TURNING <= least.turning_bytes < between.turning_bytes < most.turning_bytes
    assert least.predicted_bytes <= between.predicted_bytes <= (least.predicted_bytes + most.predicted_bytes) // 2
    assert LEAST_TURNING <= most.turning_bytes <= MOST_TURNING


def test_buffers_have_the_room_that_they_are_given():
    """Of one weight that is too large so many rows, of smaller ones as many as take turns."""
    row = (
        18 * (16 + 4) + 2 * 576
    )  # 18 groups of 32 halves of bytes, each with scale and minimum; unpacked, 576 of 16 bits
    assert unpack_buffers(10 * 100 * row, "q4", 32, 100, 576, "bfloat16") == (100, 10, row)
    assert unpack_buffers(70 * row - 1, "q4", 32, 100, 576, "bfloat16") == (69, 1, row)
    assert unpack_buffers(5, "q4", 32, 100, 576, "bfloat16").rows == 1
    assert update_buffers(1 << 30, 8) == (8, MOST_CALLS, 4 * 4)
    assert update_buffers(1 << 30, 8, accumulate=2).row_bytes == 5 * 4


def test_the_largest_cache_is_found(tmp_path):
    assert largest_cache(tmp_path) == 0
    for index, size in enumerate(("48K", "2048K", "32M", "unknown")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert largest_cache(tmp_path) == 32 * MIB
