"""What the lean process keeps of a job: little for each layer, so that deep models hold what their plans say."""

from __future__ import annotations

import gc
import tracemalloc
from array import array

import pytest
from in_process import make_training, random_records
from tiny_plans import CONFIG, decoder_profile, naive_plan

from tightfit.runtime.engine.training.job import Job
from tightfit.runtime.engine.training.job_tables import (
    SEPARATOR,
    StoredWeight,
    TensorPlace,
    Trainable,
    Trainables,
    Weights,
)
from tightfit.runtime.session.job_compiler import compile_job

LAYERS = (6, 30)
KIB = 1 << 10


def test_weights_are_told_one_at_a_time():
    said = {"names": SEPARATOR.join(("a", "b c")), "dtypes": ["bfloat16", "float32"], "shapes": [[3, 4], [5]]}
    weights = Weights(said, array("q", [0, 1, 40, -1, 4096, 1, 0, 50, 64, -1]))
    assert len(weights) == 2
    assert list(weights) == [
        StoredWeight("a", "bfloat16", (5,), 40, -1, 4096),
        StoredWeight("b c", "float32", (3, 4), 50, 64, -1),
    ]
    assert weights[1].packed_bytes == 50


@pytest.mark.parametrize("states", [0, 2, 3])
def test_trainables_are_told_one_at_a_time(states):
    said = {"names": SEPARATOR.join(("x", "y")), "dtypes": ["float32"], "shapes": [[2], [3, 3]]}
    rows = [[1, 9, 7, 64, *range(100, 100 + 2 * states)], [0, 8, 6, -1, *range(200, 200 + 2 * states)]]
    trainables = Trainables(said, array("q", [word for row in rows for word in row]))
    first, second = trainables
    assert first == Trainable(
        "x", (3, 3), TensorPlace(7, 64), 9, tuple(TensorPlace(100 + 2 * i, 101 + 2 * i) for i in range(states))
    )
    assert (second.name, second.shape, second.value) == ("y", (2,), TensorPlace(6, -1))
    assert second.numbers == (6, 8, *(200 + 2 * i for i in range(states)))
    assert list(trainables.names) == ["x", "y"]


def test_a_job_without_any():
    nothing = {"names": "", "dtypes": [], "shapes": []}
    assert list(Weights(nothing, array("q"))) == []
    assert list(Trainables(nothing, array("q"))) == []


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Bytes by number of layers: what a loaded job holds, and what saving and resuming take for a moment, in Python's
    own memory.
    """
    return {layers: _held(layers, tmp_path_factory.mktemp(f"deep-{layers}")) for layers in LAYERS}


def _held(layers, folder):
    profile = decoder_profile(folder, config={**CONFIG, "num_hidden_layers": layers})
    records = random_records(folder, seq=profile.seq)
    plan = naive_plan(profile)

    def job(*arguments):
        """Read from a file, as the lean process does: nothing of the parent's own objects is shared."""
        made = compile_job(*arguments)
        made.write(str(folder / "job"))
        del made
        return Job.read(str(folder / "job"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("in_process.compile_job", job)
        gc.collect()
        tracemalloc.start()
        training = make_training(plan, records, folder, lr=1e-2)
    gc.collect()
    words = sum(len(part) * part.itemsize for part in (training.job.train, training.job.evaluate))
    loaded = tracemalloc.get_traced_memory()[0] - words
    training.initialise()
    (folder / "checkpoint").mkdir()
    state = {}

    def moment(call):
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        call()
        return tracemalloc.get_traced_memory()[1] - before

    saving = moment(lambda: state.update(training.save_state(str(folder / "checkpoint"))))
    resuming = moment(lambda: training.load_state(str(folder / "checkpoint"), state))
    tracemalloc.stop()
    training.close()
    return loaded, saving, resuming


@pytest.mark.slow
@pytest.mark.parametrize(("what", "most"), [(0, 10), (1, 6), (2, 8)], ids=["loaded", "saving", "resuming"])
def test_a_layer_more_takes_little_memory(held, what, most):
    """With JSON's own lists and a list of a file's tensors these were 50, 50 and 20 KiB for each layer."""
    few, many = LAYERS
    assert (held[many][what] - held[few][what]) / (many - few) < most * KIB
