"""Prepares training data: reads samples from JSON lines and tables (CSV, Parquet, Arrow), applies chat templates, and
writes record files of tokens.

May import: `runtime.engine`, `profiles` (tokenizers). The memory of preparing counts against the budget; so PyTorch is
not imported.
"""
