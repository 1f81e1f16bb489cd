"""Work that is acknowledged, kept and carried out: the store, the processes that solve, measure and run, and their supervisor.

May import: `service.wire`, every room of the planner, `profiles`.
"""
