"""The planner of bare graphs (`tightfit.profiles.graph_input`): any DAG, anything computed again, or moved to a disk and back, wherever that pays.

| file | concept |
|---|---|
| problem/dag | the graph as arrays |
| problem/schedule | a schedule as its re-runs; lifetimes, peak, seconds |
| problem/actions | a schedule in full: runs, frees, moves; its seconds and instructions |
| problem/live_bytes | bytes at every run, updated as re-runs come and go |
| problem/limit | the time that building and solving one program may take |
| bounds/lp_bound | a linear program over a few moments, which no schedule undercuts |
| bounds/cut_generation | such programs one after the other, each with the moments and paths that the one before lacked |
| bounds/milp_bound | the same in whole numbers |
| bounds/cp_sat_model | programs of 0/1 choices handed to CP-SAT |
| bounds/bound | both bounds of a plan: for its class, and for any schedule |
| search/baselines | fixed rules: keep-all, checkpoint-layers, checkpoint-sqrt |
| search/chain_dp | dynamic programming over checkpoints, for chains |
| search/belady | one sweep over the graph that evicts what is read farthest ahead |
| search/eviction_search | greedy eviction, then ruin and recreate, for graphs of any size |
| search/subproblem | a stretch of a schedule, or all of it, solved anew in whole numbers |
| search/large_neighbourhood | stretch after stretch solved anew; the smallest peak |
| search/exact | CP-SAT over all schedules of the class, for small graphs |
| search/exact_moves | the same with moves to a disk, and time counted with the memory |
| incumbents | the schedules found so far, and whether the clock had a hand in them |
| plan_result | a schedule written down as a plan |
| planner | budgets in, plans out |

The class of schedules: operators first run in the graph's order; before each first run, and after the last, any earlier operators may
run again, each at most once more, in the graph's order (Jain et al. 2020, "Checkmate", the frontier-advancing class). An output
is freed once nothing reads it before its operator runs again.

Where the graph names a disk, an output may also be written there once and fetched back. Before each run, in this order: writes begin,
outputs are freed (which waits for their write), fetches begin. The disk does one transfer at a time; a run waits for the fetches
of its inputs. Everything but what runs can be away, so the smallest budget is what the largest operator needs by itself. Graphs of
few operators are solved exactly. For others the search for re-runs is made at a few prices of the disk, a fetch taking the place
of a run where it is cheaper, and the fastest of its schedules, moved into the disk's idle time, is the plan.
"""
