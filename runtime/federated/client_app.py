"""The Flower app of a device that runs Flower's own SuperNode: carries out orders as `device` does.

`tightfit fleet federate join` needs neither this nor the processes that run it; see `node`.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from tightfit.runtime.federated.device import DeviceSettings, take_part
from tightfit.runtime.federated.flower_records import packed, unpacked
from tightfit.runtime.federated.messages import ANSWER, ORDER, Order


def train(message: Message, context: Context) -> Message:
    """Take part in a round. The SuperNode's configuration names the device's settings: `device="/path/device.json"`."""
    device = DeviceSettings.read(str(context.node_config["device"]))
    words, adapter = unpacked(ORDER, message.content)
    answer, trained = take_part(device, Order.of(words), lambda: adapter)
    return Message(packed(ANSWER, answer.words(), trained), reply_to=message)


app = ClientApp()
app.train()(train)
