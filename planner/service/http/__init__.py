"""The service's HTTP side: the application, its routes, connections, uploads and guards.

May import: `service.wire`, `service.jobs`, `planner.report`, `profiles`.
"""
