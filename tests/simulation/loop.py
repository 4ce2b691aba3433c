"""An event loop whose time is simulated, and which runs one callback at a time."""

from __future__ import annotations

import asyncio
import weakref
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from heapq import heappop, heappush
from itertools import count
from typing import Any


class SimulatedLoop(asyncio.AbstractEventLoop):
    """The part of an event loop that tasks, locks, timers and executors need.

    Args:
        delay_s: Returns the time until a call in another thread begins, and until its result arrives.

    Attributes:
        errors: Uncaught errors.
    """

    def __init__(self, delay_s: Callable[[], float]) -> None:
        self.now = 0.0
        self.errors: list[dict[str, Any]] = []
        self._delay_s = delay_s
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._order = count()
        self._tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def call_soon(self, callback: Any, *arguments: Any, context: Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, arguments, self, context)
        self._ready.append(handle)
        return handle

    def call_at(
        self, when: float, callback: Any, *arguments: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(max(when, self.now), callback, arguments, self, context)
        heappush(self._timers, (timer.when(), next(self._order), timer))
        return timer

    def call_later(
        self, delay: float, callback: Any, *arguments: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *arguments, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], **_: Any) -> asyncio.Task[Any]:  # type: ignore[override]
        task = asyncio.Task(coro, loop=self)
        self._tasks.add(task)
        return task

    def run_in_executor(self, executor: Any, func: Any, *arguments: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Call a function after a delay, in one callback; its result arrives after another delay."""
        future = self.create_future()

        def arrive(end: Callable[[Any], None], result: Any) -> None:
            if not future.cancelled():
                end(result)

        def call() -> None:
            if not future.cancelled():
                try:
                    end: tuple[Callable[[Any], None], Any] = future.set_result, func(*arguments)
                except Exception as error:
                    end = future.set_exception, error
                self.call_later(self._delay_s(), arrive, *end)

        self.call_later(self._delay_s(), call)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.errors.append(context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: cancelled timers are skipped when they are due."""

    def next_s(self) -> float | None:
        """Return when the next callback is due, if there is one."""
        while self._timers and self._timers[0][2].cancelled():
            heappop(self._timers)
        if self._ready:
            return self.now
        return self._timers[0][0] if self._timers else None

    def step(self) -> bool:
        """Run the next callback; return whether there was one."""
        if (when_s := self.next_s()) is None:
            return False
        if not self._ready:
            self.now = max(self.now, when_s)
            self._ready.append(heappop(self._timers)[2])
        handle = self._ready.popleft()
        if not handle.cancelled():
            self.run(handle._run)
        return True

    def abandon(self) -> None:
        """Close unfinished coroutines, so that a simulation that ended with an error leaves none to the collector."""
        for task in list(self._tasks):
            if not task.done():
                task.get_coro().close()  # type: ignore[union-attr]
        self._ready.clear()
        self._timers.clear()

    def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function as a callback would, with this loop as the running one."""
        events._set_running_loop(self)
        try:
            return work(*arguments)
        finally:
            events._set_running_loop(None)
