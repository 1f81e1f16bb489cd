"""The planner: from a profile and a budget to a plan, the fastest training step found that fits, with its schedule and
its proof.

Rooms, each importing only what stands before it: `solvers`, `problem`, `schedule`, `simulation`, `graphs`,
`formulation`, `solve`, `generation`, `fleet`, `report`, `service`. At the top: `schema` and `instructions` (what a plan
is), `io` (its file), `protocol` (what a planner can be asked), `plan` and
`compare` (the doors to one plan and to many).
"""
