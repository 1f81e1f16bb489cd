"""Turns decisions into a schedule: each layer's instructions, joined over the step, transfers moved, tensors placed in
one arena.

May import: `planner.problem`, `planner.schema`.
"""
