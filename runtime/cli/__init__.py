"""The command line: what people type, and what they are told.

On top of everything; nothing imports it.
"""
