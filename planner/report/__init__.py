"""Reports about plans: explanations, comparisons, differences, tables, charts, HTML.

May import: every room of the planner but the service.
"""
