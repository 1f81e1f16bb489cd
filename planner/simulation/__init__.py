"""The independent judge: a plan's schedules replayed instruction by instruction; it alone states peak and seconds.

May import: `planner.problem`, `planner.schema`. It knows nothing of the search.
"""
