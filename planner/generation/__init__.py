"""Plans for answers: which weights stay in memory and which are read for every token, within a budget, with the cache.

`plan` is the entry. May import: `planner.solvers`, the sizes and names of `runtime.engine.generation`, `profiles.models`.
"""
