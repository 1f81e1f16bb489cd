"""Schedules of a graph: fixed rules, dynamic programs, eviction, neighbourhoods, and CP-SAT where the graph is small.

May import: `graphs.problem`, `graphs.bounds`, `planner.milp`.
"""
