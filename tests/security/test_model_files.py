"""Model files are data: a damaged one never loads, even in part, and nothing in one is ever run."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hessquik import FormatError, storage
from tests.live import ROOT
from tests.whole import Note, choose

SECONDS = 1.0


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and tensors of a file."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: dict[str, Any], tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def without_checksum(data: bytes) -> bytes:
    """Return the file without its checksum, as other programs write it, so that the other checks are reached."""
    header, tensors = split(data)
    del header["__metadata__"][storage.CHECKSUM]
    return join(header, tensors)


def mutated(data: bytes, random_: random.Random) -> bytes:
    """Return the file with a few bytes changed, removed, inserted or repeated, mostly in its header."""
    (size,) = struct.unpack("<Q", data[:8])
    damaged = bytearray(data)
    for _ in range(random_.choice((1, 1, 2, 5))):
        at = random_.randrange(min(8 + size, len(damaged)) if random_.random() < 0.8 else len(damaged))
        match random_.randrange(5):
            case 0:
                damaged[at] ^= 1 << random_.randrange(8)
            case 1:
                del damaged[at : at + random_.randrange(1, 9)]
            case 2:
                damaged[at:at] = random_.choice([b"\0", b"[", b"{", b'"', b"9" * 20, b",", b"1e999", b"NaN", b"-"])
            case 3:
                damaged[at:at] = damaged[at : at + random_.randrange(1, 65)]
            case _:
                del damaged[at + 1 :]
        if len(damaged) < 2:
            break
    return bytes(damaged)


def is_same(one: storage.SavedNetwork, other: storage.SavedNetwork) -> bool:
    """Return whether two files hold the same, however they write it."""
    first, second = one.network.state_dict(), other.network.state_dict()
    return (
        one.architecture == other.architecture
        and one.metadata == other.metadata
        and first.keys() == second.keys()
        and all(torch.equal(first[name], second[name]) for name in first)
    )


def test_a_damaged_file_never_loads(shipped_models: Path, note: Note) -> None:
    data = (shipped_models / "peaks.safetensors").read_bytes()
    whole, random_ = storage.parse(data), random.Random(1)
    count, refused, unchanged, slowest_s = choose(2000, 20_000), 0, 0, 0.0
    for _ in range(count):
        damaged = mutated(data, random_)
        began = time.process_time()
        try:
            assert is_same(storage.parse(damaged), whole), "a damaged file loaded"
            unchanged += 1  # spaces in the header, say
        except FormatError:
            refused += 1
        slowest_s = max(slowest_s, time.process_time() - began)
    note(f"{count} mutated files: {refused} refused, {unchanged} that hold the same, at most {slowest_s:.3f} s each")
    assert refused > 0.95 * count
    assert slowest_s <= SECONDS


def test_without_a_checksum_damage_to_weights_would_load(shipped_models: Path) -> None:
    """Control: without the checksum some changes are not found; only :class:`FormatError` is raised here, too."""
    data = without_checksum((shipped_models / "peaks.safetensors").read_bytes())
    whole, random_, others = storage.parse(data), random.Random(2), 0
    for _ in range(500):
        try:
            others += not is_same(storage.parse(mutated(data, random_)), whole)
        except FormatError:
            continue
    assert others > 0


@pytest.mark.parametrize("step", [1, 7])
def test_a_file_cut_short_never_loads(shipped_models: Path, step: int) -> None:
    data = (shipped_models / "peaks.safetensors").read_bytes()
    for cut in range(0, len(data), step * choose(101, 1)):
        with pytest.raises(FormatError):
            storage.parse(data[:cut])


def bomb(architecture: Any, **tensors: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    texts = {"format": "hessquik", "format_version": "1", "network": json.dumps(architecture)}
    return join({"__metadata__": texts, **(tensors or {"0.K": entry})}, bytes(4))


RESNET = {"type": "resnetNN", "width": 1, "depth": 1024}
BOMBS: dict[str, bytes] = {
    "a hundred thousand layers": bomb({"type": "NN", "layers": [RESNET] * 100}),
    "wide layers": bomb({"type": "fullyConnectedNN", "widths": [65536] * 1024}),
    "nested": bomb({"type": "NN", "layers": [{"type": "NN", "layers": [RESNET] * 64}] * 64}),
    "deep JSON": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "deep architecture": join(
        {"__metadata__": {"format": "hessquik", "format_version": "1", "network": "[" * 200_000}}, b""
    ),
    "header of 2⁶³ bytes": struct.pack("<Q", 1 << 63) + b"{}",
    "header of 100 MB": struct.pack("<Q", 100_000_000) + b"{}" + bytes(1 << 20),
    "shape of 2⁶³": bomb(RESNET, **{"0.K": {"dtype": "F32", "shape": [1 << 63], "data_offsets": [0, 4]}}),
    "shape of 2⁶⁴ as a product": bomb(
        RESNET, **{"0.K": {"dtype": "F32", "shape": [1 << 32, 1 << 32], "data_offsets": [0, 4]}}
    ),
    "shape of 0 × 2⁶²": bomb(RESNET, **{"0.K": {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]}}),
    "negative offsets": bomb(RESNET, **{"0.K": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}),
    "overlap": bomb(
        RESNET,
        **{name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in ("0.K", "0.b")},
    ),
    "unknown dtype": bomb(RESNET, **{"0.K": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}),
    "many tensors": bomb(
        RESNET, **{f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(3000)}
    ),
    "empty": b"",
}  # fmt: skip


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_refused_at_once(data: bytes) -> None:
    began = time.process_time()
    with pytest.raises(FormatError, match=r"must|truncated"):
        storage.parse(data)
    assert time.process_time() - began <= SECONDS


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.place}",)


#: Looks at what happens while files are loaded, in a process of its own because a hook cannot be taken off.
AUDITED = """
import sys
from pathlib import Path
from hessquik import FormatError, storage
import torch
folder, events = Path(sys.argv[1]), []
FORBIDDEN = (
    "pickle.", "exec", "compile", "subprocess.", "os.system", "os.exec", "os.spawn", "socket.", "ctypes.", "import",
)
watch = False
def hook(event, arguments):
    if watch and (event.startswith(FORBIDDEN) or event == "open" and folder not in Path(str(arguments[0])).parents):
        events.append((event, str(arguments)[:80]))
sys.addaudithook(hook)
storage.load(sys.argv[2])  # all that is imported late
refused = 0
watch = True
for path in sorted(folder.iterdir()):
    try:
        storage.load(path)
    except FormatError:
        refused += 1
watch = False
if len(sys.argv) > 3:
    watch = True
    import pickle
    pickle.load(open(sorted(folder.iterdir())[0], "rb"))
print(refused, len(events), events[:3])
"""


def test_pickles_are_never_run(tmp_path: Path, shipped_models: Path, note: Note) -> None:
    folder, touched = tmp_path / "pickles", tmp_path / "touched"
    folder.mkdir()
    for number in range(50):
        payload = {"state": Evil(touched), "number": number}
        path = folder / f"{number:02}.safetensors"
        if number % 2:
            torch.save(payload, path, pickle_protocol=2 + number % 4)
        else:
            path.write_bytes(pickle.dumps(payload, protocol=number % 6))
    good = str(shipped_models / "peaks.safetensors")
    command = [sys.executable, "-c", AUDITED, str(folder), good]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    note(f"50 pickles: refused, forbidden events {ended.stdout.strip()}")
    assert ended.stdout.startswith("50 0 "), ended.stdout
    assert not touched.exists()
    control = subprocess.run([*command, "control"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert not control.stdout.startswith("50 0 "), "the control: a pickle that is loaded is seen"
    assert touched.exists()
