"""The profiler: turns a model and a sample batch into a `Profile`, the measured operators and tensors of one training
step.

Rooms: `tracing`, `models`, `weights`, `devices`, `sources`, `measuring`, `steps`. `api` is the entry point, `schema`
defines the profile, `io` reads and writes its file. May import: `runtime.common`, `runtime.engine`,
`runtime.supervision`.
"""
