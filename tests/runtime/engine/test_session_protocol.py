"""What a loop of one's own asks, through a pipe that takes less than a batch at a time."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from tightfit.runtime.engine.training.session_protocol import EVALUATE, FINISH, STEP, Gone, Request, Requests, ask


def test_what_is_asked_arrives_as_it_was_asked() -> None:
    """Also the rate 0, a tensor of nothing, and more than the pipe holds."""
    read, write = os.pipe()
    sent = [torch.arange(200_000, dtype=torch.int64), torch.zeros(0, 3), torch.tensor([1.5, -2.0])]

    def asking() -> None:
        ask(write, STEP, 0.0, sent)
        ask(write, STEP, 3e-4, sent)
        ask(write, EVALUATE, None, sent)
        ask(write, FINISH)
        os.close(write)

    loop = threading.Thread(target=asking)
    loop.start()
    requests = Requests(read)
    for asked in (
        Request(kind=STEP, lr=0.0),
        Request(kind=STEP, lr=3e-4),
        Request(kind=EVALUATE, lr=None),
    ):
        assert requests.next() == asked
        got = [torch.ones_like(tensor) for tensor in sent]
        requests.training(0, got)
        assert all(torch.equal(one, other) for one, other in zip(got, sent, strict=True))
    assert requests.next() == Request(kind=FINISH, lr=None)
    assert requests.next() is None
    loop.join()
    requests.close()


@pytest.mark.parametrize("stopped", [False, True])
def test_half_of_a_batch_is_none(stopped: bool) -> None:
    """Whoever asks is gone, or is there and the run is to stop."""
    read, write = os.pipe()
    ask(write, STEP, None, [torch.ones(3)])
    requests = Requests(read)
    assert requests.next() == Request(kind=STEP, lr=None)
    if stopped:
        looks = iter([False, False, True])  # once with something to read, once in vain
        requests.stopping = lambda: next(looks)
    else:
        os.close(write)
    with pytest.raises(Gone):
        requests.training(0, [torch.zeros(4)])
    if stopped:
        os.close(write)
    requests.close()
