"""Reading the packed weight store: its layout, its rows, unpacking in C; also reading and writing safetensors files.

`profiles.weights` writes the store. May import: `runtime.common`.
"""
