"""What comes of a run: an adapter merged into its base, or written for llama.cpp; losses of a model with its adapter.

`merge` writes models tensor by tensor, `evaluation` runs a plan's evaluation in the capped process of a run. May import
the session and what it may.
"""
