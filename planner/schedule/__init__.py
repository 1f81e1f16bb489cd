"""Decisions carried out: instructions of every layer, joined over the step, transfers moved ahead, tensors placed in the arena.

May import: `planner.problem`, `planner.schema`.
"""
