"""Profiles and budgets in, plans out: the fastest training step that fits, its schedule and its proof.

Nothing is imported here: the budgeted process reads plans without the solver. The doors are

- `planner.plan.plan(profile, budget_bytes)`, `planner.plan.minimum_budget(profile)`, `planner.plan.Planner`
- `planner.simulate.simulate(plan)`
- `planner.compare.compare(profile, budgets, policies)`
- `planner.explain.explain(plan)`, `planner.explanation.account(plan)`, `planner.worth.neighbours(planner, plan)`
- `planner.diff.diff(before, after)`
- `planner.exchange.load_plan(path)`, `planner.exchange.save_plan(plan, path)`
- `planner.graph.layer_graph(profile)`
"""
