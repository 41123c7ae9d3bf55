"""Several asynchronous iterators at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TypeVar

T = TypeVar("T")


async def merged(iterators: Sequence[AsyncIterator[T]]) -> AsyncGenerator[tuple[int, T], None]:
    """What any of them gives, as soon as it does, with the iterator's index."""

    if len(iterators) == 1:  # as most requests have it: without the tasks
        async for item in iterators[0]:
            yield 0, item
        return

    async def following(index: int) -> T:
        return await anext(iterators[index])

    running = {asyncio.create_task(following(index)): index for index in range(len(iterators))}
    try:
        while running:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=running.__getitem__):
                index = running.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                running[asyncio.create_task(following(index))] = index
                yield index, item
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
