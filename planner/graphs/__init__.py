"""The planner of bare graphs (`profiles.bare`): any DAG, anything computed again wherever that pays.

| file | concept |
|---|---|
| dag | the graph as arrays |
| schedule | a schedule as its re-runs; lifetimes, peak, seconds, instructions |
| replay | the simulator's half for plans without an arena: bytes that are live |
| rules | fixed rules: keep-all, checkpoint-layers, checkpoint-sqrt |
| exact | CP-SAT over all schedules of the class, for small graphs |
| chains | dynamic programming over checkpoints, for chains |
| memory | bytes at every run, updated as runs come and go |
| search | greedy eviction, then ruin and recreate, for graphs of any size |
| bound | linear programs that no schedule undercuts |
| planner | budgets in, plans out |

The class of schedules: operators first run in the graph's order; before each first run any earlier operators may run
again, each at most once more, in the graph's order (Jain et al. 2020, "Checkmate", the frontier-advancing class). An output
is freed once nothing reads it before its operator runs again.
"""
