"""The service's data: messages over HTTP, errors, events, settings, and content-addressed objects in the data folder.

May import: `planner.report`, `planner.schema`, the options of runs, `profiles`.
"""
