"""The search at a budget: column generation, whole columns from it, schedules made of these, and the smallest budget
that has a plan.

May import: `planner.formulation`, `planner.schedule`, `planner.problem`, `planner.solvers`.
"""
