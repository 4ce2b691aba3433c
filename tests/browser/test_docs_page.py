"""The page at /docs: the whole interface, tried from the browser, without another host."""

from __future__ import annotations

import httpx
import pytest
from playwright.sync_api import BrowserContext, expect

from tests.browser.conftest import opened
from tests.live import LiveServer

pytestmark = pytest.mark.xdist_group("browser")


def test_docs_page_lists_and_tries_every_path_in_light_and_dark(server: LiveServer, context: BrowserContext) -> None:
    with opened(context, f"{server.url}/docs") as watched:
        page = watched.page
        operations = page.locator(".opblock")
        document = httpx.get(f"{server.url}/openapi.json").json()
        paths = sum(len(methods) for methods in document["paths"].values())
        assert paths > 30
        expect(operations).to_have_count(paths, timeout=60_000)
        evaluate = page.locator(".opblock", has_text="/v1/models/{model}/evaluate")
        evaluate.locator(".opblock-summary-control").click()
        evaluate.get_by_role("button", name="Try it out").click()
        evaluate.locator("tr[data-param-name=model] input").fill("peaks")
        evaluate.get_by_role("button", name="Execute").click()
        reply = evaluate.locator(".live-responses-table .response-col_description code").first
        expect(reply).to_contain_text('"gradient"', timeout=30_000)
        for scheme, colour in (("light", "rgba(0, 0, 0, 0)"), ("dark", "rgb(20, 22, 28)")):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == colour
        page.locator(".swagger-ui").first.wait_for()
        assert "invert" in page.evaluate("getComputedStyle(document.querySelector('.swagger-ui')).filter")
