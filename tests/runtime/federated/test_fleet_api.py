"""What a device says over Flower's Fleet API, against Flower's own classes; needs Flower."""

import json
import os
import subprocess
import sys

import pytest
from federated_fleets import needs_flower

from tightfit.runtime.common import interpreter
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.federated.fleet_api import CHUNK_BYTES, Endpoint, packed, private_key
from tightfit.runtime.federated.messages import ANSWER, Answer


@needs_flower
@pytest.mark.parametrize("size", [0, 1, 1000, CHUNK_BYTES, 2 * CHUNK_BYTES + 17])
def test_a_message_is_the_one_that_flower_makes(size):
    """The same objects under the same ids, and Flower reads them."""
    import flwr.proto.message_pb2 as message
    import flwr.proto.recorddict_pb2 as recorddict
    from flwr.app.message import Message, RecordDict
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    from tightfit.runtime.federated.flower_records import packed as flowers
    from tightfit.runtime.federated.flower_records import unpacked

    words = Answer(round=2, member="a", tokens=5, loss=-0.25, steps=1 << 40).words()
    adapter = bytes(range(256)) * (size // 256) + bytes(size % 256)
    metadata = message.Metadata(
        run_id=7, src_node_id=1, dst_node_id=2, reply_to_message_id="x", group_id="2", ttl=60.0, message_type="train",
        created_at=1.0,
    )  # fmt: skip
    objects, tree = packed({"message": message, "recorddict": recorddict}, metadata, ANSWER, words, adapter)
    contents = {name: content() for name, content in objects.items()}
    (content,) = tree.children
    assert content.object_id == flowers(ANSWER, words, adapter).object_id
    read = inflate_object_from_contents(tree.object_id, dict(contents))
    assert isinstance(read, Message)
    assert isinstance(read.content, RecordDict)
    assert unpacked(ANSWER, read.content) == (words, adapter)
    assert read.metadata.run_id == 7
    assert read.metadata.reply_to_message_id == "x"


@needs_flower
def test_the_definitions_come_without_the_rest_of_flower():
    script = (
        "import json, sys\n"
        "from tightfit.runtime.federated.fleet_api import FleetApi, Endpoint\n"
        "api = FleetApi(Endpoint.of('127.0.0.1:1', tls=False, root_certificates=None), None)\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": interpreter.python_path()},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(json.loads(told.stdout))
    assert "flwr.proto.fleet_pb2" in loaded
    assert not {"grpc", "numpy", "fastapi", "sqlalchemy", "httpx", "flwr.common", "pydantic", "torch"} & loaded


@pytest.mark.parametrize("address", ["here", "here:", ":9092", "here:0", "here:70000", "here:x"])
def test_an_address_has_a_host_and_a_port(address):
    with pytest.raises(InputError, match=r"give HOST:PORT"):
        Endpoint.of(address, tls=True, root_certificates=None)


def test_an_address_is_read():
    assert Endpoint.of("[::1]:9092", tls=False, root_certificates=None).host == "::1"


@needs_flower
def test_other_keys_are_refused(tmp_path):
    with pytest.raises(InputError, match="No such file or directory; give the private key"):
        private_key(tmp_path / "none")
    (tmp_path / "key").write_text("no key")
    with pytest.raises(InputError, match=r"no private key .*ssh-keygen -t ecdsa"):
        private_key(tmp_path / "key")
