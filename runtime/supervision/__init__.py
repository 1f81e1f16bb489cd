"""The process beside the training process: it starts that one under the cap, shows its progress and writes the report.

It counts against the budget too, so it uses the standard library alone. May import: `runtime.common`, `runtime.engine`.
"""
