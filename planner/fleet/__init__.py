"""Plans for several devices. `plan` plans steps and `rounds` rounds: `members` says who may take part, `part_profiles`
and `part_plans` what each would compute, `search` and `programs` share the work out, `bounds` prove, `clock` plays,
`simulate` judges.

May import the planner and profiles; nothing of the runtime but its common words.
"""
