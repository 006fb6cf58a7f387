"""The gate before the engine: never two sizes inside, never more than its capacity, and everybody's turn comes."""

import asyncio
import itertools
import random

from pipelines.engines.one_size_at_a_time import EqualGate


def pass_all(sizes: list[int], capacity: int, seed: int = 0) -> tuple[list[int], list[list[int]]]:
    """The order in which requests were admitted, and who was inside at each admission."""
    order: list[int] = []
    seen: list[list[int]] = []
    inside: list[int] = []
    choice = random.Random(seed)

    async def request(gate: EqualGate, size: int) -> None:
        async with gate.admit(size):
            inside.append(size)
            order.append(size)
            seen.append(list(inside))
            for _ in range(choice.randrange(4)):
                await asyncio.sleep(0)
            inside.remove(size)

    async def run() -> None:
        gate = EqualGate(capacity)
        async with asyncio.timeout(20):
            await asyncio.gather(*(request(gate, size) for size in sizes))
        assert gate.inside == 0

    asyncio.run(run())
    return order, seen


def test_no_two_sizes_are_ever_inside_together_and_never_too_many():
    for seed in range(20):
        sizes = random.Random(seed).choices([25, 56, 576], k=200)
        order, seen = pass_all(sizes, capacity=7, seed=seed)
        assert sorted(order) == sorted(sizes)
        assert all(len(set(inside)) == 1 and len(inside) <= 7 for inside in seen)


def test_requests_of_one_size_fill_the_gate():
    _, seen = pass_all([56] * 100, capacity=10)
    assert sum(len(inside) for inside in seen) / len(seen) > 6


def test_those_of_one_size_go_together_rather_than_in_the_order_in_which_they_came():
    order, _ = pass_all([1, 2] * 50, capacity=4)
    switches = sum(a != b for a, b in itertools.pairwise(order))
    assert switches <= 3


def test_a_size_that_waits_is_not_starved_by_newcomers_of_another():
    admitted: list[int] = []

    async def one(gate: EqualGate, size: int) -> None:
        async with gate.admit(size):
            admitted.append(size)
            await asyncio.sleep(0.001)

    async def run() -> None:
        gate = EqualGate(2)
        tasks = [asyncio.create_task(one(gate, 56)) for _ in range(4)]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(one(gate, 576)))
        for _ in range(50):  # a stream that would never leave the gate empty
            await asyncio.sleep(0.0005)
            tasks.append(asyncio.create_task(one(gate, 56)))
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert admitted.index(576) <= 6


def test_who_gives_up_leaves_no_place_taken():
    async def run() -> None:
        gate = EqualGate(1)
        free = asyncio.Event()

        async def hold(size: int) -> None:
            async with gate.admit(size):
                await free.wait()

        first = asyncio.create_task(hold(1))
        waiting = [asyncio.create_task(hold(size)) for size in (1, 2)]
        await asyncio.sleep(0.01)
        for task in waiting:
            task.cancel()
        free.set()
        await asyncio.gather(first, *waiting, return_exceptions=True)
        assert gate.inside == 0
        async with asyncio.timeout(5), gate.admit(3):
            pass
        admitted = asyncio.create_task(hold(4))
        await asyncio.sleep(0)  # admitted, and given up before it could go on
        admitted.cancel()
        await asyncio.gather(admitted, return_exceptions=True)
        assert gate.inside == 0

    asyncio.run(run())
