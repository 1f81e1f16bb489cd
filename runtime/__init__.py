"""The runtime, which carries plans out: the engine of the training process, its supervisor, data, sessions, command
line.

Rooms, each of which imports only those before it: `common`, `engine`, `supervision`; then, above the profiles and the
planner, `data`, `session`, `results`, `federated`, `cli`.
"""
