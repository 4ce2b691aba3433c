"""A service in harsh surroundings: descriptors, working directory, readers of its log, signals at any moment."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.live import ROOT, LiveServer, free_ports, wait_until
from tests.whole import choose

#: Runs the command given to it from a folder, with some descriptors closed.
PLACED = (
    "import os, sys; os.chdir({folder!r}); [os.close(one) for one in {closed}]; "
    "os.execv(sys.executable, [sys.executable, '-m', 'service', *sys.argv[1:]])"
)
#: Time within which a service answers, and ends, though nobody reads what it writes.
PROMPT_S = choose(10.0, 3.0)


def test_standard_descriptors_that_are_closed_are_opened(tmp_path: Path) -> None:
    code = (
        "import os, sys; sys.argv = ['hessquik', 'serve']; from service.__main__ import prepare; prepare(); "
        "import signal; print('x'); print('y', file=sys.stderr); "
        "good = all(os.fstat(one) and os.get_inheritable(one) for one in range(3)); "
        "good &= signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and 'pydantic' not in sys.modules; "
        "os.write(int(sys.orig_argv[-1]), b'good' if good else b'bad')"
    )
    read, write = os.pipe()
    close = "".join(f"os.close({one}); " for one in range(3))
    run = f"import os, sys; {close} os.execv(sys.executable, [sys.executable, '-c', {code!r}, '{write}'])"
    with os.fdopen(read) as reader:
        ended = subprocess.run([sys.executable, "-c", run], cwd=ROOT, pass_fds=[write], check=False, timeout=60)
        os.close(write)
        assert (ended.returncode, reader.read()) == (0, "good")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_during_the_imports_is_no_failure(number: signal.Signals) -> None:
    """A container's first process gets no signal that it does not handle, and would be killed half a minute later."""
    code = (
        "import os, sys, time; sys.argv = ['hessquik', 'serve']; from service.__main__ import prepare; prepare(); "
        f"os.kill(os.getpid(), {number:d}); time.sleep(60)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False, timeout=50)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize("processes", choose([2], [1, 2]))
def test_a_service_goes_on_without_its_folder_and_standard_output(
    processes: int, shipped_models: Path, tmp_path: Path
) -> None:
    """Workers and front ends are replaced; audit and configuration are logged at any level."""
    here = tmp_path / "here"
    here.mkdir()
    code = PLACED.format(folder=str(here), closed=[0, 1])
    settings = {"processes": processes, "access_log": True, "log_level": "error", "admin_keys": "boss"}
    (port,) = free_ports(1)
    server = LiveServer(shipped_models, settings=settings, command=("-c", code), port=port)
    wait_until(server.is_ready)
    here.rmdir()
    before = psutil.Process(server.process.pid).children()
    for child in before:
        child.kill()
    psutil.wait_procs(before, 10)
    wait_until(server.is_ready)
    headers = {"Authorization": "Bearer boss", "X-Request-Id": "load-1"}
    assert httpx.post(f"{server.url}/v1/models/peaks/load", headers=headers).status_code == 200
    assert len(server.workers()) == 1
    for text in (" INFO    service.logs: settings: ", " INFO    service.audit: load peaks: status 200"):
        server.wait_for_line(text)
    assert server.stop() == 0
    assert not any(line.startswith("{") for line in server.log), "the access log went to another descriptor"


@pytest.mark.parametrize("processes", choose([1], [1, 2]))
def test_a_log_that_nobody_reads_blocks_neither_requests_nor_the_end(processes: int, shipped_models: Path) -> None:
    read, write = os.pipe()
    settings = {"processes": processes, "access_log": True, "admin_keys": "boss"}
    (port,) = free_ports(1)
    with os.fdopen(read, "rb", buffering=0) as reader:
        server = LiveServer(shipped_models, settings=settings, stdout=write, stderr=write, port=port)
        os.close(write)
        wait_until(server.is_ready)
        with open(f"/proc/self/fd/{read}", "wb", buffering=0, opener=_without_waiting) as filler:
            while filler.write(b"x"):
                pass
        for _ in range(20):  # to both front ends, with lines of the access log and of the audit
            answer = httpx.post(
                f"{server.url}/v1/models/peaks/load", headers={"Authorization": "Bearer boss"}, timeout=PROMPT_S
            )
            assert answer.status_code == 200
            assert httpx.get(f"{server.url}/livez", timeout=PROMPT_S).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PROMPT_S) == 0
        assert reader.read(1)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_NONBLOCK)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_at_any_moment_of_the_start_is_no_failure(processes: int, shipped_models: Path) -> None:
    """Nor do hangups on the way end it; from when its modules are imported."""
    moments = [("Started server process", 0.0), ("is up: torch", 0.0)]
    for line, pause_s in moments + choose([], [(moments[0][0], random.uniform(0, 1.5)) for _ in range(10)]):
        server = LiveServer(shipped_models, settings={"processes": processes})
        server.wait_for_line(line)
        time.sleep(pause_s)
        server.process.send_signal(signal.SIGTERM)
        while server.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                server.process.send_signal(signal.SIGHUP)
            time.sleep(0.001)
        assert server.stop() == 0, (line, pause_s, server.log)
        assert not any("Traceback" in line for line in server.log), (line, pause_s, server.log)


def test_the_last_lines_are_written(shipped_models: Path) -> None:
    """Also those of a start that fails."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = LiveServer(shipped_models, port=taken.getsockname()[1])
        assert server.process.wait(60) == 3
        server.stop()
    assert [line for line in server.log if "Address already in use" in line]
    assert [line for line in server.log if " service.logs: settings: " in line]
