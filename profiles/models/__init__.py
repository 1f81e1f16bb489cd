"""Decoder language models as one plain `nn.Module`, and reading their config.json.

May import: `profiles.tracing` (its operators), `runtime.engine`.
"""
