"""The planner of bare graphs: any DAG of operators, with rematerialisation and offloading wherever they save memory
cheaply.

Bare graphs come from `tightfit.profiles.graph_input`.

| file | concept |
|---|---|
| problem/dag | the graph as arrays |
| problem/schedule | a schedule as its re-runs; lifetimes, peak, seconds |
| problem/actions | a schedule in full: runs, frees, moves; its seconds and instructions |
| problem/live_bytes | bytes at every run, updated as re-runs are added and removed |
| problem/limit | the time that building and solving one program may take |
| bounds/lp_bound | a lower bound on seconds: a linear program over a few moments of the schedule |
| bounds/cut_generation | such programs in sequence, each with moments and paths that the previous answer violates |
| bounds/milp_bound | the same programs with 0/1 variables |
| bounds/cp_sat_model | programs of 0/1 choices handed to CP-SAT |
| bounds/bound | both bounds of a plan: for its class, and for any schedule |
| search/baselines | fixed rules: keep-all, checkpoint-layers, checkpoint-sqrt |
| search/chain_dp | dynamic programming over checkpoints, for chains |
| search/eviction_search | greedy eviction, then ruin and recreate, for graphs of any size |
| search/subproblem | a stretch of a schedule, or all of it, re-optimised by an integer program; the lowest peak |
| search/large_neighbourhood | stretch after stretch re-optimised |
| search/exact_moves | CP-SAT over all schedules with moves to a disk, for small graphs |
| plan_result | a schedule written down as a plan |
| incumbents | the schedules that one call has found, where searches start, and what is proven of peaks |
| graph_budget_search, move_search | the search at one budget, without a disk and with one |
| smallest_budget | the search for the schedule of lowest peak |
| graph_planner | budgets in, plans out |

The class of schedules: operators first run in the graph's order; before each first run, and after the last, any earlier
operators may run again, each at most once more, in the graph's order (Jain et al. 2020, "Checkmate", the
frontier-advancing class). An output is freed once nothing reads it before its operator runs again.

Where the graph names a disk, an output may also be written there once and fetched back. Before each run, in this order:
writes begin, outputs are freed (which waits for their write), fetches begin. The disk does one transfer at a time; a
run waits for the fetches of its inputs. Every output that the current operator does not touch can be on disk, so the
smallest budget is what the largest operator needs by itself. Graphs of few operators with a disk are solved exactly.
For others with one the search for re-runs is repeated at a few prices of disk time, with a fetch in place of a re-run
where that is cheaper; the transfers of each schedule are then moved into the disk's idle time, and the fastest schedule
is the plan.
"""
