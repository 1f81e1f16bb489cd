"""A bare graph as arrays, schedules over it, and the bytes that are live.

May import: `planner.problem`, `planner.schedule`, `profiles`.
"""
