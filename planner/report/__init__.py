"""Plans explained and set side by side: `explanation` is the record of what a plan does and why; `explain` makes
sentences of it, `render` tables for the terminal, `view` and `html` pages, `figures` pictures.

May import: every room of the planner but the service.
"""
