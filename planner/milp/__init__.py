"""Linear and integer programs, and the solvers behind them: HiGHS, CP-SAT, and Ctrl-C beside both.

May import: `runtime.common`.
"""
