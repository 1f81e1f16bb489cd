"""Which tensors a model has, how each is packed, and packing them into a store file.

May import: `profiles.models`, `runtime.engine`.
"""
