"""A device's side of Flower's Fleet API, with little memory: its protobuf messages over the standard library's HTTP.

Flower's own client brings gRPC, FastAPI, SQLAlchemy and more into the process: a SuperNode, its SuperExec and a process
for each message hold about 390 MiB. What goes over the wire is small: eight kinds of requests, each a protobuf message
in a POST, signed with the node's key; and a message's content as a tree of objects, each named by the SHA-256 of its
bytes. This file speaks that, by the message definitions of the installed Flower, and refuses a Flower that it does not
know.

An object is the text ``Type child-ids length``, a zero byte, and its body: a `Message`'s metadata, the names and ids of
what a `RecordDict`, an `ArrayRecord` or an `Array` holds as JSON, a `ConfigRecord` as protobuf, an `ArrayChunk`'s
bytes.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import sys
import time
import types
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tightfit.runtime.common.errors import InputError, RunError
from tightfit.runtime.common.strict_json import from_json
from tightfit.runtime.federated.messages import ADAPTER, STYPE, Word

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

KNOWN = "1.42."
"""versions of Flower whose Fleet API is the one below"""
MEDIA = "application/protobuf"
TIMEOUT = 30.0
HEARTBEAT_SECONDS = 15.0
"""between signs of life; after two that are missing the SuperLink takes the node for gone"""
CHUNK_BYTES = 5 << 20
TRIES, TRY_SECONDS = 20, 0.5
"""to pull an object that its sender has not pushed yet"""
PACKAGES = ("fleet", "message", "heartbeat", "node", "recorddict")


class RefusedError(RunError):
    """The SuperLink's answer to a request that it does not carry out."""

    def __init__(self, path: str, status: int, text: str) -> None:
        super().__init__(f"the SuperLink refused {path} ({status}): {text[:300]}")
        self.status = status


class UnreachableError(RunError):
    """There is no SuperLink at the address now."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a SuperLink is, and how its certificate is checked."""

    host: str
    port: int
    tls: bool = True
    root_certificates: str | None = None
    """path of the certificates to trust; None: those of the system"""

    @classmethod
    def of(cls, address: str, *, tls: bool, root_certificates: str | None) -> Endpoint:
        host, colon, port = address.rpartition(":")
        if not colon or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise InputError(f"superlink {address!r}: give HOST:PORT, such as 192.168.0.10:9092")
        return cls(host=host.strip("[]"), port=int(port), tls=tls, root_certificates=root_certificates)

    def connect(self) -> HTTPConnection:
        if not self.tls:
            return HTTPConnection(self.host, self.port, timeout=TIMEOUT)
        import ssl

        try:
            context = ssl.create_default_context(cafile=self.root_certificates)
        except OSError as error:
            raise InputError(f"{self.root_certificates}: no certificates to trust ({error})") from error
        return HTTPSConnection(self.host, self.port, timeout=TIMEOUT, context=context)


def definitions() -> dict[str, Any]:
    """Flower's protobuf messages by module, imported without the package's own imports. Raises InputError where Flower
    is missing or another version.
    """
    spec = importlib.util.find_spec("flwr")
    if spec is None or spec.submodule_search_locations is None:
        raise InputError("Flower (flwr) is not installed; federated rounds need it: pip install 'tightfit[fleet]'")
    if not version("flwr").startswith(KNOWN):
        raise InputError(
            f"Flower {version('flwr')} is installed, and its Fleet API is known here for {KNOWN}x; install that version"
        )
    if "flwr" not in sys.modules:
        bare = types.ModuleType("flwr")
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules["flwr"] = bare
    return {name: importlib.import_module(f"flwr.proto.{name}_pb2") for name in PACKAGES}


class FleetApi:
    """A node of the SuperLink."""

    def __init__(self, endpoint: Endpoint, key: EllipticCurvePrivateKey | None) -> None:
        """`key`: the private key that the SuperLink knows the node by; None: one of its own, which it registers."""
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        self.endpoint = endpoint
        self.protos = definitions()
        self.registered = key is not None
        self.key = key or ec.generate_private_key(ec.SECP384R1())
        self.public = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        self.node: Any = None

    # --- requests ---------------------------------------------------------------------------------------------------

    def _ask(self, path: str, request: Any, response: Any) -> Any:
        """The answer to a request. Raises RefusedError, or UnreachableError."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        now = datetime.now(UTC).isoformat()
        headers = {
            "content-type": MEDIA,
            "accept": MEDIA,
            "flwr-package-name": "flwr",
            "flwr-package-version": version("flwr"),
            "flwr-component-name": "SuperNode",
            "flwr-public-key": b64encode(self.public).decode(),
            "flwr-timestamp": now,
            "flwr-signature": b64encode(self.key.sign(now.encode(), ec.ECDSA(hashes.SHA256()))).decode(),
        }
        connection = self.endpoint.connect()
        try:
            connection.request("POST", f"/v1/fleet/{path}", request.SerializeToString(deterministic=True), headers)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, HTTPException) as error:
            raise UnreachableError(
                f"{self.endpoint.host}:{self.endpoint.port}: no SuperLink answers ({error}); see that it runs and can"
                " be reached"
            ) from error
        finally:
            connection.close()
        if answer.status != 200:
            raise RefusedError(path, answer.status, content.decode(errors="replace"))
        result = response()
        result.ParseFromString(content)
        return result

    def join(self) -> None:
        """Become a node that can be asked."""
        fleet = self.protos["fleet"]
        if not self.registered:
            self._ask(
                "register-node", fleet.RegisterNodeFleetRequest(public_key=self.public), fleet.RegisterNodeFleetResponse
            )
        request = fleet.ActivateNodeRequest(public_key=self.public, heartbeat_interval=HEARTBEAT_SECONDS)
        answer = self._ask("activate-node", request, fleet.ActivateNodeResponse)
        self.node = self.protos["node"].Node(node_id=answer.node_id)

    def leave(self) -> None:
        fleet = self.protos["fleet"]
        identity = {"node_id": self.node.node_id}
        self._ask("deactivate-node", fleet.DeactivateNodeRequest(**identity), fleet.DeactivateNodeResponse)
        if not self.registered:
            self._ask(
                "unregister-node", fleet.UnregisterNodeFleetRequest(**identity), fleet.UnregisterNodeFleetResponse
            )

    def alive(self) -> bool:
        """Give a sign of life; whether the SuperLink knows the node."""
        heartbeat = self.protos["heartbeat"]
        request = heartbeat.SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_SECONDS)
        return bool(self._ask("send-node-heartbeat", request, heartbeat.SendNodeHeartbeatResponse).success)

    def message(self) -> ReceivedMessage | None:
        """The next message for this node, if there is one."""
        fleet = self.protos["fleet"]
        answer = self._ask("pull-messages", fleet.PullMessagesRequest(node=self.node), fleet.PullMessagesResponse)
        if not answer.messages_list:
            return None
        return ReceivedMessage(self, answer.messages_list[0].metadata, answer.message_object_trees[0])

    # --- objects ----------------------------------------------------------------------------------------------------

    def pull(self, run: int, name: str) -> tuple[list[str], bytes]:
        """An object's children and body."""
        message = self.protos["message"]
        for _ in range(TRIES):
            request = message.PullObjectRequest(node=self.node, run_id=run, object_id=name)
            answer = self._ask("pull-object", request, message.PullObjectResponse)
            if not answer.object_found:
                break
            if answer.object_available:
                head, _, body = answer.object_content.partition(b"\0")
                children = head.decode().split(" ")[1]
                return children.split(",") if children else [], body
            time.sleep(TRY_SECONDS)
        raise RunError(f"object {name[:12]}… of a message is not there")

    def push(self, incoming: ReceivedMessage, name: str, words: Mapping[str, Word], adapter: bytes) -> None:
        """Reply to a message, with words under `name` and the file of an adapter."""
        message = self.protos["message"]
        objects, tree = packed(self.protos, incoming.reply(), name, words, adapter)
        request = self.protos["fleet"].PushMessagesRequest(
            node=self.node,
            messages_list=[
                message.Message(metadata=incoming.reply(tree.object_id), content=self.protos["recorddict"].RecordDict())
            ],
            message_object_trees=[tree],
            clientapp_runtime_list=[time.time() - incoming.came],
        )
        answer = self._ask("push-messages", request, self.protos["fleet"].PushMessagesResponse)
        wanted = set(answer.objects_to_push)
        for key, content in objects.items():
            if key in wanted:
                pushed = message.PushObjectRequest(
                    node=self.node,
                    run_id=incoming.run,
                    object_id=key,
                    object_content=content(),
                    session_id=answer.session_id,
                )
                if not self._ask("push-object", pushed, message.PushObjectResponse).stored:
                    raise RunError(f"the SuperLink did not take object {key[:12]}… of the answer")


class ReceivedMessage:
    """A message that has come, its content still on the SuperLink."""

    def __init__(self, api: FleetApi, metadata: Any, tree: Any) -> None:
        self.api, self.metadata, self.tree = api, metadata, tree
        self.run = metadata.run_id
        self.came = time.time()
        _, body = api.pull(self.run, self._only(tree).object_id)
        self.records: dict[str, str] = from_json(body)
        """ids of the content's records by name"""

    @staticmethod
    def _only(tree: Any) -> Any:
        (content,) = tree.children
        return content

    def words(self, name: str) -> dict[str, Word]:
        """The words under `name`."""
        _, body = self.api.pull(self.run, self.records[name])
        record = self.api.protos["recorddict"].ConfigRecord()
        record.ParseFromString(body)
        return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in record.items}

    def adapter(self) -> bytes:
        """The file of the adapter; afterwards the SuperLink may forget the message."""
        _, body = self.api.pull(self.run, self.records[ADAPTER])
        children, body = self.api.pull(self.run, from_json(body)[ADAPTER])
        content = bytearray()
        for number in from_json(body)["arraychunk_ids"]:
            content += self.api.pull(self.run, children[number])[1]
        self.confirm()
        return bytes(content)

    def confirm(self) -> None:
        message = self.api.protos["message"]
        request = message.ConfirmMessageReceivedRequest(
            node=self.api.node, run_id=self.run, message_object_id=self.metadata.message_id
        )
        self.api._ask("confirm-message-received", request, message.ConfirmMessageReceivedResponse)

    def reply(self, name: str = "") -> Any:
        """The metadata of a reply, whose id is `name`."""
        asked = self.metadata
        return self.api.protos["message"].Metadata(
            run_id=asked.run_id,
            message_id=name,
            src_node_id=asked.dst_node_id,
            dst_node_id=asked.src_node_id,
            reply_to_message_id=asked.message_id,
            group_id=asked.group_id,
            ttl=asked.ttl - (self.came - asked.created_at),
            message_type=asked.message_type,
            created_at=self.came,
        )


def packed(
    protos: Mapping[str, Any], metadata: Any, name: str, words: Mapping[str, Word], adapter: bytes
) -> tuple[dict[str, Callable[[], bytes]], Any]:
    """A message as objects by id, children before parents, and the tree of the ids."""
    tree_of = protos["message"].ObjectTree
    objects: dict[str, Callable[[], bytes]] = {}

    def made(kind: str, children: list[Any], body: bytes | memoryview) -> Any:
        ids = ",".join(dict.fromkeys(child.object_id for child in children))
        head = f"{kind} {ids} {len(body)}".encode() + b"\0"
        digest = hashlib.sha256(head)
        digest.update(body)
        key = digest.hexdigest()
        objects[key] = lambda: head + bytes(body)
        return tree_of(object_id=key, children=list({child.object_id: child for child in children}.values()))

    view = memoryview(adapter)
    chunks = [made("ArrayChunk", [], view[at : at + CHUNK_BYTES]) for at in range(0, len(adapter), CHUNK_BYTES)]
    unique = list(dict.fromkeys(chunk.object_id for chunk in chunks))
    array = {
        "dtype": "uint8",
        "shape": [len(adapter)],
        "stype": STYPE,
        "arraychunk_ids": [unique.index(chunk.object_id) for chunk in chunks],
    }
    file = made("Array", chunks, json.dumps(array).encode())
    arrays = made("ArrayRecord", [file], json.dumps({ADAPTER: file.object_id}).encode())
    config = made("ConfigRecord", [], _config(protos["recorddict"], words))
    content = made(
        "RecordDict", [config, arrays], json.dumps({name: config.object_id, ADAPTER: arrays.object_id}).encode()
    )
    body = protos["message"].Message(metadata=metadata).SerializeToString(deterministic=True)
    return objects, made("Message", [content], body)


def _config(recorddict: Any, words: Mapping[str, Word]) -> bytes:
    kinds = {bool: "bool", int: "sint64", float: "double", str: "string"}
    items = [
        recorddict.ConfigRecord.Item(key=key, value=recorddict.ConfigRecordValue(**{kinds[type(value)]: value}))
        for key, value in words.items()
    ]
    serialised: bytes = recorddict.ConfigRecord(items=items).SerializeToString()
    return serialised


def private_key(path: str | os.PathLike[str]) -> EllipticCurvePrivateKey:
    """The node's private key, as ``ssh-keygen -t ecdsa`` writes it. Raises InputError for anything else."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        with open(path, "rb") as file:
            key = load_ssh_private_key(file.read(), None)
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; give the private key that the SuperLink knows this device by"
        ) from error
    except Exception as error:  # of several kinds, by what is wrong
        raise InputError(f"{path}: no private key ({error}); make one with ssh-keygen -t ecdsa -b 384") from error
    if not isinstance(key, EllipticCurvePrivateKey):
        raise InputError(f"{path}: no key on an elliptic curve; make one with ssh-keygen -t ecdsa -b 384")
    return key
