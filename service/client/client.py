"""``Client`` and ``AsyncClient``: the steps of :mod:`service.client.steps`, carried out with httpx."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
import numpy.typing as npt

from service.client.errors import ClientError, ConnectionLost, DeadlineExceeded
from service.client.messages import Answer, Array, ArrayLike, Reply, Request, ask, parse_document
from service.client.steps import Conversation, Pause, Persistence, Send, Steps, Together, exchange, post

__all__ = ["AsyncClient", "AsyncModel", "Client", "Model"]

T = TypeVar("T")

#: Seconds to connect; after that another try is better than more patience.
CONNECT_S = 5.0


class Client:
    """A connection pool to one service. Threads may share it.

    Args:
        url: Where the service is, such as ``http://127.0.0.1:8000``.
        api_key: The key to send, where the service wants one.
        deadline_s: Time for a call with all its retries, or for each part of a batch that is split; the service has a
            limit for it, two minutes unless configured.
        retries: Most retries of a request.
        concurrency: Most parts of a batch that are sent at once.
        transport: What carries requests; httpx's own pool if not given.

    Raises:
        ValueError: the URL is not one of HTTP.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        deadline_s: float = 30.0,
        retries: int = 3,
        concurrency: int = 4,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Open no connection yet."""
        self._persistence = Persistence(deadline_s, retries)
        self._concurrency = concurrency
        self._http = httpx.Client(transport=transport, **_http_options(url, api_key))

    def model(self, name: str, version: str | int | None = None) -> Model:
        """A model of the service; nothing is asked yet."""
        return Model(self, name, version)

    def models(self) -> list[dict[str, Any]]:
        """What ``GET /v1/models`` says of every model."""
        return list(self._run(_list_models(self._persistence)))

    def load(self, name: str) -> dict[str, Any]:
        """Have a model read from the service's disk again; needs an admin key."""
        return self._run(post(f"/v1/models/{quote(name, safe='')}/load", self._persistence))

    def unload(self, name: str) -> dict[str, Any]:
        """Have a model dropped; needs an admin key."""
        return self._run(post(f"/v1/models/{quote(name, safe='')}/unload", self._persistence))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        """Carry out steps."""
        outcome: Any = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            match step:
                case Send():
                    outcome = self._send(step)
                case Pause(seconds):
                    time.sleep(seconds)
                case Together():
                    outcome = self._run_together(step)

    def _send(self, step: Send) -> Reply | ClientError:
        end = time.monotonic() + step.within_s
        try:
            with self._http.stream(*_arguments(step), **_options(step)) as response:
                chunks = []
                for chunk in response.iter_bytes():
                    chunks.append(chunk)
                    if time.monotonic() > end:
                        return _too_late(step)
                return Reply(response.status_code, _lower(response.headers), b"".join(chunks))
        except httpx.RequestError as error:
            return _translate(error, step)

    def _run_together(self, step: Together) -> list[Any]:
        with (
            _progress(step) as advance,
            ThreadPoolExecutor(min(self._concurrency, len(step.conversations))) as executor,
        ):
            futures = [executor.submit(self._run, steps) for steps in step.conversations]
            rows = dict(zip(futures, step.rows, strict=True))
            try:
                for future in as_completed(futures):
                    future.result()
                    advance(rows[future])
            except BaseException:
                executor.shutdown(cancel_futures=True)
                raise
        return [future.result() for future in futures]


class Model:
    """One model of a service: exact derivatives as functions of points.

    Points may be one, shape (d,), or a batch, shape (n, d); lists, numpy arrays and torch tensors are taken, numpy
    arrays come back.
    """

    def __init__(self, client: Client, name: str, version: str | int | None = None) -> None:
        """Nothing is asked yet."""
        self._client = client
        self._conversation = Conversation(name, None if version is None else str(version), client._persistence)

    def describe(self) -> dict[str, Any]:
        """What the service says of the model: sizes, dtype, metadata, architecture, limits."""
        return self._client._run(self._conversation.describe())

    def value(self, x: ArrayLike, *, weights: ArrayLike | None = None, dtype: npt.DTypeLike | None = None) -> Array:
        """f, shape (n, m)."""
        return self.evaluate(x, ["value"], weights=weights, dtype=dtype)["value"]

    def gradient(
        self, x: ArrayLike, *, weights: ArrayLike | None = None, dtype: npt.DTypeLike | None = None
    ) -> Array:
        """∂f_j/∂x_a, shape (n, d, m)."""
        return self.evaluate(x, ["gradient"], weights=weights, dtype=dtype)["gradient"]

    def hessian(self, x: ArrayLike, *, weights: ArrayLike | None = None, dtype: npt.DTypeLike | None = None) -> Array:
        """∂²f_j/∂x_a∂x_b, shape (n, d, d, m)."""
        return self.evaluate(x, ["hessian"], weights=weights, dtype=dtype)["hessian"]

    def laplacian(
        self, x: ArrayLike, *, weights: ArrayLike | None = None, dtype: npt.DTypeLike | None = None
    ) -> Array:
        """Σ_a ∂²f_j/∂x_a², shape (n, m)."""
        return self.evaluate(x, ["laplacian"], weights=weights, dtype=dtype)["laplacian"]

    def evaluate(
        self,
        x: ArrayLike,
        quantities: Sequence[str] = ("value",),
        *,
        weights: ArrayLike | None = None,
        directions: ArrayLike | None = None,
        dtype: npt.DTypeLike | None = None,
        progress: bool = False,
    ) -> Answer:
        """Any set of quantities in one pass.

        Args:
            x: Points, (d,) or (n, d). A batch over the service's limits is split and sent concurrently.
            quantities: Any of value, gradient, hessian, laplacian, hessian_diagonal, jvp, hvp, curvature.
            weights: (m,) or (n, m): derivatives of Σ_j weights_j f_j, and m becomes 1.
            directions: (k, d) or (n, k, d), for jvp, hvp and curvature.
            dtype: float32 or float64 to compute in; the model's own if not given.
            progress: Whether to draw a bar over the parts of a split batch; needs ``rich``.

        Raises:
            ClientError: there is no answer; one class per code, see :mod:`service.client.errors`.
            TypeError: something is no array of numbers.
            ValueError: x is neither one point nor a batch.
        """
        question = ask(x, quantities, weights, directions, dtype)
        return self._client._run(self._conversation.evaluate(question, progress))


class AsyncClient:
    """:class:`Client` for asyncio: the same arguments and methods, awaited."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        deadline_s: float = 30.0,
        retries: int = 3,
        concurrency: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Open no connection yet."""
        self._persistence = Persistence(deadline_s, retries)
        self._concurrency = concurrency
        self._http = httpx.AsyncClient(transport=transport, **_http_options(url, api_key))

    def model(self, name: str, version: str | int | None = None) -> AsyncModel:
        """A model of the service; nothing is asked yet."""
        return AsyncModel(self, name, version)

    async def models(self) -> list[dict[str, Any]]:
        """What ``GET /v1/models`` says of every model."""
        return list(await self._run(_list_models(self._persistence)))

    async def load(self, name: str) -> dict[str, Any]:
        """Have a model read from the service's disk again; needs an admin key."""
        return await self._run(post(f"/v1/models/{quote(name, safe='')}/load", self._persistence))

    async def unload(self, name: str) -> dict[str, Any]:
        """Have a model dropped; needs an admin key."""
        return await self._run(post(f"/v1/models/{quote(name, safe='')}/unload", self._persistence))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        """Carry out steps."""
        outcome: Any = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            match step:
                case Send():
                    outcome = await self._send(step)
                case Pause(seconds):
                    await asyncio.sleep(seconds)
                case Together():
                    outcome = await self._run_together(step)

    async def _send(self, step: Send) -> Reply | ClientError:
        try:
            async with asyncio.timeout(step.within_s):
                response = await self._http.request(*_arguments(step), **_options(step))
            return Reply(response.status_code, _lower(response.headers), response.content)
        except TimeoutError:
            return _too_late(step)
        except httpx.RequestError as error:
            return _translate(error, step)

    async def _run_together(self, step: Together) -> list[Any]:
        room = asyncio.Semaphore(self._concurrency)
        with _progress(step) as advance:

            async def run(steps: Steps[Any], rows: int) -> Any:
                async with room:
                    result = await self._run(steps)
                advance(rows)
                return result

            tasks = [asyncio.ensure_future(run(*pair)) for pair in zip(step.conversations, step.rows, strict=True)]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()


class AsyncModel:
    """:class:`Model` for asyncio."""

    def __init__(self, client: AsyncClient, name: str, version: str | int | None = None) -> None:
        """Nothing is asked yet."""
        self._client = client
        self._conversation = Conversation(name, None if version is None else str(version), client._persistence)

    async def describe(self) -> dict[str, Any]:
        """What the service says of the model: sizes, dtype, metadata, architecture, limits."""
        return await self._client._run(self._conversation.describe())

    async def value(
        self, x: ArrayLike, *, weights: ArrayLike | None = None, dtype: npt.DTypeLike | None = None
    ) -> Array:
        """f, shape (n, m)."""
        return (await self.evaluate(x, ["value"], weights=weights, dtype=dtype))["value"]

    async def gradient(
        self, x: ArrayLike, *, weights: ArrayLike | None = None, dtype: npt.DTypeLike | None = None
    ) -> Array:
        """∂f_j/∂x_a, shape (n, d, m)."""
        return (await self.evaluate(x, ["gradient"], weights=weights, dtype=dtype))["gradient"]

    async def hessian(
        self, x: ArrayLike, *, weights: ArrayLike | None = None, dtype: npt.DTypeLike | None = None
    ) -> Array:
        """∂²f_j/∂x_a∂x_b, shape (n, d, d, m)."""
        return (await self.evaluate(x, ["hessian"], weights=weights, dtype=dtype))["hessian"]

    async def laplacian(
        self, x: ArrayLike, *, weights: ArrayLike | None = None, dtype: npt.DTypeLike | None = None
    ) -> Array:
        """Σ_a ∂²f_j/∂x_a², shape (n, m)."""
        return (await self.evaluate(x, ["laplacian"], weights=weights, dtype=dtype))["laplacian"]

    async def evaluate(
        self,
        x: ArrayLike,
        quantities: Sequence[str] = ("value",),
        *,
        weights: ArrayLike | None = None,
        directions: ArrayLike | None = None,
        dtype: npt.DTypeLike | None = None,
        progress: bool = False,
    ) -> Answer:
        """Any set of quantities in one pass; arguments and errors are those of :meth:`Model.evaluate`."""
        question = ask(x, quantities, weights, directions, dtype)
        return await self._client._run(self._conversation.evaluate(question, progress))


def _list_models(persistence: Persistence) -> Steps[list[dict[str, Any]]]:
    document = parse_document((yield from exchange(Request("GET", "/v1/models"), persistence)))
    return list(document["models"])


def _http_options(url: str, api_key: str | None) -> dict[str, Any]:
    """What both of httpx's clients are made with."""
    if httpx.URL(url).scheme not in {"http", "https"}:
        raise ValueError(f"url: expected http://… or https://…, got {url!r}")
    key = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    # Numbers do not get smaller by compressing, only later.
    return {"base_url": url, "headers": {"accept-encoding": "identity", **key}, "follow_redirects": False}


def _arguments(step: Send) -> tuple[str, str]:
    return step.request.method, step.request.target


def _options(step: Send) -> dict[str, Any]:
    deadline_ms = max(1, math.floor(step.within_s * 1000))
    return {
        "content": step.request.body or None,
        "headers": {**step.request.headers, "x-deadline-ms": str(deadline_ms)},
        "timeout": httpx.Timeout(step.within_s, connect=min(CONNECT_S, step.within_s)),
    }


def _lower(headers: httpx.Headers) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _translate(error: httpx.RequestError, step: Send) -> ClientError:
    """Errors of httpx in our words; what broke may be tried again, what took all the time may not."""
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return _too_late(step)
    return ConnectionLost(f"expected a whole reply, the connection broke: {type(error).__name__}: {error}")


def _too_late(step: Send) -> DeadlineExceeded:
    return DeadlineExceeded(f"expected an answer within {step.within_s:.3f} s, there was none", status=0)


@contextmanager
def _progress(step: Together) -> Iterator[Callable[[int], None]]:
    """A bar over rows, or nothing."""
    if not step.shows_progress:
        yield lambda rows: None
        return
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        *Progress.get_default_columns()[:-1],
        MofNCompleteColumn(),
        TextColumn("points"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("evaluating", total=sum(step.rows))
        yield lambda rows: bar.advance(task, rows)
