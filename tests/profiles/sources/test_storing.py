"""Opening a model imports no PyTorch; its weights are packed by a worker of little memory, to the same bytes as in this
process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_formats import AWQ, BNB, GPTQ
from quantised_checkpoints import four_bit, write_quantised, zero_points
from reference import CONFIGS
from tiny_models import byte_level_tokenizer, random_weights, write_directory, write_gguf

from tightfit.profiles.sources import storing
from tightfit.profiles.sources.lookup import resolve
from tightfit.profiles.sources.storing import stored_weights, storing_bytes
from tightfit.profiles.weights.store_file import build_store
from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.interpreter import python_path
from tightfit.runtime.engine.weights.layout import store_path

LLAMA = CONFIGS["llama"]
WIDE = LLAMA | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
UP = "model.layers.0.mlp.up_proj.weight"


def gguf_file(folder: Path) -> Path:
    return write_gguf(folder / "m.gguf", LLAMA, random_weights(LLAMA), tokenizer=byte_level_tokenizer())


def rare_gguf_file(folder: Path) -> Path:
    return write_gguf(folder / "m.gguf", WIDE, random_weights(WIDE), default="F16", kinds={UP: "TQ1_0"})


def directory(folder: Path) -> Path:
    return write_directory(folder / "m", LLAMA, random_weights(LLAMA), shards=2)


def gptq_directory(folder: Path) -> Path:
    write_quantised(folder / "m", LLAMA, random_weights(LLAMA), GPTQ, zero_points)
    return folder / "m"


def awq_directory(folder: Path) -> Path:
    write_quantised(folder / "m", LLAMA, random_weights(LLAMA), AWQ, lambda *given: zero_points(*given, method="awq"))
    return folder / "m"


def bitsandbytes_directory(folder: Path) -> Path:
    write_quantised(
        folder / "m", LLAMA, random_weights(LLAMA), BNB, lambda *given: four_bit(*given, double=True), shards=2
    )
    return folder / "m"


def bare_config(folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


MODELS: dict[str, tuple[Callable[[Path], Path], dict[str, str]]] = {
    "gguf": (gguf_file, {}),
    "gguf of a rare type": (rare_gguf_file, {"base": "8bit"}),
    "directory": (directory, {}),
    "GPTQ": (gptq_directory, {}),
    "AWQ": (awq_directory, {"embeddings": "8bit"}),
    "bitsandbytes": (bitsandbytes_directory, {}),
    "bare config": (bare_config, {}),
}

PACKED = """
import json, os, resource, sys
from tightfit.profiles.sources import storing
from tightfit.profiles.sources.lookup import resolve

start = storing.run_worker
peaks = []

def run_worker(*given, **named):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    start(*given, **named)
    peaks.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10)

storing.run_worker = run_worker
source = resolve(sys.argv[1], **json.loads(sys.argv[3]))
opened = sorted({"torch", "transformers", "numpy", "gguf", "safetensors"} & sys.modules.keys())
steps = []
path = storing.stored_weights(source, sys.argv[2], lambda *step: steps.append(step))
print(json.dumps({
    "opened": opened, "packed": sorted({"torch", "numpy"} & sys.modules.keys()), "path": str(path), "steps": steps,
    "peaks": peaks, "predicted": storing.storing_bytes(source),
}))
"""


def packed_elsewhere(model: Path, directory: Path, precision: dict[str, str], **environment: str) -> dict[str, Any]:
    """What a process without PyTorch says of packing a model."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", PACKED, str(model), str(directory), json.dumps(precision)],
        env=os.environ | {"PYTHONPATH": python_path()} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_a_process_without_pytorch_has_the_same_bytes_packed(kind: str, tmp_path: Path) -> None:
    make, precision = MODELS[kind]
    model = make(tmp_path)
    source = resolve(str(model), **precision)
    expected = build_store(source, tmp_path / "here")
    said = packed_elsewhere(model, tmp_path / "there", precision)
    assert said["opened"] == said["packed"] == []
    assert Path(said["path"]) == tmp_path / "there" / expected.name
    assert Path(said["path"]).read_bytes() == expected.read_bytes()
    total = sum(entry.bytes for entry in source.entries.values())
    assert said["steps"][-1] == ["pack", total, total]
    assert len(said["steps"]) == len(source.entries)
    assert len(said["peaks"]) == 1


def test_a_store_that_is_there_starts_no_worker(tmp_path: Path) -> None:
    model = directory(tmp_path)
    build_store(resolve(str(model)), tmp_path / "stores")
    said = packed_elsewhere(model, tmp_path / "stores", {})
    assert said["peaks"] == said["steps"] == []


def test_where_pytorch_is_loaded_no_worker_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "run_worker", lambda *given, **named: pytest.fail("a worker was started"))
    source = resolve(str(directory(tmp_path)))
    assert stored_weights(source, tmp_path / "stores").exists()


@pytest.mark.slow
def test_with_all_of_pytorch_the_bytes_are_the_same(tmp_path: Path) -> None:
    model = directory(tmp_path)
    expected = build_store(resolve(str(model)), tmp_path / "here")
    said = packed_elsewhere(model, tmp_path / "there", {}, TIGHTFIT_TORCH="plain")
    assert Path(said["path"]).read_bytes() == expected.read_bytes()


def by_worker(source: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pack as a process does that has not loaded PyTorch."""
    monkeypatch.setattr(sys, "modules", {name: module for name, module in sys.modules.items() if name != "torch"})
    return stored_weights(source, folder)


@pytest.mark.slow
def test_errors_of_the_worker_are_told_as_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(LLAMA)
    weights[UP][3, 1] = torch.nan
    source = resolve(str(write_directory(tmp_path / "m", LLAMA, weights)))
    with pytest.raises(InputError, match=rf"model\.safetensors: tensor '{UP}' holds NaN or infinity, first in row 3; "):
        by_worker(source, tmp_path / "stores", monkeypatch)
    assert list((tmp_path / "stores").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file.*; set TIGHTFIT_CACHE to a writable directory"):
        by_worker(source, tmp_path / "file" / "stores", monkeypatch)


@pytest.mark.slow
def test_a_model_that_changes_before_it_is_packed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(str(directory(tmp_path)))
    write_directory(tmp_path / "m", LLAMA, random_weights(LLAMA, seed=1), shards=2)
    with pytest.raises(InputError, match="was changed while it was being opened"):
        by_worker(source, tmp_path / "stores", monkeypatch)
    assert not store_path(tmp_path / "stores", source.name, source.fingerprint).exists()


@pytest.mark.slow
@pytest.mark.parametrize("precision", [{}, {"base": "16bit"}])
def test_packing_takes_what_was_predicted_whatever_the_model_s_size(precision: dict[str, str], tmp_path: Path) -> None:
    """A model of 64 MB, with blocks of the largest size, is packed in less than was said, and that is close to it."""
    config = LLAMA | {"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 24576}
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(config).items()}
    model = write_directory(tmp_path / "m", config, weights)
    assert sum(path.stat().st_size for path in model.iterdir()) > 60 << 20
    source = resolve(str(model), **precision)
    said = packed_elsewhere(model, tmp_path / "stores", precision)
    assert storing_bytes(source) - (48 << 20) < said["peaks"][0] < storing_bytes(source) == said["predicted"]
