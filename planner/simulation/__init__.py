"""The simulator: replays a plan's schedules instruction by instruction; peak and seconds of a plan come from it alone.

May import: `planner.problem`, `planner.schema`. It knows nothing of the search.
"""
