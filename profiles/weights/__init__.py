"""Lists a model's tensors and the packed format of each, and packs them into a store file.

May import: `profiles.models`, `runtime.engine`.
"""
