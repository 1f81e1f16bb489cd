"""Runs a plan for a caller: checks it, locks the output folder, prepares the job and starts the training process.

`launch` runs a plan to its end, `session` one step at a time. May import everything but `results`, `federated`, `cli`
and the service.
"""
