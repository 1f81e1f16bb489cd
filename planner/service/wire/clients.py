"""Identifies clients: a client is an address, with the name that it gives itself there in the header ``Client-Id``.

An address cannot be chosen freely, so what one party may have at most is counted by network: an IPv4 address, the 64
bits of an IPv6 network, or this machine for all of its own addresses. A name tells apart those who share an address:
people of one machine, or of one office. The token is the same for all and tells nobody apart.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request

THIS_MACHINE = "this machine"
ClientId = Annotated[
    str | None,
    Header(
        alias="Client-Id",
        max_length=100,
        pattern=r"^[\x21-\x7e]+$",
        description="a name of your choice that tells you apart from others at your address, the same in all your requests;"
        " hard to guess, since whoever knows it can let go for you",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Requester:
    address: str
    """the peer's"""
    name: str = ""
    """what it calls itself; empty: nothing"""

    @property
    def network(self) -> str:
        return network_of(self.address)


def network_of(address: str) -> str:
    """The network by which the connections and jobs of an address are counted."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is None:
            return THIS_MACHINE if found.is_loopback else str(ipaddress.ip_network((found, 64), strict=False))
        found = found.ipv4_mapped
    return THIS_MACHINE if found.is_loopback else str(found)


def address_of(request: Request) -> str:
    return request.client.host if request.client else ""


def client_of(request: Request, name: ClientId = None) -> Requester:
    return Requester(address=address_of(request), name=name or "")


Asker = Annotated[Requester, Depends(client_of)]
"""of a route that asks for a job or lets one go"""
