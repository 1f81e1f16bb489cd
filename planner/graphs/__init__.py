"""The planner of bare graphs (`tightfit.profiles.graph_input`): any DAG, anything computed again, or moved to a disk and back, wherever that pays.

| file | concept |
|---|---|
| dag | the graph as arrays |
| schedule | a schedule as its re-runs; lifetimes, peak, seconds |
| actions | a schedule in full: runs, frees, moves; its seconds and instructions |
| replay | the simulator's half for plans without an arena: bytes that are live |
| rules | fixed rules: keep-all, checkpoint-layers, checkpoint-sqrt |
| cp_sat | CP-SAT on one thread, ended by Ctrl-C |
| exact | CP-SAT over all schedules of the class, for small graphs |
| exact_moves | the same with moves to a disk, and time counted with the memory |
| chains | dynamic programming over checkpoints, for chains |
| memory | bytes at every run, updated as runs come and go |
| found | what searches found, and whether the clock had a hand in it |
| search | greedy eviction, then ruin and recreate, for graphs of any size |
| stretch | a part of a schedule, or all, solved anew in whole numbers with memory at every run |
| neighbourhoods | few places for re-runs, then stretch after stretch; the smallest peak |
| windows, moments, climb | linear programs that no schedule undercuts, with what each answer shows to be missing |
| whole | the same in whole numbers |
| counted | programs of choices handed to CP-SAT: those of `whole` and `stretch` |
| bound | both bounds of a plan: for its class, and for any schedule |
| limit | the time that building and solving one program may take |
| answer | a schedule written down as a plan |
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
