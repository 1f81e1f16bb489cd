"""Answers of a decoder: a process that keeps to a plan of what stays in memory, with a cache of keys and values.

`child` is the process's entry. May import: `runtime.common` and every other room of the engine.
"""
