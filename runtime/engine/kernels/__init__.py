"""Programs compiled into calls, and optimizers: what a step computes, on whatever device.

May import: `runtime.common`, `engine.device`.
"""
