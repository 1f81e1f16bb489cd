"""The process beside the training process: it starts that one under the cap, shows its progress and writes the report.

It counts against the budget too, so it lives of the standard library. May import: `runtime.common`, `runtime.engine`.
"""
