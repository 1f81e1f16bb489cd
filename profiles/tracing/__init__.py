"""Traces an `nn.Module` on a sample batch into layers and programs of operators, and compares these with autograd.

May import: `profiles.schema`, `runtime.engine`.
"""
