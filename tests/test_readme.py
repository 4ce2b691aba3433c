"""The README's examples, run as they stand."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.live import ROOT, LiveServer

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
URL = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def test_the_curl_example_gets_the_documented_reply(server: LiveServer) -> None:
    (command,) = [text for text in blocks("console") if text.startswith("curl")]
    ended = subprocess.run(
        ["bash", "-c", command.replace(URL, server.url)], capture_output=True, text=True, check=True, timeout=60
    )
    got, documented = json.loads(ended.stdout), json.loads(blocks("json")[0])
    assert list(got) == list(documented)
    assert (got["model"], got["version"]) == (documented["model"], documented["version"])
    # Another processor may round the last digit differently.
    assert got["value"] == pytest.approx(documented["value"], rel=1e-12)
    np.testing.assert_allclose(got["gradient"], documented["gradient"], rtol=1e-12)


@pytest.mark.parametrize(("code", "output"), list(zip(blocks("python"), blocks("text"), strict=True)))
def test_the_python_examples_print_what_is_documented(server: LiveServer, code: str, output: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", code.replace(URL, server.url)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.stdout == output, ended.stderr


def test_every_link_of_the_top_documents_leads_somewhere() -> None:
    documents = sorted([*ROOT.glob("*.md"), *ROOT.glob("paper/*.md")])
    assert len(documents) >= 6
    for document in documents:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            assert target.startswith("http") or (document.parent / target).exists(), f"{document.name}: {target}"
