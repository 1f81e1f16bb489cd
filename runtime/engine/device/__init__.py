"""The memory that a plan is about: one arena, the channel to the disk, the file of offloaded tensors, the meter.

May import: `runtime.common`.
"""
