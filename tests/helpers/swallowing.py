"""A solver in the place of MathOpt's that Ctrl-C meets in the conversion of an answer: an AttributeError comes out of it."""

from __future__ import annotations

import os
import signal
import time


class Swallowing:
    def solve(self, **_):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        except KeyboardInterrupt:
            raise AttributeError from None
