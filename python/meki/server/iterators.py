"""Asynchronous iterators: several at once, and one that takes its time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TypeVar

T = TypeVar("T")


async def merged(iterators: Sequence[AsyncIterator[T]]) -> AsyncGenerator[tuple[int, T], None]:
    """What any of them gives, as soon as it does, with the iterator's index."""

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


async def with_pauses(items: AsyncIterator[T], pause_s: float) -> AsyncGenerator[T | None, None]:
    """What an iterator gives, and None each time that nothing has come for so many seconds."""

    async def following() -> T:
        return await anext(items)

    while True:
        coming = asyncio.create_task(following())
        try:
            while not (await asyncio.wait([coming], timeout=pause_s))[0]:
                yield None
            item = coming.result()
        except StopAsyncIteration:
            return
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        yield item
