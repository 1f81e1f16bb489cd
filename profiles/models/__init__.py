"""Decoder language models as one plain module, and what a config.json says of them.

May import: `profiles.tracing` (its operators), `runtime.engine`.
"""
