"""Helpers that every room uses: errors, names of options, sizes, files, processes; nothing about models, plans or
training.

May import: the standard library alone, so that the budgeted processes can import all of it.
"""
