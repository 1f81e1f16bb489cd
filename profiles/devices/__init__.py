"""Devices that are not here: their data sheets (`*.json`), and a roofline for the seconds of operators on them.

May import: `profiles.schema`, `runtime.engine`.
"""
