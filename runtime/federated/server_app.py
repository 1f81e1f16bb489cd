"""The Flower app of the server: carries out the rounds that its settings ask for, and says how they ended.

The run's configuration names the settings, a JSON file of `RoundOptions`: ``settings = "/path/server.json"``.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from tightfit.planner.fleet.io import load_fleet, load_part_plan
from tightfit.planner.fleet.schema import FleetPlan
from tightfit.runtime.common.errors import RunError, TightfitError
from tightfit.runtime.common.files import write_whole
from tightfit.runtime.common.parent import end_with_parent
from tightfit.runtime.federated.flower_records import packed, unpacked
from tightfit.runtime.federated.messages import ANSWER, ORDER, OVER, Answer, Order
from tightfit.runtime.federated.options import RoundOptions
from tightfit.runtime.federated.rounds import Network, Reply, Rounds
from tightfit.runtime.federated.rounds_folder import FAILED, PID, REPORT, RoundsFolder

OVER_SECONDS, LOOK_SECONDS = 10.0, 0.5
"""for devices to hear that the rounds are over, at most, and between two looks at their answers"""
LATE_SECONDS = 60.0
"""after a round's time is up: until a message is forgotten; and for what an earlier server has left, until it has
ended
"""


class GridNetwork:
    """The devices as Flower's grid reaches them."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def nodes(self) -> set[int]:
        return set(self.grid.get_node_ids())

    def send(self, node: int, order: Order, adapter: bytes) -> str:
        content = packed(ORDER, order.words(), adapter)
        message = Message(content, node, "train", ttl=order.seconds + LATE_SECONDS, group_id=str(order.round))
        (sent,) = self.grid.push_messages([message])
        return str(sent)

    def replies(self, messages: Iterable[str]) -> list[Reply]:
        wanted = list(messages)
        return [self._reply(message) for message in self.grid.pull_messages(wanted)] if wanted else []

    def _reply(self, message: Message) -> Reply:
        to = str(message.metadata.reply_to_message_id)
        if message.has_error():
            return Reply(message=to, answer=None, error=f"{message.error.reason or message.error.code}")
        try:
            words, adapter = unpacked(ANSWER, message.content)
            return Reply(message=to, answer=Answer.of(words), adapter=adapter)
        except (KeyError, ValueError, TypeError) as error:
            return Reply(message=to, answer=None, error=f"its message is no answer: {error!r}")


def main(grid: Grid, context: Context) -> None:
    # Flower's own watch sends this process a SIGINT from another thread, which does not wake a thread that waits for a
    # lock.
    end_with_parent(signal.SIGKILL)
    settings = json.loads(Path(str(context.run_config["settings"])).read_text())
    options = RoundOptions.of(settings)
    folder = RoundsFolder(options.out)
    write_whole(folder.out / PID, f"{os.getpid()}\n")
    try:
        _alone(folder.out / "flower")
        fleet = load_fleet(options.fleet, in_rounds=True)
        network = GridNetwork(grid)
        saved = _rounds(fleet, options, network).run()
        tell_over(network)
    except Exception as error:
        if not isinstance(error, TightfitError):
            traceback.print_exc()
        text = str(error) if isinstance(error, TightfitError) else f"{type(error).__name__}: {error}"
        code = error.exit_code if isinstance(error, TightfitError) else 4
        write_whole(folder.out / FAILED, json.dumps({"message": text, "exit_code": code}) + "\n")
        raise
    report = {
        "rounds": folder.lines(),
        "adapter": str(folder.out / "adapter"),
        "planned_seconds": fleet.makespan_seconds,
        "round": saved.number,
    }
    write_whole(folder.out / REPORT, json.dumps(report, indent=1) + "\n")


def tell_over(network: Network, wait: Callable[[float], None] = time.sleep) -> None:
    """Tell the devices that are there that the rounds are over, and wait a little until they have heard of it."""
    order = Order(round=OVER, seconds=OVER_SECONDS)
    told = {network.send(node, order, b"") for node in sorted(network.nodes())}
    until = time.monotonic() + OVER_SECONDS
    while told and time.monotonic() < until:
        told -= {reply.message for reply in network.replies(sorted(told))}
        wait(LOOK_SECONDS)


def _rounds(fleet: FleetPlan, options: RoundOptions, network: Network) -> Rounds:
    plans = {part.plan: load_part_plan(options.fleet, part) for part in fleet.parts}
    return Rounds(fleet, plans, options, network, say=_say)


def _alone(directory: Path) -> None:
    """Wait until no rounds of an earlier server, which was killed a moment ago, are made here any more."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # held until this process ends
    limit = time.monotonic() + LATE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > limit:
                raise RunError(f"{directory}: another process makes rounds here; end it first") from None
            time.sleep(1.0)
        except OSError:
            return  # a file system without locks
        else:
            return


def _say(text: str) -> None:
    sys.stdout.write(f"tightfit: {text}\n")
    sys.stdout.flush()


app = ServerApp()
app.main()(main)
