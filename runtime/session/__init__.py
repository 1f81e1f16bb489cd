"""A run as a caller sees it: the plan is admitted, the folder locked, the training process started, the result saved.

`launch` runs a plan to its end, `session` step by step. May import everything but `cli` and the service.
"""
