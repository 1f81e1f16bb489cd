import resource
import weakref

import pytest
import torch

from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.engine.training.batches import (
    HEADER_BYTES,
    TensorBatches,
    open_batches,
    write_batches,
)
from tightfit.runtime.engine.training.records import IGNORED, RecordFile, RecordWriter


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 4, generator=generator), torch.randint(0, 9, (2,), generator=generator)


@pytest.fixture
def path(tmp_path):
    return write_batches(str(tmp_path / "x.batches"), [batch(0), batch(1)])


def empty():
    return [torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64)]


def test_batches_come_back_in_turn(path):
    opened = open_batches(path, 0)
    assert isinstance(opened, TensorBatches)
    for step in range(5):
        inputs = empty()
        opened.training(step, inputs)
        for found, expected in zip(inputs, batch(step % 2), strict=True):
            assert torch.equal(found, expected)
    assert opened.evaluation_count(empty()) == 2
    for number in (1, 0):
        inputs = empty()
        assert opened.evaluation(number, inputs) == []
        assert all(torch.equal(found, expected) for found, expected in zip(inputs, batch(number), strict=True))
    opened.close()


def test_what_is_turned_is_written_as_it_reads(tmp_path):
    turned = [torch.arange(12).view(3, 4).t(), torch.arange(8)[::2]]
    opened = open_batches(write_batches(str(tmp_path / "x"), [turned]), 0)
    inputs = [torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)]
    opened.training(0, inputs)
    opened.close()
    assert all(torch.equal(found, expected) for found, expected in zip(inputs, turned, strict=True))


def test_a_tensor_of_nothing_is_no_damage(tmp_path):
    opened = open_batches(write_batches(str(tmp_path / "x"), [[torch.ones(2), torch.zeros(0, 3), torch.ones(2)]]), 0)
    inputs = [torch.zeros(2), torch.zeros(0, 3), torch.zeros(2)]
    opened.training(0, inputs)
    assert inputs[2].tolist() == [1.0, 1.0]
    opened.close()


def test_damage_and_truncation_are_found(path, tmp_path):
    data = bytearray((tmp_path / "x.batches").read_bytes())
    data[HEADER_BYTES + 3] ^= 1
    (tmp_path / "x.batches").write_bytes(data)
    opened = open_batches(path, 0)
    with pytest.raises(InputError, match="batch 0 is damaged"):
        opened.training(0, empty())
    opened.close()
    (tmp_path / "x.batches").write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"bytes where .* are expected"):
        open_batches(path, 0)


def test_batches_of_two_shapes_are_refused(tmp_path):
    with pytest.raises(InputError, match="batch 1 has tensors"):
        write_batches(str(tmp_path / "x"), [batch(0), batch(1)[:1]])
    with pytest.raises(InputError, match="no batch to train on"):
        write_batches(str(tmp_path / "x"), [])


def test_as_many_batches_as_there_are_one_at_a_time(tmp_path):
    """More than a header could list; none is held once it is written."""
    seen = []

    def made():
        for number in range(7000):
            alive = sum(one() is not None for one in seen[-3:])
            assert alive <= 1, number  # at most the one that has just been written
            tensor = torch.full((2,), float(number))
            seen.append(weakref.ref(tensor))
            yield [tensor]

    opened = open_batches(write_batches(str(tmp_path / "x"), made()), 0)
    inputs = [torch.zeros(2)]
    for step in (0, 6999, 7000):
        opened.training(step, inputs)
        assert inputs[0].tolist() == [float(step % 7000)] * 2
    opened.close()


def test_what_makes_batches_fails_in_its_own_words_and_leaves_nothing(tmp_path):
    def made():
        yield batch(0)
        raise FileNotFoundError("no such image")

    with pytest.raises(FileNotFoundError, match="no such image"):
        write_batches(str(tmp_path / "x"), made())
    assert not list(tmp_path.iterdir())


def test_a_disk_that_takes_no_more_is_named_and_nothing_is_left(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HEADER_BYTES + 100, before[1]))
    try:
        with pytest.raises(RunError, match=r"x: File too large; free some space"):
            write_batches(str(tmp_path / "x"), [batch(0), batch(1)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_batch_file_of_another_version_is_refused(path, tmp_path):
    data = (tmp_path / "x.batches").read_bytes()
    (tmp_path / "x.batches").write_bytes(data.replace(b'"version": 2', b'"version": 1', 1))
    with pytest.raises(InputError, match="not a batch file of this version"):
        open_batches(path, 0)


def test_equal_batches_have_equal_fingerprints(tmp_path, path):
    again = open_batches(write_batches(str(tmp_path / "y"), [batch(0), batch(1)]), 0)
    other = open_batches(write_batches(str(tmp_path / "z"), [batch(0), batch(2)]), 0)
    first = open_batches(path, 0)
    flat = open_batches(write_batches(str(tmp_path / "f"), [[x.view(-1), y] for x, y in (batch(0), batch(1))]), 0)
    assert first.fingerprint == again.fingerprint
    assert len({opened.fingerprint for opened in (first, other, flat)}) == 3
    for opened in (again, other, first, flat):
        opened.close()


def test_token_records_are_recognised(tmp_path):
    target = tmp_path / "t.records"
    with RecordWriter(target, seq=4, pad_token=0, vocab_size=10, source="test") as writer:
        writer.add([1, 2, 3], [2, 3, 4], example=0)
    opened = open_batches(str(target), 0)
    ids, labels = torch.full((2, 4), 9), torch.full((2, 4), 9)
    opened.training(0, [ids, labels])
    assert ids.tolist() == [[1, 2, 3, 0]] * 2
    assert labels.tolist() == [[2, 3, 4, -100]] * 2
    assert opened.evaluation_count([ids]) == 1
    opened.close()
    with pytest.raises(InputError, match="No such file"):
        open_batches(str(tmp_path / "missing"), 0)


# --- batches of samples of like lengths -------------------------------------------------------------------------------

SEQ = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


def written(folder, lengths):
    """Records of these lengths; sample i has the tokens i + 1, and labels but for its first place."""
    target = folder / "t.records"
    with RecordWriter(target, seq=SEQ, pad_token=0, vocab_size=999, source="test") as writer:
        for sample, length in enumerate(lengths):
            tokens = [sample + 1] * length
            writer.add(tokens, [IGNORED, *tokens[1:]], example=sample)
    return str(target)


def inputs_of(rows, length, count=3):
    """Tensors of a batch, with what no batch leaves there."""
    return [torch.full((rows, length), -7) for _ in range(count)]


def test_a_sample_that_has_no_room_is_refused(folder):
    path = written(folder, [3, 12, 5])
    with RecordFile.open(path) as file:
        for rows, place in (([[1]], 0), ([[2, 0], [0, 2]], 5)):
            fits = sum(file.length(index) for index in rows[0])
            file.fill_rows(rows, *inputs_of(2, fits))
            with pytest.raises(
                ValueError,
                match=rf"record \d, of \d+ positions, does not fit a batch of shape \[2, {fits - 1}\] from place {place} on",
            ):
                file.fill_rows(rows, *inputs_of(2, fits - 1))
        file.fill([0, 2], *inputs_of(2, 5))
        with pytest.raises(
            ValueError, match=r"record 2, of 5 positions, does not fit a batch of shape \[2, 4\] from place 0 on"
        ):
            file.fill([0, 2], *inputs_of(2, 4))
        with pytest.raises(ValueError, match=r"3 records do not fit a batch of shape \[2, 12\]"):
            file.fill([0, 1, 2], *inputs_of(2, 12))
