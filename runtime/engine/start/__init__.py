"""A training process that holds little: PyTorch without its Python, stubs for CUDA's libraries, memory moved to a file, kernels made ready.

May import: `runtime.common`, and the engine's `device`, `cpu` (whose kernels it makes ready), `kernels`, `weights`.
"""
