"""Linear and integer programs, and the solvers behind them: HiGHS and CP-SAT, both with Ctrl-C handled.

May import: `runtime.common`.
"""
