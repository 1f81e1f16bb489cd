"""What is measured on this machine: operators, unpacking, the disk, what a process holds, how busy the machine is.

`measure` asks, `worker` is the process that answers. May import: `profiles.tracing`, `profiles.weights`, `runtime.engine`, `runtime.supervision`.
"""
