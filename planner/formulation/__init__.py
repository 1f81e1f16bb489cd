"""THE model: variables, constraints and bounds of one layer and of the whole step; docs/formulation.md is its
mathematics.

May import: `planner.problem`, `planner.schedule`, `planner.solvers`.
"""
