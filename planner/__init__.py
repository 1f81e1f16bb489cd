"""Profiles and budgets in, plans out: the fastest training step that fits, its schedule and its proof.

Nothing is imported here: the budgeted process reads plans without the solver. The doors are

- `tightfit.planner.plan.plan(profile, budget_bytes)`, `tightfit.planner.plan.minimum_budget(profile)`, `tightfit.planner.plan.planner_of(profile)`
- `tightfit.planner.simulation.simulate.simulate(plan)`
- `tightfit.planner.report.compare.compare(profile, budgets, policies)`
- `tightfit.planner.report.explain.explain(plan)`, `tightfit.planner.report.explanation.account(plan)`, `tightfit.planner.report.marginal_value.neighbours(planner, plan)`
- `tightfit.planner.report.diff.diff(before, after)`
- `tightfit.planner.io.load_plan(path)`, `tightfit.planner.io.save_plan(plan, path)`
- `tightfit.planner.problem.step_graph.layer_graph(profile)`
"""
