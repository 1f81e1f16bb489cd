"""What a training step is made of, measured: from a model and a sample batch to a `Profile`.

Rooms: `models`, `tracing`, `weights`, `sources`, `devices`, `measuring`; `schema` is the result, `io` its file, `api` the door.
May import: `runtime.common`, `runtime.engine`, `runtime.supervision`.
"""
