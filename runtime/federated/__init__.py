"""Federated rounds over Flower: the device's side, the server's side, and the processes of both.

May import the session and what it may. The device's side (`adapter_file`, `messages`, `device`, `fleet_api`, `node`)
lives beside a training process and counts against the device's budget: it imports the standard library, and of what is
installed protobuf and cryptography.
"""
