"""The folder and the table, with fake workers that load or refuse models."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from hessquik_client.errors import ModelNotFound, ModelRefused, NotReady, VersionNotFound
from service.repository import ModelFile, Repository, scan
from service.workers import LoadError

FACTS = {"d": 2, "m": 1, "dtype": "float64"}


class SimulatedWorkers:
    """Fake workers, which load models unless these are refused; an event can hold loads up."""

    def __init__(self) -> None:
        self.held: dict[int, bytes] = {}
        self.loads: list[bytes] = []
        self.gate: asyncio.Event | None = None
        self.refuses: set[bytes] = set()

    async def load(self, model: int, data: bytes) -> dict[str, Any]:
        self.loads.append(data)
        self.held[model] = data
        if self.gate is not None:
            await self.gate.wait()
        if model not in self.held:
            raise LoadError("unloaded while it was loaded")
        if data in self.refuses:
            del self.held[model]
            raise LoadError("expected something else")
        return dict(FACTS)

    def unload(self, model: int) -> None:
        self.held.pop(model, None)


@pytest.fixture
def workers() -> SimulatedWorkers:
    return SimulatedWorkers()


@pytest.fixture
def repository(tmp_path: Path, workers: SimulatedWorkers) -> Repository:
    return Repository(tmp_path, workers)  # type: ignore[arg-type]


def put(root: Path, name: str, data: bytes) -> Path:
    path = root / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").replace(path)
    return path


def run(work: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 20))  # type: ignore[arg-type]


def served(repository: Repository) -> dict[tuple[str, int], str]:
    return {
        (name, version): one.state
        for name in repository.names()
        for version, one in repository.versions(name).items()
    }


def outdated(repository: Repository) -> set[int]:
    return {version for version, one in repository.versions("a").items() if one.is_outdated}


# The folder.


def test_files_are_found_by_name_and_version(tmp_path: Path) -> None:
    for name in ("b", "a", "c/2", "c/10", "c/1"):
        put(tmp_path, name, b"")
    (tmp_path / "notes.txt").write_text("")
    assert [(file.name, file.version) for file in scan(tmp_path).files] == [
        *(("a", 1), ("b", 1), ("c", 1), ("c", 2), ("c", 10)),
    ]


def make_odd_entries(root: Path) -> int:
    """Make what must be left out, and return how many of them there are."""
    put(root, "good", b"good")
    outside = root.parent / "outside"
    outside.mkdir()
    for name in ("1", "2", "3"):
        put(outside, name, b"outside")
    (root / "loop").symlink_to(root / "loop")
    (root / "circle.safetensors").symlink_to(root / "circle.safetensors")
    (root / "broken.safetensors").symlink_to(root / "nothing")
    (root / "leads_out.safetensors").symlink_to(outside / "1.safetensors")
    (root / "folder_out").symlink_to(outside)
    (root / "itself").symlink_to(root)
    (root / "parent").symlink_to("..")
    for name in ("1", "2"):
        put(root, f"no model/{name}", b"")
    # Not looked at: Kubernetes keeps the files of a volume in new hidden folders after each change.
    put(root, "..2026_11_28_15_00_00.7/1", b"")
    (root / "..data").symlink_to("..2026_11_28_15_00_00.7")
    (root / "directory.safetensors").mkdir()
    os.mkfifo(root / "fifo.safetensors")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(root / "sock.safetensors"))
    put(root, "two words", b"")
    put(root, "line\nbreak\x1b[31m", b"")
    put(root, "good/1", b"another good")
    put(root, "good/0", b"")
    put(root, "good/01", b"")
    put(root, "good/9" + "9" * 9, b"")
    os.link(root / "good.safetensors", os.fsencode(root) + b"/not-utf8-\xff.safetensors")
    return 18


def test_odd_entries_are_reported_once_each_and_left_out(
    tmp_path: Path, workers: SimulatedWorkers, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "models"
    root.mkdir()
    count = make_odd_entries(root)
    repository = Repository(root, workers)  # type: ignore[arg-type]

    async def work() -> None:
        await repository.load_all()
        for _ in range(3):
            await repository.follow()
        await repository.load("good")

    with caplog.at_level(logging.WARNING):
        run(work())
    assert served(repository) == {("good", 1): "ready"}
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "is left out" in line]) == count, "\n".join(lines)
    assert all(line.isprintable() for line in lines)
    assert lines == sorted(lines)
    assert any("good/1.safetensors is left out: good.safetensors is version 1 of good" in line for line in lines)
    for name in ("folder_out", "itself", "parent"):
        assert f"{name} is left out: it is a link that leads out of the folder" in lines
    assert "no model is left out: its name is not that of a model" in lines


def test_a_folder_that_becomes_a_link_out_of_the_folder_is_no_longer_served(
    tmp_path: Path, repository: Repository
) -> None:
    async def work() -> None:
        put(tmp_path, "a/1", b"one")
        await repository.load_all()
        moved = (tmp_path / "a").rename(tmp_path.parent / "elsewhere")
        (tmp_path / "a").symlink_to(moved)
        await repository.follow()
        assert served(repository) == {}

    run(work())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_left_out(tmp_path: Path) -> None:
    put(tmp_path, "good", b"")
    put(tmp_path, "closed/1", b"")
    (tmp_path / "closed").chmod(0)
    try:
        found, left_out, unreadable = scan(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert [file.name for file in found] == ["good"]
    assert "closed" in left_out
    assert unreadable == {"closed"}


def test_a_folder_that_is_gone_is_an_empty_one(tmp_path: Path) -> None:
    found, left_out, unreadable = scan(tmp_path / "none")
    assert (found, list(left_out), unreadable) == ([], ["."], {"."})


def test_a_fifo_that_takes_a_files_place_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(LoadError, match="regular file"):
        ModelFile("a", 1, tmp_path / "a.safetensors").read()


@pytest.mark.slow
def test_a_look_at_a_folder_takes_as_many_calls_per_file_when_the_folder_is_larger(tmp_path: Path) -> None:
    calls = 0

    def count_call(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    calls_per_file = []
    for count in (500, 2000):
        for number in range(count):
            (tmp_path / f"model{number}.safetensors").touch()
        calls = 0
        sys.setprofile(count_call)
        try:
            files = scan(tmp_path).files
        finally:
            sys.setprofile(None)
        assert len(files) == count
        calls_per_file.append(calls / count)
    assert calls_per_file[1] <= calls_per_file[0] < 100


def test_a_file_that_finds_no_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any) -> Any:
        raise MemoryError

    file = ModelFile("a", 1, put(tmp_path, "a", b"one"))
    monkeypatch.setattr("service.repository.open", no_memory, raising=False)
    with pytest.raises(LoadError, match="fits into memory"):
        file.read()


@pytest.mark.parametrize("is_new", [True, False])
def test_thousands_of_files_are_loaded_after_one_look_at_the_folder(
    tmp_path: Path, repository: Repository, workers: SimulatedWorkers, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    if not is_new:
        run(repository.load_all())
    for number in range(300):
        put(tmp_path, f"model{number}", b"%d" % number)
    scans = 0

    def counting(root: Path) -> Any:
        nonlocal scans
        scans += 1
        return scan(root)

    monkeypatch.setattr("service.repository.scan", counting)
    run(repository.load_all() if is_new else repository.follow())
    assert (scans, len(workers.held)) == (1, 300)


# Loading.


def test_a_reload_replaces_when_it_is_ready_and_frees_the_old_when_nobody_holds_it(
    tmp_path: Path, repository: Repository, workers: SimulatedWorkers
) -> None:
    async def work() -> None:
        put(tmp_path, "a", b"one")
        await repository.load("a")
        old = repository.ready("a", None)
        put(tmp_path, "a", b"two")
        with repository.holding(old):
            (new,) = await repository.load("a")
            assert repository.ready("a", None) is new is not old
            assert list(workers.held.values()) == [b"one", b"two"]
        assert list(workers.held.values()) == [b"two"]

    run(work())


def test_a_file_that_did_not_change_is_not_loaded_again(
    tmp_path: Path, repository: Repository, workers: SimulatedWorkers
) -> None:
    async def work() -> None:
        put(tmp_path, "a", b"one")
        await repository.load("a")
        put(tmp_path, "a", b"one")
        await repository.load("a")
        await repository.follow()
        assert workers.loads == [b"one"]

    run(work())


def test_a_refused_replacement_is_an_error_and_leaves_the_old_one_serving(
    tmp_path: Path, repository: Repository, workers: SimulatedWorkers
) -> None:
    async def work() -> None:
        put(tmp_path, "a", b"one")
        put(tmp_path, "a/2", b"two")
        await repository.load("a")
        workers.refuses = {b"bad"}
        put(tmp_path, "a/2", b"bad")
        with pytest.raises(ModelRefused, match="version 2: expected something else") as refused:
            await repository.load("a")
        assert [one["state"] for one in refused.value.extra["loaded"]] == ["ready", "failed"]
        assert served(repository) == {("a", 1): "ready", ("a", 2): "ready"}
        assert sorted(workers.held.values()) == [b"one", b"two"]
        assert outdated(repository) == {2}
        for data in (b"two", b"three"):  # what is served already, or something new
            put(tmp_path, "a/2", data)
            await repository.load("a")
            assert outdated(repository) == set()
            put(tmp_path, "a/2", b"bad")
            await repository.follow()
            assert outdated(repository) == {2}

    run(work())


def test_a_refused_new_model_is_shown_as_failed_and_can_be_loaded_later(
    tmp_path: Path, repository: Repository, workers: SimulatedWorkers
) -> None:
    async def work() -> None:
        workers.refuses = {b"bad"}
        put(tmp_path, "a", b"bad")
        await repository.load_all()
        assert served(repository) == {("a", 1): "failed"}
        with pytest.raises(NotReady):
            repository.ready("a", None)
        put(tmp_path, "a", b"good")
        await repository.load("a")
        assert served(repository) == {("a", 1): "ready"}

    run(work())


@pytest.mark.parametrize("is_new", [True, False])
def test_a_refused_file_is_not_tried_again_until_it_changes(
    tmp_path: Path, repository: Repository, workers: SimulatedWorkers, is_new: bool
) -> None:
    async def work() -> None:
        workers.refuses = {b"bad"}
        if not is_new:
            put(tmp_path, "a", b"one")
        await repository.load_all()
        put(tmp_path, "a", b"bad")
        for _ in range(5):
            await repository.follow()
        assert workers.loads.count(b"bad") == 1
        put(tmp_path, "a/2", b"two")
        await repository.follow()
        assert workers.loads.count(b"bad") == 1
        assert repository.default("a").file.version == 2
        put(tmp_path, "a", b"good")
        await repository.follow()
        assert served(repository) == {("a", 1): "ready", ("a", 2): "ready"}

    run(work())


def test_the_folder_is_followed(tmp_path: Path, repository: Repository, workers: SimulatedWorkers) -> None:
    async def work() -> None:
        put(tmp_path, "a/1", b"one")
        put(tmp_path, "b", b"other")
        await repository.load_all()
        put(tmp_path, "a/2", b"two")
        (tmp_path / "a/1.safetensors").unlink()
        (tmp_path / "b.safetensors").unlink()
        put(tmp_path, "c", b"new")
        await repository.follow()
        assert served(repository) == {("a", 2): "ready", ("c", 1): "ready"}
        assert sorted(workers.held.values()) == [b"new", b"two"]
        put(tmp_path, "b", b"other")
        await repository.follow()
        assert ("b", 1) in served(repository)

    run(work())


def test_one_version_that_was_unloaded_stays_so_until_the_model_is_loaded(
    tmp_path: Path, repository: Repository, workers: SimulatedWorkers
) -> None:
    async def work() -> None:
        for version in "123":
            put(tmp_path, f"a/{version}", version.encode())
        await repository.load_all()
        assert repository.default("a").file.version == 3
        repository.unload("a", 3)
        assert sorted(workers.held.values()) == [b"1", b"2"]
        assert repository.default("a").file.version == 2
        with pytest.raises(VersionNotFound):
            repository.unload("a", 3)
        loads = len(workers.loads)
        put(tmp_path, "a/3", b"changed")
        for _ in range(3):
            await repository.follow()
        assert (len(workers.loads), repository.default("a").file.version) == (loads, 2)
        put(tmp_path, "a/1", b"one")
        await repository.follow()
        assert sorted(workers.held.values()) == [b"2", b"one"]
        await repository.load("a")
        assert repository.default("a").file.version == 3
        assert sorted(workers.held.values()) == [b"2", b"changed", b"one"]
        for version in (3, 2, 1):
            repository.unload("a", version)
        assert served(repository) == {}
        assert workers.held == {}

    run(work())


def test_a_version_that_is_unloaded_while_it_is_loaded_stays_unloaded(
    tmp_path: Path, repository: Repository, workers: SimulatedWorkers
) -> None:
    async def work() -> None:
        put(tmp_path, "a/1", b"one")
        put(tmp_path, "a/2", b"two")
        await repository.load_all()
        put(tmp_path, "a/2", b"new")
        workers.gate = asyncio.Event()
        loading = asyncio.ensure_future(repository.load("a"))
        while b"new" not in workers.loads:
            await asyncio.sleep(0.001)
        repository.unload("a", 2)
        workers.gate.set()
        with pytest.raises(ModelRefused, match="unloaded while it was loaded"):
            await loading
        assert served(repository) == {("a", 1): "ready"}
        assert list(workers.held.values()) == [b"one"]

    run(work())


def test_a_model_that_is_unloaded_between_its_files_leaves_no_entry(
    tmp_path: Path, repository: Repository, workers: SimulatedWorkers
) -> None:
    async def work() -> None:
        put(tmp_path, "a/1", b"one")
        put(tmp_path, "a/2", b"two")
        workers.gate = asyncio.Event()
        loading = asyncio.ensure_future(repository.load("a"))
        while b"one" not in workers.loads:
            await asyncio.sleep(0.001)
        repository.unload("a")
        workers.gate.set()
        with pytest.raises(ModelRefused, match="unloaded while it was loaded"):
            await loading
        assert (served(repository), workers.held) == ({}, {})

    run(work())


def test_an_unload_while_the_folder_is_looked_at_is_the_later_word(tmp_path: Path, repository: Repository) -> None:
    async def work() -> None:
        put(tmp_path, "a", b"one")
        await repository.load_all()
        loading = asyncio.ensure_future(repository.load("a"))
        await asyncio.sleep(0)
        repository.unload("a")
        assert await loading == []
        assert served(repository) == {}

    run(work())


def test_a_load_of_what_is_not_there_changes_nothing(tmp_path: Path, repository: Repository) -> None:
    async def work() -> None:
        put(tmp_path, "a", b"one")
        await repository.load_all()
        repository.unload("a")
        (tmp_path / "a.safetensors").unlink()
        await repository.follow()
        with pytest.raises(ModelNotFound):
            await repository.load("a")
        put(tmp_path, "a", b"two")
        await repository.follow()
        assert served(repository) == {}

    run(work())


def test_a_version_that_was_unloaded_and_removed_is_not_looked_for_again(
    tmp_path: Path, repository: Repository, workers: SimulatedWorkers
) -> None:
    async def work() -> None:
        workers.refuses = {b"bad"}
        for version in "12":
            put(tmp_path, f"a/{version}", version.encode())
        await repository.load_all()
        repository.unload("a", 2)
        (tmp_path / "a/2.safetensors").unlink()
        await repository.load("a")
        put(tmp_path, "a/1", b"bad")
        for _ in range(5):
            await repository.follow()
        assert workers.loads.count(b"bad") == 1

    run(work())


def test_a_model_without_versions_is_no_model(tmp_path: Path, repository: Repository) -> None:
    """One version was unloaded, then the file of the other was removed."""

    async def work() -> None:
        put(tmp_path, "a/1", b"one")
        put(tmp_path, "a/2", b"two")
        await repository.load_all()
        repository.unload("a", 1)
        (tmp_path / "a/2.safetensors").unlink()
        await repository.follow()
        assert repository.names() == []

    run(work())


@pytest.mark.parametrize("hidden", [".", "a"], ids=["the whole folder", "a model's own"])
def test_a_folder_that_cannot_be_read_changes_nothing(
    tmp_path: Path, repository: Repository, caplog: pytest.LogCaptureFixture, hidden: str
) -> None:
    async def work() -> None:
        put(tmp_path, "a/1", b"one")
        put(tmp_path, "b", b"other")
        await repository.load_all()
        before = served(repository)
        moved = tmp_path / hidden
        moved.rename(tmp_path.parent / "moved")
        if hidden == "a":
            moved.symlink_to(moved)  # a circle cannot be read
        for _ in range(3):
            await repository.follow()
        with pytest.raises(ModelRefused, match="folder that can be read"):
            await repository.load("a")
        assert served(repository) == before
        if hidden == "a":
            moved.unlink()
        (tmp_path.parent / "moved").rename(moved)
        put(tmp_path, "c", b"new")
        await repository.follow()
        assert served(repository) == before | {("c", 1): "ready"}

    with caplog.at_level(logging.WARNING):
        run(work())
    assert len([record for record in caplog.records if "is left out" in record.getMessage()]) == 1


def test_what_was_unloaded_stays_so_until_it_is_loaded(
    tmp_path: Path, repository: Repository, workers: SimulatedWorkers
) -> None:
    async def work() -> None:
        put(tmp_path, "a", b"one")
        await repository.load_all()
        repository.unload("a")
        assert workers.held == {}
        await repository.follow()
        put(tmp_path, "a", b"two")
        await repository.follow()
        assert served(repository) == {}
        with pytest.raises(ModelNotFound):
            repository.unload("a")
        await repository.load("a")
        assert served(repository) == {("a", 1): "ready"}
        put(tmp_path, "a", b"three")
        await repository.follow()
        assert list(workers.held.values()) == [b"three"]

    run(work())


def test_two_files_of_one_version_do_not_alternate(
    tmp_path: Path, repository: Repository, workers: SimulatedWorkers
) -> None:
    async def work() -> None:
        put(tmp_path, "a", b"file")
        put(tmp_path, "a/1", b"file in a folder")
        await repository.load_all()
        for _ in range(3):
            await repository.load("a")
            await repository.follow()
        assert workers.loads == [b"file"]
        (tmp_path / "a.safetensors").unlink()
        await repository.follow()
        assert list(workers.held.values()) == [b"file in a folder"]

    run(work())


# Races.


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("when", ["early", "late"])
def test_an_unload_during_a_load_wins_and_leaves_nothing(
    tmp_path: Path, repository: Repository, workers: SimulatedWorkers, is_new: bool, when: str
) -> None:
    async def work() -> None:
        if not is_new:
            put(tmp_path, "a", b"one")
            await repository.load("a")
        put(tmp_path, "a", b"two")
        workers.gate = asyncio.Event()
        loading = asyncio.ensure_future(repository.load("a"))
        while b"two" not in workers.loads:
            await asyncio.sleep(0)
        repository.unload("a")
        if when == "late":
            await asyncio.sleep(0.01)
        workers.gate.set()
        with pytest.raises(ModelRefused, match="unloaded"):
            await loading
        assert served(repository) == {}
        assert workers.held == {}
        await repository.load("a")
        assert served(repository) == {("a", 1): "ready"}

    run(work())


def test_loads_of_one_model_follow_each_other_and_of_others_go_beside(
    tmp_path: Path, repository: Repository, workers: SimulatedWorkers
) -> None:
    async def work() -> None:
        put(tmp_path, "a", b"one")
        workers.gate = gate = asyncio.Event()
        first = asyncio.ensure_future(repository.load("a"))
        while not workers.loads:
            await asyncio.sleep(0)
        put(tmp_path, "a", b"two")
        second = asyncio.ensure_future(repository.load("a"))
        workers.gate = None
        put(tmp_path, "b", b"other")
        await repository.load("b")
        assert b"two" not in workers.loads
        gate.set()
        await asyncio.gather(first, second)
        assert sorted(workers.held.values()) == [b"other", b"two"]

    run(work())


@pytest.mark.parametrize("is_good", [True, False], ids=["served", "refused"])
def test_a_file_that_is_removed_while_it_is_loaded_is_not_served_on(
    tmp_path: Path, repository: Repository, workers: SimulatedWorkers, is_good: bool
) -> None:
    async def work() -> None:
        workers.gate, workers.refuses = asyncio.Event(), set() if is_good else {b"one"}
        path = put(tmp_path, "a", b"one")
        loading = asyncio.ensure_future(repository.load("a"))
        while not workers.loads:
            await asyncio.sleep(0.001)
        path.unlink()
        following = asyncio.ensure_future(repository.follow())
        await asyncio.wait({following}, timeout=0.05)
        workers.gate.set()
        await asyncio.wait({loading, following})
        await repository.follow()
        assert (served(repository), workers.held) == ({}, {})

    run(work())


class SlowScan:
    """A scan of the folder, the first of which returns late."""

    def __init__(self) -> None:
        self.is_done, self.may_return = threading.Event(), threading.Event()

    def __call__(self, root: Path) -> Any:
        found = scan(root)
        if not self.is_done.is_set():
            self.is_done.set()
            assert self.may_return.wait(10)
        return found


@pytest.mark.parametrize("first", ["load_all", "follow", "load"])
def test_an_old_look_at_the_folder_does_not_undo_a_later_load(
    tmp_path: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    async def work() -> None:
        put(tmp_path, "a/1", b"one")
        slow = SlowScan()
        monkeypatch.setattr("service.repository.scan", slow)
        old = asyncio.ensure_future(repository.load("a") if first == "load" else getattr(repository, first)())
        while not slow.is_done.is_set():
            await asyncio.sleep(0.001)
        put(tmp_path, "a/2", b"two")
        new = asyncio.ensure_future(repository.load("a"))
        await asyncio.wait({new}, timeout=0.05)
        slow.may_return.set()
        await asyncio.gather(old, new)
        assert served(repository) == {("a", 1): "ready", ("a", 2): "ready"}

    run(work())


def test_loads_of_what_is_not_there_leave_nothing(repository: Repository) -> None:
    async def work() -> None:
        for name in "abc":
            with pytest.raises(ModelNotFound):
                await repository.load(name)
        assert not repository._locks

    run(work())


def test_a_caller_that_leaves_does_not_stop_a_load(
    tmp_path: Path, repository: Repository, workers: SimulatedWorkers
) -> None:
    async def work() -> None:
        put(tmp_path, "a", b"one")
        workers.gate = asyncio.Event()
        loading = asyncio.ensure_future(repository.load("a"))
        while not workers.loads:
            await asyncio.sleep(0)
        loading.cancel()
        await asyncio.sleep(0)
        workers.gate.set()
        while served(repository) != {("a", 1): "ready"}:
            await asyncio.sleep(0.001)

    run(work())


def test_a_model_that_a_worker_refuses_later_is_failed(tmp_path: Path, repository: Repository) -> None:
    async def work() -> None:
        put(tmp_path, "a", b"one")
        (one,) = await repository.load("a")
        repository.refuse(one.id, "out of memory")
        assert served(repository) == {("a", 1): "failed"}
        assert one.reason == "out of memory"
        (again,) = await repository.load("a")
        assert again.state == "ready"

    run(work())


def test_whatever_is_done_in_whatever_order_the_workers_hold_what_is_served(
    tmp_path: Path, repository: Repository, workers: SimulatedWorkers
) -> None:
    random_ = random.Random(3)
    workers.refuses = {b"%d" % number for number in range(0, 400, 7)}

    async def act(number: int) -> None:
        await asyncio.sleep(random_.uniform(0, 0.3))
        name = random_.choice(("a", "b/1", "b/2"))
        action: Callable[[], Any] = random_.choice(
            (
                lambda: put(tmp_path, name, b"%d" % number),
                lambda: (tmp_path / f"{name}.safetensors").unlink(missing_ok=True),
                lambda: repository.load(name[0]),
                lambda: repository.load(name[0]),
                lambda: repository.unload(name[0]),
                repository.follow,
            )
        )
        try:
            found = action()
            if asyncio.iscoroutine(found):
                await found
        except (ModelNotFound, ModelRefused):
            pass

    async def work() -> None:
        await asyncio.gather(*(act(number) for number in range(400)))
        for name in ("a", "b"):
            repository._unloaded = {key: when for key, when in repository._unloaded.items() if key[0] != name}
        await repository.follow()
        ready = {one.id for name in repository.names() for one in repository.versions(name).values() if one.facts}
        assert set(workers.held) == ready

    run(work())
