"""Operators compiled into calls, and optimizers: what a step computes, the same for every device.

May import: `runtime.common`, `engine.device`.
"""
