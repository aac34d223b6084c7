"""The lag of a loop that somebody holds up is told, and nothing after the end."""

import asyncio
import time

from router.loop_lag import LOOK_S, LoopLag


async def test_who_holds_up_the_loop_is_seen() -> None:
    told: list[float] = []
    seen = asyncio.Event()

    def tell(lag: float) -> None:
        told.append(lag)
        seen.set()

    lag = LoopLag(tell)
    lag.start()
    time.sleep(LOOK_S + 0.05)  # noqa: ASYNC251  on purpose
    async with asyncio.timeout(5):
        await seen.wait()
    assert told[0] >= 0.04
    lag.stop()
    seen.clear()
    await asyncio.sleep(2 * LOOK_S)
    assert not seen.is_set()
