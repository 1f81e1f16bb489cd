"""Plans for answers: which weights stay in memory and which are read for every token, within a budget, with the cache.

`plan` is the entry. May import: `planner.solvers`, `profiles`, `runtime.common`, and of `runtime.engine` the job, sizes
and names of `generation`, the sizes of `cpu`, the layout of `weights`.
"""
