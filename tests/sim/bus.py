"""The bus of a simulated fleet: the in-memory twin, with distance between sender and receiver.

Promised as by the port, and no more: what one connection sends to another arrives in order and at
most once. Between publishers there is no order, since every pair of connections has its own delay.
What may go wrong: loss (silent in bursts, or told, as a slow consumer's is), the server away, one
connection cut off (unnoticed at first, then `down`, and `up` some time after it is mended, each at
its own moment). A killed process's subscriptions end at once, a frozen one's stay. Nothing is ever
duplicated: core NATS does not, and the port promises that it does not.
"""

import asyncio
import random
from collections.abc import Callable
from itertools import count
from typing import Any

from protocol.bus import Callback, Message
from protocol.memory_bus import MemoryBus, MemoryHub, matches
from tests.sim.loop import Process, SimLoop, current

FAST_S = (0.0002, 0.002)
SLOW_S = (0.02, 0.3)
SLOW_ONE_IN = 200
"""Now and then a message is much later than others."""
DETECT_S = (0.2, 2.0)
RECONNECT_S = (0.05, 1.0)

Tap = Callable[[str, str, str, bytes], None]
"""Sender, receiver, subject, payload of what is delivered."""


class SimBus(MemoryBus):
    """One connection, which belongs to one process."""

    def __init__(self, hub: "SimHub", process: Process) -> None:
        self.process = process
        self.cut = False
        """The way to the server is broken."""
        self.epoch = 0
        self.number = next(hub.numbers)
        self._sim = hub
        super().__init__(hub, close_timeout_s=0.2)

    def _add(self, subject: str, callback: Callback, queue: str, limits: tuple[int, int]) -> Any:
        subscription = super()._add(subject, callback, queue, limits)
        forget = subscription._forget

        def forgotten(one: Any) -> None:
            forget(one)
            self._sim.routes.clear()

        async def drain(*, timeout_s: float) -> None:
            subscription._forget(subscription)
            if self.connected:  # what the server has sent by now is on its way
                await asyncio.sleep(min(timeout_s, SLOW_S[1]))
            await type(subscription).drain(subscription, timeout_s=timeout_s)

        subscription._forget = forgotten
        subscription.drain = drain  # type: ignore[method-assign]
        self._sim.has_groups |= bool(queue)
        self._sim.routes.clear()
        return subscription

    def _join(self) -> None:
        if not self.connected:
            self.epoch += 1
            self._sim.routes.clear()
        super()._join()

    def _leave(self) -> None:
        self.epoch += 1
        self._sim.routes.clear()
        super()._leave()


class SimHub(MemoryHub):
    """The server, and the faults around it."""

    def __init__(self, loop: SimLoop, rng: random.Random, tap: Tap) -> None:
        super().__init__(rng=rng)
        self.loop = loop
        self.loss = 0.0
        """Share of messages that vanish without a word."""
        self.slow: dict[str, float] = {}
        """By process: the share that it is too slow to take, and is told of."""
        self.has_groups = False
        """Whether anybody ever subscribed with a queue group."""
        self.routes: dict[str, list[tuple[SimBus, Any]]] = {}
        self.numbers = count(1)
        self.num_delivered = 0
        self.num_lost = 0
        self._tap = tap
        self._last: dict[tuple[int, int], float] = {}

    # -- faults

    def reaches(self, bus: SimBus) -> bool:
        return self.is_up and not bus.cut

    def take_down(self) -> None:
        """The server dies; connections notice soon."""
        self.is_up = False
        for bus in self._all():
            self._notice(bus, self._rng.uniform(0.0, 0.1))

    def bring_up(self) -> None:
        self.is_up = True
        for bus in self._all():
            self.mend_later(bus)

    def cut_off(self, process: Process) -> None:
        """One process and the server do not hear each other; both notice later."""
        for bus in self._of(process):
            bus.cut = True
            self._notice(bus, self._rng.uniform(*DETECT_S))

    def mend(self, process: Process) -> None:
        """A connection that did not notice is reset, as TCP's is."""
        for bus in self._of(process):
            bus.cut = False
            bus.process.call(bus._leave)
            self.mend_later(bus)

    def bury(self, process: Process) -> None:
        """The kernel closes the connections of the dead."""
        for bus in self._of(process):
            self._detach(bus)
        self.routes.clear()

    def mend_later(self, bus: SimBus) -> None:
        bus.process.call(self._find, bus, after_s=self._rng.uniform(*RECONNECT_S))

    def _find(self, bus: SimBus) -> None:
        if self.reaches(bus):
            bus._join()

    def _notice(self, bus: SimBus, after_s: float) -> None:
        def look() -> None:
            if not self.reaches(bus):
                bus._leave()

        bus.process.call(look, after_s=after_s)

    def _all(self) -> list[SimBus]:
        return [bus for bus in self._buses if isinstance(bus, SimBus)]

    def _of(self, process: Process) -> list[SimBus]:
        return [bus for bus in self._all() if bus.process is process]

    # -- messages

    def _route(self, sender: MemoryBus, message: Message) -> None:
        assert isinstance(sender, SimBus)
        if not self.reaches(sender):
            self.num_lost += 1
            return
        chosen = self._chosen(message.subject)
        for bus, subscription in chosen:
            self._deliver(sender, bus, subscription, message)
        if message.reply and not chosen:
            headers = {"Status": "503"}
            nobody = Message(message.reply, b"", headers=headers, no_responders=True)
            for subscription in sender._matching(message.reply):
                self._deliver(sender, sender, subscription, nobody)

    def _chosen(self, subject: str) -> list[tuple[SimBus, Any]]:
        """All who listen, and one of each queue group."""
        found = self.routes.get(subject)
        if found is None:
            found = [
                (bus, subscription)
                for bus in self._all()
                if bus.connected
                for subscription in bus._subscriptions
                if matches(subscription.inlet.subject, subject)
            ]
            if not subject.startswith("_INBOX"):
                self.routes[subject] = found
        return self._one_of_each_group(found) if self.has_groups else found

    def _one_of_each_group(self, found: list[tuple[SimBus, Any]]) -> list[tuple[SimBus, Any]]:
        groups: dict[str, list[tuple[SimBus, Any]]] = {}
        for one in found:
            groups.setdefault(one[1].queue, []).append(one)
        everyone = groups.pop("", [])
        return everyone + [self._rng.choice(members) for members in groups.values()]

    def _deliver(self, sender: SimBus, bus: SimBus, subscription: Any, message: Message) -> None:
        rng = self._rng
        if bus.cut or (self.loss and rng.random() < self.loss):
            self.num_lost += 1
            return
        span = SLOW_S if rng.randrange(SLOW_ONE_IN) == 0 else FAST_S
        way = (sender.number, bus.number)
        when = max(self.loop.time() + rng.uniform(*span), self._last.get(way, 0.0))
        self._last[way] = when
        self.loop.call_at(
            when, self._arrive, sender.process.name, bus, bus.epoch, subscription, message,
            context=bus.process.context,
        )  # fmt: skip

    def _arrive(
        self, sender: str, bus: SimBus, epoch: int, subscription: Any, message: Message
    ) -> None:
        if epoch != bus.epoch or not self.reaches(bus):
            self.num_lost += 1
            return
        assert current() is bus.process
        share = self.slow.get(bus.process.name, 0.0)
        if share and self._rng.random() < share:
            self.num_lost += 1
            bus._notices.report_lost(subscription.inlet.subject, 1)
            return
        self.num_delivered += 1
        self._tap(sender, bus.process.name, message.subject, message.payload)
        subscription.receive(message)
