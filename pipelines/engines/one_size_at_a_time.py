"""Keeps requests of unequal shape out of an engine that stacks those it runs together.

vLLM stacks the visual tokens of all requests that begin in one step; two numbers of tokens in one step kill the engine.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class EqualGate:
    """Admits at most `capacity` requests, all of one size; those of another wait until it is empty.

    Sizes take turns in the order in which they came to wait. Who comes while others wait joins the next round of its
    size, so no size starves. With one size nothing ever waits but for a free place.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.inside = 0
        self._size: int | None = None
        self._round: deque[asyncio.Future[None]] = deque()  # of the present size, still outside
        self._waiting: dict[int, deque[asyncio.Future[None]]] = {}  # other sizes, and later rounds; oldest first

    @asynccontextmanager
    async def admit(self, size: int) -> AsyncIterator[None]:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if size == self._size and not self._waiting:
            self._round.append(turn)
        else:
            self._waiting.setdefault(size, deque()).append(turn)
        self._fill()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # admitted in the very moment
                self._leave()
            raise
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        self.inside -= 1
        self._fill()

    def _fill(self) -> None:
        while True:
            while self._round and self.inside < self.capacity:
                turn = self._round.popleft()
                if not turn.done():  # done: given up while it waited
                    turn.set_result(None)
                    self.inside += 1
            if self.inside or self._round or not self._waiting:
                return
            self._size = next(iter(self._waiting))
            self._round = self._waiting.pop(self._size)
