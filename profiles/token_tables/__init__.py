"""A tokenizer as a table on disk: how it is written, and how texts become tokens by it, in a few MiB.

May import `runtime.common`, and the `tokenizers` library for all but the vocabulary.
"""
