"""Where models come from: Hugging Face directories, GGUF files, bare configs, factories; and their tokenizers.

Each yields the same `Source`. May import: `profiles.weights`, `profiles.models`, `profiles.tracing`.
"""
