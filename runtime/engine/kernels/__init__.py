"""Operators as the engine executes them: fused ones of decoders, products, attention, optimizers, and programs compiled into calls.

May import: `runtime.common`, `engine.device`.
"""
