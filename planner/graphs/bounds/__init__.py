"""Seconds that no schedule of a graph undercuts: linear programs, programs in whole numbers, and the cuts that tighten them.

May import: `graphs.problem`, `planner.milp`.
"""
