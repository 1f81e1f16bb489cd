"""The service's data: messages over HTTP, errors, events, settings, and content-addressed objects in the data folder.

May import: `planner.schema`, `profiles`.
"""
