"""What goes over the wire and into the data folder: messages, errors, events, settings, content-addressed objects.

May import: `planner.schema`, `profiles`.
"""
