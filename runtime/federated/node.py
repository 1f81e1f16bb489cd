"""The process of a device that takes part in federated rounds: one node of a SuperLink, which carries out its orders.

    python -m tightfit.runtime.federated.node DEVICE.json --superlink HOST:PORT [--insecure | --root-certificates FILE]

It stands in for Flower's SuperNode, SuperExec and ClientApp. Between rounds and while a run trains it gives signs of
life; a SuperLink that is gone, or has forgotten the node, is looked for until it is there again; one that does not know
its key ends it after a minute, and so does the word that the rounds are over. It runs the code of the installed
tightfit and nothing that the server sends. SIGTERM and SIGINT end it, and a run that is under way.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType

from tightfit.runtime.common.errors import InputError, RunError, TightfitError
from tightfit.runtime.federated.device import DeviceSettings, take_part
from tightfit.runtime.federated.fleet_api import (
    HEARTBEAT_SECONDS,
    Endpoint,
    FleetApi,
    ReceivedMessage,
    RefusedError,
    UnreachableError,
    private_key,
)
from tightfit.runtime.federated.messages import ANSWER, HELLO, ORDER, OVER, Answer, Order

POLL_SECONDS = 2.0
AGAIN_SECONDS, LONGEST_SECONDS = 1.0, 30.0
"""between two looks for a SuperLink that is gone: at first, and later"""
FORGOTTEN = (401, 403, 404)
"""what a SuperLink says that does not know the node"""
STRANGE = (*FORGOTTEN, 412)
"""what it says to a node that wants to join with a key that it does not know"""
STRANGE_SECONDS = 60.0
"""for which a server that has just started may not have learned the devices' keys yet"""


class Node:
    def __init__(self, device: DeviceSettings, api: FleetApi) -> None:
        self.device, self.api = device, api
        self.joined = threading.Event()
        self.waits = AGAIN_SECONDS
        self.strange_since: float | None = None
        """when the server first refused to let this device join, since it was last joined"""
        threading.Thread(target=self._live, daemon=True).start()

    def serve(self) -> None:
        """Carry out orders, until a signal raises SystemExit."""
        try:
            while True:
                self._once()
        finally:
            if self.joined.is_set():
                with suppress(RunError):
                    self.api.leave()

    def _once(self) -> None:
        try:
            if not self.joined.is_set():
                self.api.join()
                self.joined.set()
                self.waits, self.strange_since = AGAIN_SECONDS, None
                _say(f"{self.device.member}: ready at {self.api.endpoint.host}:{self.api.endpoint.port}")
            incoming = self.api.message()
            if incoming is None:
                time.sleep(POLL_SECONDS)
                return
            self._carry_out(incoming)
        except UnreachableError as error:
            if self.strange_since is not None:  # it was there, and did not know this device
                self._unknown()
            else:
                _say(f"{error}; looking again in {self.waits:.0f} s")
            self._later()
        except RefusedError as error:
            if error.status in STRANGE and not self.joined.is_set():
                self._unknown()
            else:
                _say(str(error))
            if error.status in FORGOTTEN:
                self.joined.clear()
            self._later()
        except RunError as error:
            _say(str(error))
            self._later()

    def _unknown(self) -> None:
        """The server does not let this device join. Raises InputError where it has had time to learn its key."""
        place = f"the server at {self.api.endpoint.host}:{self.api.endpoint.port}"
        what = f"{place} does not know the key of this device; start it with --device-key and this one's public key"
        if not self.api.registered:
            what = f"{place} lets in devices whose keys it knows alone; give --private-key"
        now = time.monotonic()
        self.strange_since = self.strange_since or now
        if now - self.strange_since > STRANGE_SECONDS:
            raise InputError(what)
        _say(
            f"{what}; asking for {STRANGE_SECONDS - now + self.strange_since:.0f} s more, since it may have just"
            " started"
        )

    def _later(self) -> None:
        time.sleep(self.waits)
        self.waits = min(2 * self.waits, LONGEST_SECONDS)

    def _carry_out(self, incoming: ReceivedMessage) -> None:
        try:
            order = Order.of(incoming.words(ORDER))
        except (KeyError, ValueError, TypeError) as error:
            incoming.confirm()
            refused = Answer(round=0, member=self.device.member, error=f"no order that is known here ({error!r})")
            self.api.push(incoming, ANSWER, refused.words(), b"")
            return
        if order.round == OVER:
            incoming.confirm()
            with suppress(RunError):  # nobody waits for the answer any longer
                self.api.push(incoming, ANSWER, Answer(round=OVER, member=self.device.member).words(), b"")
            _say(f"{self.device.member}: the rounds are over")
            raise SystemExit(0)
        if order.round != HELLO:
            _say(f"{self.device.member}: round {order.round}, {order.steps_of(self.device.member)} steps")
        until = time.monotonic() + order.seconds
        answer, trained = take_part(self.device, order, incoming.adapter)
        if order.round != HELLO or answer.error:
            _say(f"{self.device.member}: {answer.error or f'loss {answer.loss:.4f}, {answer.seconds:.1f} s'}")
        while True:
            try:
                self.api.push(incoming, ANSWER, answer.words(), trained)
                return
            except UnreachableError:
                if time.monotonic() > until:
                    raise
                self._later()

    def _live(self) -> None:
        """Give signs of life while the node is known."""
        while True:
            time.sleep(HEARTBEAT_SECONDS / 2)
            if self.joined.is_set():
                try:
                    known = self.api.alive()
                except RefusedError as error:
                    known = error.status not in FORGOTTEN
                except RunError:
                    continue
                if not known:
                    self.joined.clear()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tightfit.runtime.federated.node")
    parser.add_argument("device")
    parser.add_argument("--superlink", required=True)
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--root-certificates")
    parser.add_argument("--private-key")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _asked_to_end)
    try:
        endpoint = Endpoint.of(options.superlink, tls=not options.insecure, root_certificates=options.root_certificates)
        key = private_key(options.private_key) if options.private_key else None
        Node(DeviceSettings.read(options.device), FleetApi(endpoint, key)).serve()
    except TightfitError as error:
        sys.stderr.write(f"tightfit: {error}\n")
        return error.exit_code
    return 0


def _asked_to_end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _say(text: str) -> None:
    sys.stderr.write(f"tightfit: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
