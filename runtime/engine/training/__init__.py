"""The steps of a plan: the job that a run compiles, the executor of its instructions, the loop over batches,
checkpoints.

`child` is the process's entry. May import: `runtime.common` and every other room of the engine.
"""
