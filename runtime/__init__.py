"""What carries a plan out: the engine in the budgeted process, its supervisor, sessions, data and the command line.

Rooms, each importing only what stands before it: `common`, `engine`, `supervision`; then, above the profiles and the planner, `data`, `session`, `cli`.
"""
