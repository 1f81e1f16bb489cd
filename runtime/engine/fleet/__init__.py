"""What a training process does as one of several: talks to the others, keeps gradients apart, adds them up in order.

May import: `runtime.common`, and of the engine `device`, `cpu.pages`, `kernels`, `weights`.
"""
