"""Words that every room shares: errors, sizes, files, processes. Nothing of what tightfit is about.

May import: the standard library alone, so that the budgeted processes can read all of it.
"""
