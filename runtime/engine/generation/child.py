"""Entry point of the process that generates: it keeps to its job under the cap and answers requests.

    python -m tightfit.runtime.engine.generation.child JOB --messages FD --requests FD

It reads requests, one JSON object per line, and sends messages in the same form. A request has `ids` (the tokens of the
prompt), `max_tokens`, `ends` (tokens that end an answer), `sampling` (the fields of a `Sampling`) and `number` (by
which the answers of one seed differ). With `keep` the tokens that the request shares with the cache from the start on
are not computed again. SIGINT ends the present answer, SIGTERM the process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from tightfit.runtime.common.errors import CapError, TightfitError
from tightfit.runtime.common.files import write_all
from tightfit.runtime.common.option_names import in_python, named_as, on_command_line
from tightfit.runtime.common.parent import end_with_parent
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.start import lean_torch
from tightfit.runtime.engine.start.process import leave

if TYPE_CHECKING:
    from tightfit.runtime.engine.generation.cached_decoder import CachedDecoder

Send = Callable[..., None]
LINE_BYTES = 1 << 16


class Signals:
    """What was asked for: `answer` that the present answer ends, `process` that all ends."""

    def __init__(self) -> None:
        self.answer = self.process = False

    def take(self, number: int, frame: Any = None) -> None:
        self.answer = True
        self.process = self.process or number != signal.SIGINT

    @property
    def seen(self) -> bool:
        return self.answer


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tightfit.runtime.engine.generation.child")
    parser.add_argument("job")
    parser.add_argument("--messages", type=int, required=True)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--on-command-line", action="store_true", help="messages are for somebody there")
    options = parser.parse_args(arguments)
    signals = Signals()

    def send(event: str, **content: Any) -> None:
        try:
            write_all(options.messages, json.dumps({"event": event, **content}).encode() + b"\n")
        except BrokenPipeError:
            signals.take(signal.SIGTERM)

    naming = on_command_line if options.on_command_line else in_python
    try:
        lean_torch.load()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signals.take)
        end_with_parent(signal.SIGTERM)
        with named_as(naming):
            return run_job(options.job, options.requests, send, signals)
    except TightfitError as error:
        code, kind, text = error.exit_code, type(error).__name__, str(error)
        if isinstance(error, CapError):  # the meter's advice is for training
            text = f"{text.partition(';')[0]}; measure again with {naming('force', True)}"
    except MemoryError as error:
        code, kind, text = CapError.exit_code, "CapError", f"memory could not be had: {error}"
    except Exception as error:
        import traceback

        traceback.print_exc()
        code, kind, text = 4, "RunError", f"the answer failed: {type(error).__name__}: {error}"
    send("error", kind=kind, message=text, peak_bytes=memory().peak)
    return code


def run_job(path: str, requests: int | None, send: Send, signals: Signals) -> int:
    from tightfit.runtime.engine.generation.decoder import open_decoder
    from tightfit.runtime.engine.generation.job import GenerationJob
    from tightfit.runtime.engine.start.kernel_warmup import prepare, settle
    from tightfit.runtime.engine.training.devices import open_device
    from tightfit.runtime.engine.weights.store import WeightStore

    channel = prepare()
    start_bytes = memory().peak
    job = GenerationJob.read(path)
    begun = time.perf_counter()
    device = open_device(vars(job))
    store = WeightStore.open(job.store)
    decoder = open_decoder(job, device, store, channel)
    settle()
    if job.measure:
        from tightfit.runtime.engine.generation.measuring import measure

        send("measured", start_bytes=start_bytes, **measure(decoder, start_bytes))
        return 0
    send("loaded", seconds=time.perf_counter() - begun, spill_bytes=0, peak_bytes=memory().peak)
    assert requests is not None
    held: list[int] = []
    for request in _read(requests):
        signals.answer = signals.process
        if signals.process:
            break
        answer(decoder, request, held, send, signals)
    if signals.process:
        send("interrupted", step=0, checkpoint=None, peak_bytes=memory().peak)
    send("done", peaks={}, peak_bytes=decoder.device.meter.check_peak())
    return 0


def answer(decoder: CachedDecoder, request: dict[str, Any], held: list[int], send: Send, signals: Signals) -> None:
    """Answer a request; `held` are the tokens in the cache, and are kept so."""
    from tightfit.runtime.engine.generation.job import Sampling
    from tightfit.runtime.engine.generation.sampling import Sampler

    ids: list[int] = request["ids"]
    sampler = Sampler(Sampling(**request["sampling"]), request["number"])
    shared = 0
    if request["keep"]:
        while shared < min(len(held), len(ids) - 1) and held[shared] == ids[shared]:
            shared += 1
    shared = decoder.return_to(min(shared, decoder.length))
    del held[shared:]
    new, meter, ends = ids[shared:], decoder.device.meter, frozenset(request["ends"])
    layers = 0

    def between() -> None:
        nonlocal layers
        meter.check(layers)
        layers += 1

    begun = time.perf_counter()
    told, first, why = 0, 0.0, "length"
    while told < request["max_tokens"]:
        token = sampler.choose(decoder.run(new, between))
        held.extend(new)
        new = [token]
        first = first or time.perf_counter() - begun
        told += 1
        send("token", id=token, peak_bytes=memory().peak)
        if token in ends:
            why = "end"
            break
        if signals.seen:
            why = "interrupted"
            break
    send(
        "answered",
        why=why,
        prompt_tokens=len(ids),
        reused_tokens=shared,
        tokens=told,
        first_seconds=first,
        seconds=time.perf_counter() - begun,
        peak_bytes=memory().peak,
    )


def _read(descriptor: int) -> Iterator[dict[str, Any]]:
    """The requests, until the other end is closed."""
    buffer = b""
    while data := os.read(descriptor, LINE_BYTES):
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            yield json.loads(line)


if __name__ == "__main__":
    leave(partial(main, sys.argv[1:]))
