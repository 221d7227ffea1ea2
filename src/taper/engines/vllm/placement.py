"""Which engine replica runs a request that branches: one, whose controller sees all its branches together.

Without a rank vLLM looks for the least loaded engine branch by branch, and to every controller the part it gets is
a request of its own, with a protected row of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from taper.claims import SEALED

RANK_HEADER = "X-data-parallel-rank"  # vLLM's own: it obeys it for every branch of the request


class Placement:
    """Ranks for the requests of one API process."""

    def __init__(self) -> None:
        self._branches: Counter[int] = Counter()  # in flight, by rank, of what was placed here
        self._turn = 0

    @contextmanager
    def place(self, tag: str | None, *, branches: int, replicas: int) -> Iterator[int]:
        """A rank below `replicas`, which bears `branches` until the end.

        A sealed tag has always the same, in every API process that seals with the same secret. Without one it is
        the rank with the fewest branches from here; ties take turns. vLLM sends serial requests around both.
        """
        rank = self._lightest(replicas) if tag is None else int(tag.removeprefix(SEALED), 16) % replicas
        self._branches[rank] += branches
        try:
            yield rank
        finally:
            self._branches[rank] -= branches

    def _lightest(self, replicas: int) -> int:
        turns = [(self._turn + at) % replicas for at in range(replicas)]
        self._turn += 1
        return min(turns, key=self._branches.__getitem__)
