from __future__ import annotations

import numpy as np
import pytest
from synthetic import small_chain

from planner.pricing import FIELDS, Hull
from planner.split import layered


def test_a_solver_that_gives_up_proves_nothing_and_is_replaced(monkeypatch):
    """Glop ends some programs as ABNORMAL, and MathOpt then fails to say so: zero is a bound that always holds."""
    hull = Hull(layered(small_chain(3, layers=2)).types[0])
    prices = np.ones(len(FIELDS))
    hull.prove(prices, 5.0)
    known = hull.bound(prices)
    assert known >= 5.0 * (1 - 1e-6)
    failed = hull.solver
    monkeypatch.setattr(failed, "solve", lambda: {}.canonical_code)
    assert hull.bound(prices) == 0.0
    assert hull.solver is not failed
    assert hull.bound(prices) == pytest.approx(known)
