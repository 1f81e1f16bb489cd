"""The search at a budget: columns priced, a master over the step, rounding, and the smallest budget that has a plan.

May import: `planner.formulation`, `planner.schedule`, `planner.problem`, `planner.milp`.
"""
