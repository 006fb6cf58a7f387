"""Lets requests with equal numbers of visual tokens into an engine together, and keeps different numbers apart.

vLLM stacks the visual tokens of all requests that begin in the same step. Requests with different numbers of visual
tokens in the same step kill the engine.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class EqualGate:
    """An asyncio semaphore that admits at most `capacity` requests at a time, all of the same size.

    Requests of another size wait until the gate is empty. Sizes take turns in the order in which their first request
    began to wait. While other sizes wait, a new request of the present size joins the next round of its size, so no
    size starves. If all requests have one size, a request waits only for a free place.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.inside = 0  # admitted requests that have not left yet
        self._size: int | None = None  # the present size
        # Requests of the present size that are not admitted yet.
        self._round: deque[asyncio.Future[None]] = deque()
        # Requests of other sizes, and of the next round of the present size. A dict keeps the order of the sizes.
        self._waiting: dict[int, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def admit(self, size: int) -> AsyncIterator[None]:
        """Waits until a request of `size` may enter. The request leaves at the end of the block."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if size == self._size and not self._waiting:
            self._round.append(turn)
        else:
            self._waiting.setdefault(size, deque()).append(turn)
        self._fill()
        try:
            await turn
        except asyncio.CancelledError:
            # The request may have been admitted before the cancellation reached this coroutine: give its place back.
            if turn.done() and not turn.cancelled():
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
        """Admits requests of the present round, and begins the round of the next size once the gate is empty."""
        while True:
            while self._round and self.inside < self.capacity:
                turn = self._round.popleft()
                if not turn.done():  # a future that is done here was cancelled while it waited
                    turn.set_result(None)
                    self.inside += 1
            if self.inside or self._round or not self._waiting:
                return
            self._size = next(iter(self._waiting))
            self._round = self._waiting.pop(self._size)
