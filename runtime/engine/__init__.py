"""The code of the training process, and nothing else: every byte that is imported here counts against the user's
budget.

Rooms: `device` (memory and transfers), `cpu` (the CPU as a device), `kernels` (compiled operators, optimizers),
`weights` (the packed store), `start` (a small process), `fleet` (a member among others), `training` (a plan's steps),
`generation` (answers). May import: `runtime.common`, and of the standard library and PyTorch what the contract in
pyproject.toml lists.
"""
