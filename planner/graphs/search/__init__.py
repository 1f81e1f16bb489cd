"""Searches for schedules of a bare graph: fixed rules, dynamic programs, eviction, neighbourhoods, and CP-SAT for small
graphs.

May import: `graphs.problem`, `graphs.bounds`, `planner.solvers`.
"""
