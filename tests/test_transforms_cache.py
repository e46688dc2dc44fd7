"Decoded pictures as one file: what it must equal, when it must not be used, and what a kill, a second process or a full disk may do to it."
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from same_run import numbers, same, weights
from test_memories_sync import short

from vireid_nb import transforms
from vireid_nb.records import VireidError, seeded
from vireid_nb.training import train
from vireid_nb.transforms import ImageStore, fingerprint

SIZE = (24, 12)


@pytest.fixture
def pictures(tmp_path):
    "A folder with twenty small pictures."
    root = tmp_path / "data"
    root.mkdir()
    for i in range(20):
        Image.fromarray(seeded(i).integers(0, 256, (24, 12, 3), dtype=np.uint8)).save(root / f"{i}.png")
    return root, [f"{i}.png" for i in range(20)]


def files(folder):
    "What lies in a cache folder, the lock apart."
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


def no_decoding(monkeypatch):
    def decode(root, path, size):
        raise AssertionError(f"{path} was decoded")

    monkeypatch.setattr(transforms, "decode", decode)


def test_a_file_of_pictures_is_the_pictures(pictures, tmp_path, monkeypatch, caplog):
    root, paths = pictures
    plain, rows = ImageStore(root, paths, SIZE), [7, 7, 0, 19]
    with caplog.at_level(logging.INFO, "vireid_nb"):
        first = ImageStore(root, paths, SIZE, cache=tmp_path / "cache")
        assert "20 pictures of 24 x 12 take 1.73e-05 GB; writing" in caplog.text
        caplog.clear()
        no_decoding(monkeypatch)
        second = ImageStore(root, paths, SIZE, cache=str(tmp_path / "cache"))
        assert not caplog.text
    monkeypatch.undo()
    for store in (first, second):
        assert torch.equal(store[rows], plain[rows]) and torch.equal(store[:], plain[:]) and torch.equal(store[np.arange(20) % 3 == 0], plain[np.arange(20) % 3 == 0])
        assert store[np.empty(0, int)].shape == (0, 3, 24, 12)
    second[rows].fill_(0)  # a batch is a copy
    assert torch.equal(second[rows], plain[rows])


@pytest.mark.parametrize("change", ["pixels", "time", "length", "size", "order", "root"])
def test_whatever_changes_is_decoded_anew(pictures, tmp_path, change):
    root, paths = pictures
    size, cache = SIZE, tmp_path / "cache"
    ImageStore(root, paths, size, cache=cache)
    before, name = files(cache), fingerprint(root, paths, size)
    if change == "pixels":
        held = os.stat(root / "3.png")
        Image.fromarray(seeded(99).integers(0, 256, (24, 12, 3), dtype=np.uint8)).save(root / "3.png")
        os.utime(root / "3.png", ns=(held.st_atime_ns, held.st_mtime_ns + 1))
    elif change == "time":
        os.utime(root / "3.png", ns=(0, 12345))
    elif change == "length":
        held = os.stat(root / "3.png")
        with open(root / "3.png", "ab") as f:
            f.write(b"behind the picture")
        os.utime(root / "3.png", ns=(held.st_atime_ns, held.st_mtime_ns))
    elif change == "size":
        size = (12, 12)
    elif change == "order":
        paths = paths[::-1]
    elif change == "root":
        root = root.rename(tmp_path / "elsewhere")
    assert fingerprint(root, paths, size) != name
    assert torch.equal(ImageStore(root, paths, size, cache=cache)[:], ImageStore(root, paths, size)[:])
    assert len(files(cache)) == 2 and set(before) < set(files(cache))


def test_a_damaged_file_is_not_used(pictures, tmp_path):
    root, paths = pictures
    ImageStore(root, paths, SIZE, cache=tmp_path / "cache")
    (name,) = files(tmp_path / "cache")
    with open(tmp_path / "cache" / name, "r+b") as f:
        f.truncate(1000)
    assert torch.equal(ImageStore(root, paths, SIZE, cache=tmp_path / "cache")[:], ImageStore(root, paths, SIZE)[:])


def test_no_room_is_said_before_anything_is_decoded(pictures, tmp_path, monkeypatch):
    root, paths = pictures
    no_decoding(monkeypatch)
    monkeypatch.setattr(transforms.shutil, "disk_usage", lambda path: SimpleNamespace(free=17_279))
    with pytest.raises(VireidError, match=r"20 pictures of 24 x 12 take 1.73e-05 GB, .*cache has 1.73e-05 GB free; choose"):
        ImageStore(root, paths, SIZE, cache=tmp_path / "cache")
    assert files(tmp_path / "cache") == []


def test_a_broken_picture_leaves_nothing_behind(pictures, tmp_path):
    root, paths = pictures
    (root / "11.png").write_bytes((root / "11.png").read_bytes()[:60])
    with pytest.raises(VireidError, match="11.png.*vireid check"):
        ImageStore(root, paths, SIZE, cache=tmp_path / "cache")
    (root / "11.png").unlink()
    with pytest.raises(VireidError, match="11.png: no such file"):
        ImageStore(root, paths, SIZE, cache=tmp_path / "cache")
    assert files(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_written_is_named(pictures, tmp_path):
    root, paths = pictures
    (tmp_path / "file").write_text("")
    with pytest.raises(VireidError, match="file/cache cannot be written or locked"):
        ImageStore(root, paths, SIZE, cache=tmp_path / "file/cache")


WRITER = """
import sys, time
from pathlib import Path
from vireid_nb import transforms
decode, root, cache, pause, limit = transforms.decode, Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
batches = transforms.PictureFiles.batches
transforms.PictureFiles.batches = lambda self: batches(self, 2)
def slowly(*args):
    time.sleep(pause)
    return decode(*args)
transforms.decode = slowly
import logging
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
if limit:
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from vireid_nb.records import VireidError
try:
    store = transforms.ImageStore(root, [f"{i}.png" for i in range(20)], (24, 12), cache=cache, threads=1)
    print("sum", int(store[:].long().sum()), flush=True)
except VireidError as e:
    print(e)
    sys.exit(2)
"""


def writer(root, cache, pause=0.0, limit=0):
    "Another process that opens the same store; decoding a picture takes it `pause` seconds."
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", WRITER, str(root), str(cache), str(pause), str(limit)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_half_written_file_is_not_used(pictures, tmp_path):
    root, paths = pictures
    cache = tmp_path / "cache"
    process = writer(root, cache, pause=0.2)
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None and not (cache.exists() and files(cache)):
        time.sleep(0.002)
    time.sleep(0.5)  # some pictures are in it
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (left,) = files(cache)
    assert left.startswith(".") and left.endswith(".tmp"), "the killed writer's file must not have its name yet"
    assert torch.equal(ImageStore(root, paths, SIZE, cache=cache)[:], ImageStore(root, paths, SIZE)[:])
    (name,) = files(cache)  # what the killed one left is gone
    assert not name.startswith(".")


def test_processes_that_start_together_share_one_file(pictures, tmp_path):
    root, paths = pictures
    processes = [writer(root, tmp_path / "cache", pause=0.05) for _ in range(3)]
    told = [p.communicate()[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0]
    want = int(ImageStore(root, paths, SIZE)[:].long().sum())
    assert all(f"sum {want}" in t for t in told)
    assert sum("writing" in t for t in told) == 1 and len(files(tmp_path / "cache")) == 1


def test_a_disk_that_fills_up_leaves_nothing(pictures, tmp_path):
    process = writer(pictures[0], tmp_path / "cache", limit=5000)
    told, _ = process.communicate()
    assert process.returncode == 2 and "could not write" in told and files(tmp_path / "cache") == []


def test_training_from_a_file_is_the_same_training(sysu_root, tmp_path, monkeypatch):
    config = short("baseline", sysu_root, tmp_path)
    plain = train(config)
    cached = replace(config, name="cached", data=replace(config.data, cache=str(tmp_path / "cache")))
    first = train(cached)
    no_decoding(monkeypatch)
    second = train(replace(cached, name="again"))
    for run in (first, second):
        assert same(weights(plain), weights(run)) and numbers(plain) == numbers(run)
    assert len(files(tmp_path / "cache")) == 2  # training and test pictures
    monkeypatch.undo()
    train(replace(config, name="cached", data=replace(config.data, cache="")), resume=True)  # where pictures come from may change
