"""The planning problem made of a profile: the step as one graph of operators and storages, split into layers and layer
types.

May import: `planner.schema`, `profiles`.
"""
