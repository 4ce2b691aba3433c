"""``Client`` and ``AsyncClient``, which run the steps of :mod:`hessquik_client.steps` with httpx."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import httpx

from hessquik_client.errors import ClientError
from hessquik_client.messages import Reply
from hessquik_client.models import AsyncModel, Model
from hessquik_client.progress import bar
from hessquik_client.steps import Gather, Pause, RetryPolicy, Send, Steps, list_models, post
from hessquik_client.transport import AsyncTransport, Body, DeadlineTransport, options, too_late, translate

__all__ = ["AsyncClient", "AsyncModel", "Client", "Model"]

T = TypeVar("T")
DocumentT = TypeVar("DocumentT")
DocumentsT = TypeVar("DocumentsT")


class _Service(Generic[DocumentT, DocumentsT]):
    """Base of the blocking and the asynchronous client."""

    def __init__(self, url: str, api_key: str | None, deadline_s: float, retries: int, concurrency: int) -> None:
        if httpx.URL(url).scheme not in {"http", "https"}:
            raise ValueError(f"url: expected http://… or https://…, got {url!r}")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("api_key: expected printable ASCII characters, got others")
        if concurrency < 1:
            raise ValueError(f"concurrency: expected a number from 1 on, got {concurrency}")
        self._url = url
        self._policy = RetryPolicy(deadline_s, retries)
        self._concurrency = concurrency
        key = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._options: dict[str, Any] = {
            "base_url": url,
            # Numbers do not get smaller by compressing, only later.
            "headers": {"accept-encoding": "identity", **key},
            "follow_redirects": False,
            "cookies": CookieJar(DefaultCookiePolicy(allowed_domains=())),  # keeps none
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._url!r})"

    def models(self) -> DocumentsT:
        """Return the service's description of every model, as in ``GET /v1/models``."""
        return self._run(list_models(self._policy))  # type: ignore[no-any-return]

    def load(self, name: str) -> DocumentT:
        """Make the service load a model's files again; needs an admin key."""
        return self._run(post(name, "load", self._policy))  # type: ignore[no-any-return]

    def unload(self, name: str, version: int | str | None = None) -> DocumentT:
        """Make the service drop a model, or one version of it, until it is loaded again; needs an admin key."""
        action = "unload" if version is None else f"unload?version={version}"
        return self._run(post(name, action, self._policy))  # type: ignore[no-any-return]

    def _run(self, steps: Steps[Any]) -> Any:
        """Run steps and return their result, or for the asynchronous client an awaitable of it."""
        raise NotImplementedError


class Client(_Service[dict[str, Any], list[dict[str, Any]]]):
    """A connection pool to one service. Threads may share it.

    Args:
        url: Address of the service, such as ``http://127.0.0.1:8000``.
        api_key: The API key to send, if the service needs one.
        deadline_s: Time limit in seconds of a call with all its retries, or of each part of a batch that is split.
            The service has an upper limit for it, two minutes unless configured.
        retries: Most retries of a request.
        concurrency: Most parts of a batch that are sent at once.
        transport: An httpx transport. By default the client uses its own, which enforces the deadline whatever the
            server does; with another one, only httpx's timeouts of each read and write apply.

    Raises:
        ValueError: the URL is not ``http://…`` or ``https://…``, the key is not printable ASCII, or a number is out
            of range.
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
        super().__init__(url, api_key, deadline_s, retries, concurrency)
        self._http = httpx.Client(transport=transport or DeadlineTransport(httpx.URL(url)), **self._options)

    def model(self, name: str, version: str | int | None = None) -> Model:
        """Return a model of the service; nothing is sent yet."""
        return Model(self._run, self._url, name, version, self._policy)

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
                case Gather():
                    self._gather(step)

    def _send(self, step: Send) -> Reply | ClientError:
        end_s = time.monotonic() + step.within_s
        try:
            with self._http.stream(**options(step)) as response:
                body = Body(step, response)
                for chunk in response.iter_bytes():
                    body.add(chunk)
                    if time.monotonic() > end_s:
                        return too_late(step)
            return body.reply()
        except ClientError as error:
            return error
        except httpx.RequestError as error:
            return translate(error, step)

    def _gather(self, step: Gather) -> None:
        with (
            bar(step) as advance,
            ThreadPoolExecutor(min(self._concurrency, len(step.conversations))) as executor,
        ):
            sizes = {
                executor.submit(self._run, steps): size
                for steps, size in zip(step.conversations, step.sizes, strict=True)
            }
            try:
                for future in as_completed(sizes):
                    future.result()
                    advance(sizes[future])
            except BaseException:
                executor.shutdown(cancel_futures=True)
                raise


class AsyncClient(_Service[Awaitable[dict[str, Any]], Awaitable[list[dict[str, Any]]]]):
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
        super().__init__(url, api_key, deadline_s, retries, concurrency)
        self._http = httpx.AsyncClient(transport=transport or AsyncTransport(httpx.URL(url)), **self._options)

    def model(self, name: str, version: str | int | None = None) -> AsyncModel:
        """Return a model of the service; nothing is sent yet."""
        return AsyncModel(self._run, self._url, name, version, self._policy)

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
                case Gather():
                    await self._gather(step)

    async def _send(self, step: Send) -> Reply | ClientError:
        try:
            async with asyncio.timeout(step.within_s), self._http.stream(**options(step)) as response:
                body = Body(step, response)
                async for chunk in response.aiter_bytes():
                    body.add(chunk)
            return body.reply()
        except ClientError as error:
            return error
        except TimeoutError:
            return too_late(step)
        except httpx.RequestError as error:
            return translate(error, step)

    async def _gather(self, step: Gather) -> None:
        room = asyncio.Semaphore(self._concurrency)
        with bar(step) as advance:

            async def run(steps: Steps[None], size: int) -> None:
                async with room:
                    await self._run(steps)
                advance(size)

            try:
                async with asyncio.TaskGroup() as group:
                    for steps, size in zip(step.conversations, step.sizes, strict=True):
                        group.create_task(run(steps, size))
            except* ClientError as errors:
                raise errors.exceptions[0] from None
