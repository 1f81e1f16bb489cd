"""Training data: samples as people write them, chat templates, and record files of tokens.

May import: `runtime.engine`, `profiles` (tokenizers). Preparing counts against the budget, so PyTorch is not imported.
"""
