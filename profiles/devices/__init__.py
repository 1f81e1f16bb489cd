"""Devices other than this machine: their data sheets (`*.json`), and a roofline model that estimates operators' seconds
on them.

May import: `profiles.schema`, `profiles.tracing`, `runtime.engine`.
"""
