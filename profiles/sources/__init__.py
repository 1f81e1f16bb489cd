"""Opens models: Hugging Face directories, GGUF files, bare configs and factories; and the tokenizers of the first two.

Each kind is opened as the same `Source`. May import: `profiles.weights`, `profiles.models`, `profiles.tracing`.
"""
