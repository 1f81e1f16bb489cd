"""Profiles and budgets in, plans out: the fastest training step that fits, its schedule and its proof.

Rooms, each importing only what stands before it: `milp`, `problem`, `schedule`, `simulation`, `formulation`, `solve`, `graphs`, `report`,
`service`. At the top: `schema` and `instructions` (what a plan is), `io` (its file), `protocol` (what a planner can be asked), `plan` (the door).
"""
