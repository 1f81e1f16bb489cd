"""Measures this machine: seconds of operators and unpacking, the disk, the memory of idle processes, load by other
programs.

`measure` starts the process `worker`, which does the timing. May import: `profiles.tracing`, `profiles.weights`,
`runtime.engine`, `runtime.supervision`.
"""
