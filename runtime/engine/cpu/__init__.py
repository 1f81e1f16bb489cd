"""The CPU as an `engine.device.Device`: an arena of host memory, and the fused operators that run on it.

A second back end is a folder like this one. May import: `runtime.common`, `engine.device`.
"""
