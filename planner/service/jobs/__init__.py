"""The service's jobs: the store that keeps them, the worker processes that solve, measure and run, and their
supervisor.

May import: `service.wire`, every room of the planner, `profiles`.
"""
