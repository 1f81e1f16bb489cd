"""The start of a small process: PyTorch without its Python, stubs for CUDA's libraries, memory moved to a file, warm
kernels.

May import: `runtime.common`, and the engine's `device`, `cpu` (whose kernels it makes ready), `kernels`, `weights`.
"""
