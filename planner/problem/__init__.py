"""A profile as the planner sees it: the step as one graph of operators and storages, split into layers and layer types.

May import: `planner.schema`, `profiles`.
"""
