"""The cache of one layer's keys and values, of all tokens so far or of those in its sliding window."""

from __future__ import annotations

from torch import Tensor


class LayerCache:
    """`keys` and `values` are [K, places, D], of which `used` places are filled; the first is of position `begin`."""

    def __init__(self, keys: Tensor, values: Tensor, window: int | None) -> None:
        self._keys, self._values, self.window = keys, values, window
        self.begin = self.used = 0

    def add(self, count: int) -> tuple[Tensor, Tensor]:
        """Places for the keys and values of `count` more tokens, at most `GROUP`, each [K, count, D]."""
        if self.used + count > self._keys.shape[1]:
            assert self.window is not None
            self._keep(min(self.used, self.window - 1))
        new = slice(self.used, self.used + count)
        self.used += count
        return self._keys[:, new], self._values[:, new]

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all places, filled or not."""
        return self._keys, self._values

    @property
    def filled(self) -> tuple[Tensor, Tensor]:
        return self._keys[:, : self.used], self._values[:, : self.used]

    def can_return_to(self, position: int) -> bool:
        """Whether all tokens that one at `position` attends to are still there."""
        return (
            self.begin <= (0 if self.window is None else max(0, position - self.window + 1)) and position <= self._end
        )

    def return_to(self, position: int) -> None:
        """Forget the tokens from `position` on."""
        if position == 0:
            self.begin = 0
        self.used = position - self.begin

    @property
    def _end(self) -> int:
        return self.begin + self.used

    def _keep(self, count: int) -> None:
        """Move the last `count` tokens to the front; parts that do not overlap are copied one after the other."""
        distance = self.used - count
        for tensor in (self._keys, self._values):
            for start in range(0, count, distance):
                stop = min(start + distance, count)
                tensor[:, start:stop].copy_(tensor[:, start + distance : stop + distance])
        self.begin += distance
        self.used = count
