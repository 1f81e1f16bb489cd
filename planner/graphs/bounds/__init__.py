"""Lower bounds on the seconds of a bare graph's schedules: linear and integer programs, and the cuts that tighten them.

May import: `graphs.problem`, `planner.solvers`.
"""
