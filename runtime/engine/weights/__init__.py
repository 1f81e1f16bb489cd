"""The packed weight store as it is read: its layout, its rows, unpacking in C; safetensors files.

Writing it is the work of `profiles.weights`. May import: `runtime.common`.
"""
