import json
import os
import zlib
from pathlib import Path

import pytest
import torch

from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.engine.training import checkpoint
from tightfit.runtime.engine.training.loop import MetricsFile
from tightfit.runtime.engine.weights import safetensors_file
from tightfit.runtime.engine.weights.safetensors_file import SafetensorsReader, TensorItem

CONDITIONS = {"model": "tiny", "seed": 3}


def fill(path):
    Path(path, "adapter_model.safetensors").write_bytes(b"weights")
    return {"checksums": {"adapter_model.safetensors": zlib.crc32(b"weights")}}


def test_the_newest_checkpoint_is_found_and_old_ones_go(tmp_path):
    for step in (1, 5, 12):
        checkpoint.save(str(tmp_path), step, CONDITIONS, fill, keep=2)
    assert [step for step, _ in checkpoint.find_checkpoints(str(tmp_path))] == [5, 12]
    found = checkpoint.load_latest(str(tmp_path), CONDITIONS)
    assert found.step == 12
    assert found.state["checksums"] == {"adapter_model.safetensors": zlib.crc32(b"weights")}
    checkpoint.save(str(tmp_path), 13, CONDITIONS, fill, keep=0)
    (tmp_path / "checkpoint-14.bak").mkdir()
    assert [step for step, _ in checkpoint.find_checkpoints(str(tmp_path))] == [13]


def test_what_is_saved_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The files and their folder, then the name, then the folder that holds it."""
    done, fsync, rename = [], os.fsync, os.rename

    def synced(descriptor):
        done.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def renamed(old, new):
        done.append(f"{new} named")
        rename(old, new)

    def write(path):
        safetensors_file.write(f"{path}/x.safetensors", lambda: items({"a": torch.ones(3)}), {})
        return {}

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    path = checkpoint.save(str(tmp_path), 1, CONDITIONS, write, keep=1)
    partial = f"{tmp_path}/.checkpoint-1.partial"
    assert done == [f"{partial}/x.safetensors", f"{partial}/state.json", partial, f"{path} named", str(tmp_path)]


def test_a_step_that_is_saved_again_replaces_what_was_saved(tmp_path):
    """Nothing of a save that was killed gets in either."""
    checkpoint.save(str(tmp_path), 1, {"seed": 2}, fill, keep=2)
    (tmp_path / ".checkpoint-1.partial").mkdir()
    (tmp_path / ".checkpoint-1.partial" / "half").touch()
    path = checkpoint.save(str(tmp_path), 1, CONDITIONS, fill, keep=2)
    assert checkpoint.load_latest(str(tmp_path), CONDITIONS).path == path
    assert sorted(file.name for file in Path(path).iterdir()) == ["adapter_model.safetensors", "state.json"]


def test_a_save_that_fails_leaves_the_one_before_intact(tmp_path):
    checkpoint.save(str(tmp_path), 1, CONDITIONS, fill, keep=2)

    def full(path):
        fill(path)
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"checkpoint-2 failed: No space left.*last good checkpoint is .*checkpoint-1"):
        checkpoint.save(str(tmp_path), 2, CONDITIONS, full, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert checkpoint.load_latest(str(tmp_path), CONDITIONS).step == 1
    with pytest.raises(RunError, match="no earlier checkpoint; free disk space and start again with overwrite=True"):
        checkpoint.save(str(tmp_path / "first"), 2, CONDITIONS, full, keep=1)


def test_a_killed_save_is_no_checkpoint(tmp_path):
    (tmp_path / ".checkpoint-9.partial").mkdir()
    (tmp_path / ".checkpoint-9.notes").mkdir()
    assert checkpoint.find_checkpoints(str(tmp_path)) == []
    assert list(checkpoint.partial_directories(str(tmp_path))) == [str(tmp_path / ".checkpoint-9.partial")]
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        checkpoint.load_latest(str(tmp_path), CONDITIONS)


def test_other_conditions_are_refused_by_name(tmp_path):
    checkpoint.save(str(tmp_path), 1, CONDITIONS, fill, keep=1)
    with pytest.raises(InputError, match="made with seed 3, this run has 4"):
        checkpoint.load_latest(str(tmp_path), {**CONDITIONS, "seed": 4})


def test_of_what_differs_only_that_is_told(tmp_path):
    """Neither hashes nor entries that are the same."""
    was = {"weights": "a" * 64, "optimizer": {"name": "adamw", "lr": 2e-4, "schedule": "constant"}, "data": "c" * 64}
    checkpoint.save(str(tmp_path), 1, {**CONDITIONS, **was}, fill, keep=1)
    for changed, told in (
        ({"optimizer": was["optimizer"] | {"lr": 0.1}}, "made with another optimizer: lr 0.0002, now 0.1; resume"),
        ({"weights": "b" * 64}, "made with other weights; resume"),
        ({"data": "b" * 64}, "made with other data than text.jsonl; resume"),
    ):
        with pytest.raises(InputError, match=told):
            checkpoint.load_latest(str(tmp_path), {**CONDITIONS, **was, **changed}, "text.jsonl")


def test_another_graph_is_told_in_words(tmp_path):
    """Hashes say nothing to a reader."""
    checkpoint.save(str(tmp_path), 1, {**CONDITIONS, "graph": "a" * 64}, fill, keep=1)
    with pytest.raises(InputError, match="was made by another version of tightfit or for another model") as refused:
        checkpoint.load_latest(str(tmp_path), {**CONDITIONS, "graph": "b" * 64})
    assert "aaaa" not in str(refused.value)


def test_operators_of_another_version_are_told_before_what_else_they_change(tmp_path):
    checkpoint.save(str(tmp_path), 1, CONDITIONS | {"operators": 7, "graph": "a" * 64}, fill, keep=1)
    assert checkpoint.load_latest(str(tmp_path), CONDITIONS | {"operators": 7, "graph": "a" * 64}).step == 1
    with pytest.raises(InputError) as refused:
        checkpoint.load_latest(str(tmp_path), CONDITIONS | {"operators": 8, "graph": "b" * 64})
    assert str(refused.value) == (
        f"{tmp_path}/checkpoint-1 was made by another version of tightfit's operators (7, this one has 8), which may round otherwise;"
        " resume with the tightfit that began the run or start a new output directory"
    )


def test_a_checkpoint_that_names_no_version_of_the_operators_is_of_the_sixth(tmp_path):
    """Those of versions 1 to 6 said nothing of it."""
    checkpoint.save(str(tmp_path), 1, CONDITIONS, fill, keep=1)
    assert checkpoint.load_latest(str(tmp_path), CONDITIONS | {"operators": 6}).step == 1
    with pytest.raises(InputError, match=r"another version of tightfit's operators \(6, this one has 7\)"):
        checkpoint.load_latest(str(tmp_path), CONDITIONS | {"operators": 7})


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 99, "step": 1}', '{"version": 1, "step": 2}'])
def test_a_damaged_state_is_refused(tmp_path, content):
    path = checkpoint.save(str(tmp_path), 1, CONDITIONS, fill, keep=1)
    Path(path, checkpoint.STATE).write_text(content)
    with pytest.raises(InputError, match="missing or damaged"):
        checkpoint.load_latest(str(tmp_path), CONDITIONS)


def items(tensors):
    def chunks(tensor):
        data = tensor.numpy().tobytes()
        return lambda: [data[:7], data[7:]]

    return [
        TensorItem(name=n, dtype=str(t.dtype)[6:], shape=list(t.shape), chunks=chunks(t)) for n, t in tensors.items()
    ]


def test_safetensors_reads_what_we_write(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    tensors = {"a": torch.randn(3, 5), "b.weight": torch.arange(4), "empty": torch.empty(0, 2)}
    path = str(tmp_path / "x.safetensors")
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:13]))  # as disks may
    checksum = safetensors_file.write(path, lambda: items(tensors), {"format": "pt"})
    monkeypatch.undo()
    assert checksum == zlib.crc32(Path(path).read_bytes())
    assert int.from_bytes(Path(path).read_bytes()[:8], "little") % 8 == 0  # so that tensors are aligned
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
    reader = SafetensorsReader(path)
    reader.verify(checksum)
    assert b"".join(reader.chunks("a", 9)) == tensors["a"].numpy().tobytes()
    with pytest.raises(InputError, match="no tensor 'c'"):
        next(reader.chunks("c"))
    reader.close()


def test_tensors_are_found_whatever_they_are_called(tmp_path):
    names = ["shape", "dtype", "a", 'x"a', "x\\", "é", "data_offsets", "b", "__metadata", "a.b", "b.a", "{", '"a":{']
    tensors = {name: torch.full((1 + place,), float(place)) for place, name in enumerate(names)}
    path = str(tmp_path / "x.safetensors")
    safetensors_file.write(path, lambda: items(tensors), {"format": "pt"})
    reader = SafetensorsReader(path)
    for name in [*names, *reversed(names), "b", "a", "b"]:
        assert name in reader
        assert b"".join(reader.chunks(name)) == tensors[name].numpy().tobytes()
    for name in ("", ":", "pt", "F32", "c", "a.", '"', "format"):
        assert name not in reader
        with pytest.raises(InputError, match="no tensor"):
            list(reader.chunks(name))
    reader.close()
    # Cut in the header, or not a header at all.
    for damaged in (Path(path).read_bytes()[:100], (9).to_bytes(8, "little") + b"[1, 2, 3]", b""):
        Path(path).write_bytes(damaged)
        with pytest.raises(InputError, match="damaged header"):
            SafetensorsReader(path)


def test_damage_is_found(tmp_path):
    path = tmp_path / "x.safetensors"
    checksum = safetensors_file.write(str(path), lambda: items({"a": torch.ones(100)}), {})
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    reader = SafetensorsReader(str(path))
    with pytest.raises(InputError, match="damaged"):
        reader.verify(checksum)
    reader.close()
    path.write_bytes(b"\xff" * 8 + data[8:])
    with pytest.raises(InputError, match="damaged header"):
        SafetensorsReader(str(path))
    path.write_bytes(data[:-200])
    reader = SafetensorsReader(str(path))
    with pytest.raises(InputError, match="truncated in tensor 'a'"):
        list(reader.chunks("a"))
    reader.close()


def test_metrics_keep_the_lines_before_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": s / 2}) + "\n" for s in range(1, 6)) + '{"step": 6, "lo')
    MetricsFile(str(path), 3).add(step=4, loss=9.0)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 1.5}, {"step": 4, "loss": 9.0},
    ]  # fmt: skip
    # What a kill cut short is no line, be it all there but for its end; nor is what is no metric.
    path.write_text('{"step": 1}\n[]\n{}\n7\n{"step"\n{"step": 2}')
    MetricsFile(str(path), 9).add(step=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.unlink()
    MetricsFile(str(path), 9).add(step=10)
    assert path.read_text() == '{"step": 10}\n'
    MetricsFile(str(path), 0)
    assert path.read_text() == ""
    assert list(tmp_path.iterdir()) == [path]
