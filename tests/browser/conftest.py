"""A real headless Chromium, Debian's, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import (
    BrowserContext,
    ConsoleMessage,
    Page,
    Playwright,
    ViewportSize,
    expect,
    sync_playwright,
)

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--process-per-site",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# Not for the whole session: while it runs, nothing else in this process may start an event loop.
@pytest.fixture(scope="package")
def playwright() -> Iterator[Playwright]:
    if CHROMIUM is None:
        pytest.skip("no chromium is installed (Debian: apt-get install chromium)")
    expect.set_options(timeout=30_000)
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="package")
def context(playwright: Playwright, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    """Yield one browser with a new and empty profile."""
    profile = tmp_path_factory.mktemp("profile")
    context = playwright.chromium.launch_persistent_context(
        profile,
        executable_path=CHROMIUM,
        args=FLAGS,
        viewport={"width": 1440, "height": 1000},
        reduced_motion="reduce",  # nothing looks at the frames of a transition, which are drawn without a GPU
    )
    context.set_default_timeout(30_000)
    yield context
    context.close()


class Watched:
    """A page, what it asked for, and what went wrong in it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.urls: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.urls.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._hear)

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def asked(self, part: str) -> int:
        """Return the number of requests with this in their URL."""
        return sum(part in url for url in self.urls)


@contextmanager
def opened(
    context: BrowserContext,
    url: str,
    expected_error: str | None = None,
    viewport: ViewportSize | None = None,
    has_clock: bool = False,
) -> Iterator[Watched]:
    """Yield a page; check at the end that it had only expected errors and contacted only its own server.

    With ``has_clock`` the test may move the page's time on.
    """
    watched = Watched(context.new_page())
    if viewport is not None:
        watched.page.set_viewport_size(viewport)
    if has_clock:
        watched.page.clock.install()
    watched.page.goto(url)
    yield watched
    watched.page.close()
    origin = "/".join(url.split("/")[:3])
    assert [error for error in watched.errors if not (expected_error and expected_error in error)] == []
    assert [asked for asked in watched.urls if not asked.startswith((origin, "data:", "blob:" + origin))] == []
