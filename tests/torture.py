"""Kills at random moments, and inputs that nobody should make.

    python tests/torture.py            the long one: tables of kills, inputs and memory (`make torture`)
    python tests/torture.py --share    what `make test` runs of it

A kill is a SIGKILL that the process sends to itself at a random one of all the calls that change the disk (or at a random step), before or after the call; the run is then
resumed, perhaps killed again, and must end on the same bits as the one that was never killed, with nothing left over. An input is a good file with something done to it; each must be used,
    or refused in one line: no traceback, no hang, no second line, nothing outside its folder.
"""

import argparse
import builtins
import io
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

for name, value in {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}.items():
    os.environ.setdefault(name, value)

import numpy as np
import pandas as pd
import psutil
import test_dmic
import test_mmm
import test_training
import torch
from PIL import Image
from safetensors.numpy import save_file
from same_run import numbers, same, weights

from vireid_nb import cli
from vireid_nb.artifacts import Run
from vireid_nb.backbone import BackboneConfig, build_backbone, load_weights
from vireid_nb.catalog import check, load_catalog, read_image
from vireid_nb.features import load_bank, load_extra, save_bank
from vireid_nb.inspector import InspectorState, rows_where
from vireid_nb.records import VireidError
from vireid_nb.synthetic import make_vi_features, write_dataset
from vireid_nb.training import load_model, train

torch.set_num_threads(1)
LIMIT = 60  # seconds after which an input counts as a hang


# ---- kills


def changes(before_call) -> None:
    "Let `before_call(call)` see every call that changes the disk; `call()` makes it."
    for module, names in ((os, ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")), (shutil, ("rmtree",)), (Path, ("write_text",)), (pd.DataFrame, ("to_csv",))):
        for name in names:
            true = getattr(module, name)
            setattr(module, name, lambda *a, _true=true, **k: before_call(lambda: _true(*a, **k)))
    true = builtins.open

    def opened(file, mode="r", *a, **k):
        return before_call(lambda: true(file, mode, *a, **k)) if set(mode) & set("wax+") else true(file, mode, *a, **k)

    builtins.open = opened


def forked(work, at: int = 0, after: bool = False) -> tuple:  # (exit status, how many changes were made)
    "Do `work(step)` in a process of its own that kills itself at its `at`-th change or step; 0 = never."
    read, write = os.pipe()
    child = os.fork()
    if not child:
        made = [0]

        def seen(call):
            made[0] += 1
            if made[0] == at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            out = call()
            if made[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return out

        try:
            os.close(read)
            logging.disable(logging.CRITICAL)
            changes(seen)
            with redirect_stdout(io.StringIO()):
                work(lambda: seen(lambda: None))
            os.write(write, str(made[0]).encode())
            os._exit(0)
        except BaseException as e:
            os.write(2, f"{type(e).__name__}: {e}\n".encode())
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as f:
        told = f.read()
    status = os.waitpid(child, 0)[1]
    return (-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), int(told or 0)


def leftovers(folder: Path) -> list:
    return [str(p) for p in folder.rglob(".*") if p.name.endswith((".tmp", ".old")) or p.name == ".training.json"]


def training(config):
    "Train, or go on if there is something to go on with."

    def work(step):
        train(config, resume=Path(config.runs, config.name).exists(), callbacks=(lambda run, entry: step() if entry["event"] == "step" else None,))

    return work


def methods(root: Path, runs: Path) -> dict:
    short = dict(intra_epochs=1, joint_epochs=1)
    return {
        "baseline": test_training.small(root, runs, "baseline", keep_features=True, eval_every=1, **short),
        "MMM": replace(test_mmm.small(root, runs, **short), name="mmm"),
        "MMM released": replace(test_mmm.small(root, runs, "released", **short), name="released"),
        "DMIC": test_dmic.small(root, runs, "dmic", **short),
    }


def kill_training(root: Path, room: Path, kills: dict, rng: random.Random, until: float) -> list:  # kills: {method: how many}
    rows = []
    for name, config in methods(root, room).items():
        if not kills.get(name):
            continue
        status, n = forked(training(config))
        assert status == 0, f"{name}: the run that is never killed failed"
        straight, done, survived, inside = Run(room / config.name), 0, 0, 0
        while done < kills[name] and time.time() < until:
            again, deaths = replace(config, name=f"{config.name}-{done}"), rng.choice((1, 1, 2, 3))
            for _ in range(deaths):
                at = rng.randint(1, n)
                status, _ = forked(training(again), at, rng.random() < 0.5)
                done, inside = done + (status == -signal.SIGKILL), inside + (status == -signal.SIGKILL)
                path = room / again.name
                if path.exists():
                    [Run(path).labels(e) for e in Run(path).epochs]  # readable at any moment
            status, _ = forked(training(again))
            end = Run(room / again.name)
            good = status == 0 and same(weights(straight), weights(end)) and numbers(straight) == numbers(end) and not leftovers(end.path)
            good = good and all(np.array_equal(straight.labels(e).joint, end.labels(e).joint) for e in straight.epochs)
            survived += deaths * good
            if not good:
                print(f"NOT SURVIVED: {name}, {end.path}: exit {status}, left {leftovers(end.path)}")
            shutil.rmtree(end.path)
        rows.append((f"train {name}", n, inside, survived >= inside))
    return rows


def kill_commands(root: Path, run: Path, room: Path, each: int, rng: random.Random, until: float) -> list:
    "Other commands that write: killed, done again, the same files as when never killed, nothing left."

    def vireid(*words):
        def work(step):
            if cli.main([str(w) for w in words]):
                raise RuntimeError("refused")

        return work

    table = ("--grid", "cluster.eps=0.5", "--grid", "intra_epochs=1", "--grid", "joint_epochs=0", "--grid", "batch.iterations=1")
    commands = {
        "synth": lambda out: vireid("synth", out / "set", "--n-train-ids", 2, "--n-test-ids", 1, "--size", 32, 16),
        "extract": lambda out: vireid("extract", run, root / "cam1", "-o", out / "f.safetensors", "--modality", "visible", "--engine.device", "cpu"),
        "report": lambda out: vireid("report", run, "-o", out / "page.html"),
        "export": lambda out: vireid("export", run, "--format", "torchscript", "-o", out / "model.pt"),
        "cluster": lambda out: vireid("cluster", room / "bank.safetensors", "--k1", 5, "-o", out / "labels.csv"),
        "ablate": lambda out: vireid("ablate", "baseline", "--data", root, "--out", out / "table", "--seeds", 1, *table),
    }
    bank, _ = make_vi_features(6, 4, 4, dim=16, seed=0)
    save_bank(room / "bank.safetensors", bank)
    files = lambda out: sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.name not in (".training.lock", ".lock"))
    rows = []
    for name, command in commands.items():
        good = room / f"{name}-whole"
        good.mkdir()
        status, n = forked(command(good))
        if status:
            rows.append((name, n, 0, False))
            continue
        dead, survived = 0, True
        for i in range(each):
            if time.time() > until:
                break
            out = room / f"{name}-{i}"
            out.mkdir()
            status, _ = forked(command(out), rng.randint(1, n), rng.random() < 0.5)
            dead += status == -signal.SIGKILL
            if name == "synth" and (out / "set").exists():
                shutil.rmtree(out / "set")  # it was whole already: a second one is refused
            status, _ = forked(command(out))
            fine = status == 0 and files(out) == files(good)
            if not fine:
                print(f"NOT SURVIVED: {name}: exit {status}, {sorted({*files(out)} ^ {*files(good)})[:4]}")
            survived &= fine
            shutil.rmtree(out)
        rows.append((name, n, dead, survived))
    return rows


# ---- inputs


WORDS = (
    b"",
    b"\0",
    b"\n",
    b"\r\n",
    b"\xff\xfe",
    b"9" * 20,
    b"9" * 5000,
    b"-1",
    b"../",
    b"/",
    b"a/" * 3000,
    b"x" * 300,
    b"1e999",
    b"NaN",
    b"Infinity",
    b"null",
    b"[]",
    b"{}",
    b"[" * 3000,
    b'"',
    b",",
    b"\xe2\x80\xa8",
    "½٣".encode(),
    b"=cmd()",
    b" ",
    b"true",
    b"0.5",
)


def spoiled(good: bytes, rng: random.Random) -> bytes:
    "A good file with something done to it."
    data = bytearray(good)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        deed = rng.randrange(7)
        if deed == 0:
            data[at : at + rng.randrange(8)] = rng.choice(WORDS)
        elif deed == 1:
            data = data[:at]
        elif deed == 2 and at < len(data):
            data[at] = rng.randrange(256)
        elif deed == 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 30))
        elif deed == 4:
            data = data[at:] + data[:at]
        elif deed == 5:
            words = bytes(data).split(b",") if b"," in data else bytes(data).split(b"\n")
            words[rng.randrange(len(words))] = rng.choice(WORDS)
            data = bytearray((b"," if b"," in data else b"\n").join(words))
        else:
            data = bytearray(rng.choice(WORDS) * rng.choice((1, 1, 50)))
    return bytes(data)


class Tally:
    "Outcomes of one reader."

    def __init__(self, name: str):
        self.name, self.used, self.refused, self.wrong = name, 0, 0, []

    def take(self, read, what: str = "") -> None:
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("hang")))
        signal.alarm(LIMIT)
        try:
            read()
            self.used += 1
        except VireidError as e:
            self.refused += 1
            if len(str(e).splitlines()) != 1 or not str(e).strip():
                self.wrong.append(f"{what}: several lines: {e!r}")
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt):
                raise
            self.wrong.append(f"{what}: {type(e).__name__}: {str(e)[:200]}")
        finally:
            signal.alarm(0)

    @property
    def n(self) -> int:
        return self.used + self.refused + len(self.wrong)


def over(name: str, files: dict, read, n: int, rng: random.Random) -> Tally:  # files: {path: good bytes}
    "Spoil one of the files, read, put it back."
    tally, paths = Tally(name), list(files)
    read()  # what is good is used
    for i in range(n):
        path = paths[i % len(paths)]
        bad = spoiled(files[path], rng)
        path.write_bytes(bad)
        tally.take(read, f"{path.name} {bad[:60]!r}")
        path.write_bytes(files[path])
    return tally


def lists(room: Path, n: int, rng: random.Random) -> list:
    out = []
    for layout in ("sysu", "regdb", "llcm"):
        root = room / layout
        write_dataset(root, layout, n_train_ids=2, n_test_ids=1, size=(32, 16), progress=False)
        out.append(
            over(
                f"lists of {layout}",
                {p: p.read_bytes() for p in sorted(root.rglob("*.txt")) if layout != "regdb" or p.stem.endswith("_1")},
                lambda: load_catalog(root, layout),
                n,
                rng,
            )
        )
    table, root = load_catalog(room / "sysu", "sysu").train, room / "sysu"
    table.assign(split="train").to_csv(root / "index.csv", index=False)
    return [*out, over("CSV", {root / "index.csv": (root / "index.csv").read_bytes()}, lambda: load_catalog(root, "csv"), n, rng)]


def folders(room: Path, n: int, rng: random.Random) -> Tally:
    tally, names = (
        Tally("folders"),
        [
            "a\nb.jpg",
            "ünï.png",
            b"\xff.jpg".decode(errors="surrogateescape"),
            ".hidden.jpg",
            "x" * 240 + ".jpg",
            "cam1",
            "cam99999999999",
            "note.txt",
            "d.jpg",
            " .png",
            "a;b.jpg",
            "visible",
            "cam3_c9.bmp",
        ],
    )
    for i in range(n):
        root = room / f"f{i}"
        for top in rng.sample(("visible", "infrared", "rgb", "thermal", "cam1", "Visible"), rng.randint(0, 4)):
            here = root / top / "/".join(["d"] * rng.choice((0, 1, 5, 80)))
            here.mkdir(parents=True, exist_ok=True)
            for name in rng.sample(names, rng.randint(0, 5)):
                deed = rng.randrange(7)
                try:
                    if deed == 0:
                        os.mkfifo(here / name)
                    elif deed == 1:
                        os.symlink(rng.choice(("/etc", "..", "nowhere", name, "/dev/zero")), here / name)
                    elif deed == 2:
                        (here / name).mkdir()
                    else:
                        Image.new(rng.choice(("RGB", "L")), (8, 16)).save(here / name) if name.endswith((".jpg", ".png", ".bmp")) else (here / name).touch()
                except OSError:
                    continue
        tally.take(lambda: str(check(root, "folder", threads=1, progress=False)), f"{root}")
        shutil.rmtree(root, ignore_errors=True)
    return tally


def pictures(room: Path, n: int, rng: random.Random) -> Tally:
    tally, whole = Tally("pictures"), []
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"):
        for suffix in ("png", "jpg", "bmp", "tiff", "webp"):
            for turn in (1, 6):
                exif, out = Image.Exif(), io.BytesIO()
                exif[0x0112] = turn
                try:
                    Image.new(mode, (9, 17)).save(out, {"jpg": "JPEG"}.get(suffix, suffix.upper()), exif=exif)
                except (OSError, ValueError, KeyError, TypeError):
                    continue
                whole.append((suffix, out.getvalue()))
    for i in range(n):
        suffix, data = whole[i % len(whole)]
        data = data if i < len(whole) else spoiled(data, rng)
        (room / f"p.{suffix}").write_bytes(data)
        tally.take(lambda: read_image(room, f"p.{suffix}").load(), f"p.{suffix} {data[:40]!r}")
    return tally


def run_folder(made: Path, room: Path, n: int, rng: random.Random) -> list:
    run = Path(shutil.copytree(made, room / "run"))
    state = InspectorState(run)
    state.select([0, 1])
    state.tag("two"), state.save("mine")

    def read():
        opened = Run(run)
        opened.events(), cli.summary(opened), opened.samples()
        for e in opened.epochs:
            opened.epoch_info(e), opened.labels(e)
        again = InspectorState(opened)
        again.matches(), again.load("mine"), again.recall("two"), again.table()

    names = ("config.json", "samples.csv", "metrics.jsonl", "inspector.json", "epochs/0001/info.json", "epochs/0001/labels.safetensors", "epochs/0001/features.safetensors")
    out = [over(f"run folder: {name}", {run / name: (run / name).read_bytes()}, read, n, rng) for name in names]
    held = {run / f"checkpoints/last/{name}": (run / f"checkpoints/last/{name}").read_bytes() for name in ("state.json", "model.safetensors")}
    return [
        *out,
        over("run folder: checkpoint", held, lambda: load_model(Run(run)), n // 2, rng),
        over("run folder: config of the network", {run / "config.json": (run / "config.json").read_bytes()}, lambda: load_model(Run(run)), n // 2, rng),
    ]


def feature_files(room: Path, n: int, rng: random.Random) -> Tally:
    bank, _ = make_vi_features(3, 3, 3, dim=8, seed=0)
    file = room / "f.safetensors"
    save_bank(file, bank, {"paths": ["a.jpg"]})
    tally = over("feature files: bytes", {file: file.read_bytes()}, lambda: (load_bank(file), load_extra(file)), n, rng)
    whole = {k: getattr(bank, k) for k in ("features", "modality", "camid", "index")}
    for _ in range(n):
        name = rng.choice(list(whole))
        x = whole[name]
        deeds = (
            lambda: x.astype(rng.choice((np.float16, np.float64, np.int8, np.uint8, np.bool_))),
            lambda: x[: rng.randrange(len(x))],
            lambda: x * rng.choice((0, -1, 1000, np.nan)),
            lambda: x[None],
            lambda: x[:0],
            lambda: np.roll(x, 1, 0),
            lambda: np.zeros_like(x),
        )
        with np.errstate(all="ignore"):
            save_file({k: np.ascontiguousarray(v) for k, v in {**whole, name: rng.choice(deeds)()}.items() if rng.random() > 0.03}, file)
        tally.take(lambda: load_bank(file), name)
    return tally


def weight_files(room: Path, n: int, rng: random.Random) -> Tally:
    model = build_backbone(BackboneConfig(name="tiny", weights="none"))
    good = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save(good, room / "w.pth"), save_file({k: v.numpy() for k, v in good.items()}, room / "w.safetensors")
    tally = Tally("weights")
    for i in range(n):
        file = room / ("w.pth" if i % 2 else "w.safetensors")
        data, key = file.read_bytes(), rng.choice(list(good))
        odd = (
            lambda: {1: good[key]},
            lambda: [1, 2],
            lambda: {**good, key: good[key] * float("nan")},
            lambda: {**good, key: 3},
            lambda: {**good, key: good[key].reshape(-1)[:0]},
            lambda: {"model": good},
            lambda: None,
            lambda: {**good, "more": torch.ones(1)},
        )
        if i % 2 and i % 3 == 0:
            torch.save(rng.choice(odd)(), file)
        else:
            file.write_bytes(data[:200] + spoiled(data[200:400], rng) + data[400:] if rng.random() < 0.7 else spoiled(data[:2000], rng))
        tally.take(lambda: load_weights(model, file), file.name)
        file.write_bytes(data)
    return tally


def sentences(n: int, rng: random.Random) -> Tally:
    tally, table = Tally("filters"), pd.DataFrame({"pid": [1, 2], "path": ["a", "b"], "ap": [0.5, np.nan]})
    words = (
        "pid",
        "path",
        "ap",
        "==",
        "!=",
        "<",
        "in",
        "not",
        "and",
        "or",
        "(",
        ")",
        "[",
        "]",
        ",",
        "1",
        "-1",
        "'a'",
        "@x",
        "9" * 30,
        "\n",
        ".",
        "__class__",
        "lambda:",
        "import os",
        "1e999",
        "'",
        "nan",
        "True",
        ":=",
        "*",
        "#",
    )
    for _ in range(n):
        tally.take(lambda: rows_where(table, " ".join(rng.choices(words, k=rng.randint(1, 12)))))
    return tally


def command_words(room: Path, data: Path, run: Path, n: int, rng: random.Random) -> Tally:
    "Whole commands: exit code 0 with a result, or 2 with one line (of the parser: its box)."
    tally = Tally("command lines")
    values = (
        "-1",
        "0",
        "nan",
        "inf",
        "1e400",
        "9" * 20,
        "9" * 5000,
        "",
        " ",
        "a\nb",
        "../x",
        "/",
        "~nobody",
        "x" * 300,
        "½",
        "None",
        "true",
        "[]",
        "0.5",
        "2.5",
        str(data),
        str(run),
        str(room / "none"),
    )
    flags = (
        "--optim.lr",
        "--data.trial",
        "--batch.iterations",
        "--batch.n-ids",
        "--optim.decay-every",
        "--augment.erase",
        "--seed",
        "--name",
        "--data.name",
        "--preset",
        "--data.root",
        "--eval-every",
        "--momentum",
        "--temperature",
        "--cluster.eps",
        "--cluster.k1",
        "--engine.device",
        "--model.name",
        "--model.gem-p",
        "--augment.erase-aspect",
        "--data.size",
        "--optim.weight-decay",
        "--model.weights",
    )
    for _ in range(n):
        v = lambda: rng.choice(values)
        words = rng.choice(
            (
                lambda: [
                    "train",
                    rng.choice(("baseline", "mmm", "dmic", v())),
                    "--preset",
                    "synth",
                    "--data.root",
                    str(data),
                    "--runs",
                    str(room / "runs"),
                    "--intra-epochs",
                    "0",
                    "--joint-epochs",
                    "0",
                    rng.choice(flags),
                    v(),
                ],
                lambda: ["check", rng.choice((str(data), v())), "--dataset", rng.choice(("sysu", "csv", "folder", v())), "--no-decode"],
                lambda: ["report", v(), "-o", str(room / "out" / "r.html")],
                lambda: ["evaluate", v()],
                lambda: ["cluster", v(), "--eps", v()],
                lambda: ["extract", str(run), v(), "-o", str(room / "out" / "f.safetensors")],
                lambda: ["query", str(run), v(), "--gallery", v()],
                lambda: ["synth", str(data), "--n-train-ids", v()],
                lambda: ["export", v(), "--format", "torchscript"],
                lambda: ["ablate", "mmm", "--grid", v(), "--out", str(room / "out" / "t")],
                lambda: [v() for _ in range(3)],
            )
        )()

        def read():
            said, told = io.StringIO(), io.StringIO()
            try:
                with redirect_stdout(said), redirect_stderr(told):
                    logging.root.handlers.clear()
                    code = cli.main(words)
            except SystemExit as e:  # of the parser
                code = e.code
                assert code in (0, 2), code
                return
            finally:
                logging.root.handlers.clear()
            assert code in (0, 2) and "Traceback" not in told.getvalue(), (code, told.getvalue()[-300:])
            assert code == 0 or words[0] == "check" or told.getvalue().splitlines()[-1].startswith("vireid: "), told.getvalue()[-300:]
            if code:
                raise VireidError("refused")

        tally.take(read, " ".join(words)[:160])
    return tally


def inputs(data: Path, run: Path, room: Path, n: int, rng: random.Random) -> list:  # n: about how many in all
    part = lambda share: max(3, round(n * share))
    with redirect_stdout(io.StringIO()):
        logging.disable(logging.CRITICAL)
        out = [
            *lists(room, part(0.1), rng),
            *run_folder(run, room, part(0.05), rng),
            pictures(room, part(0.12), rng),
            feature_files(room, part(0.05), rng),
            sentences(part(0.05), rng),
        ]
        out += [folders(room, part(0.02), rng), weight_files(room, part(0.03), rng), command_words(room, data, run, part(0.01), rng)]
        logging.disable(logging.NOTSET)
    return out


# ---- a long run


def long_run(root: Path, room: Path, epochs: int) -> list:  # [(epoch, MB of memory, open files, threads)]
    told, me = [], psutil.Process()
    look = lambda run, entry: told.append((entry["epoch"], me.memory_info().rss / 1e6, me.num_fds(), me.num_threads())) if entry["event"] == "seconds" else None
    config = test_training.small(root, room, "long", intra_epochs=1, joint_epochs=epochs - 1, eval_every=0)
    logging.disable(logging.CRITICAL)
    train(replace(config, batch=replace(config.batch, iterations=1)), callbacks=(look,))
    logging.disable(logging.NOTSET)
    return told


def drawn(values: list, width: int = 60) -> str:
    "A line of blocks from the least to the largest."
    some = [values[int(i)] for i in np.linspace(0, len(values) - 1, min(width, len(values)))]
    low, high = min(some), max(some)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / ((high - low) or 1))] for v in some)


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, default in (("--kills", 60), ("--commands", 8), ("--inputs", 12000), ("--epochs", 200), ("--minutes", 20), ("--seed", int(time.time()))):
        ask.add_argument(flag, type=int, default=default)
    ask.add_argument("--share", action="store_true", help="the part that `make test` runs, always the same")
    a = ask.parse_args()
    if a.share:
        a.kills, a.commands, a.inputs, a.epochs, a.minutes, a.seed = 4, 1, 500, 0, 60, 0
    rng, began, bad = random.Random(a.seed), time.time(), 0
    print(f"seed {a.seed}")
    room = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        (room / "in").mkdir(), (room / "kill").mkdir()
        root, until = room / "data", began + 60 * a.minutes
        write_dataset(root, "sysu", n_train_ids=6, n_test_ids=4, seed=0, progress=False)
        logging.disable(logging.CRITICAL)
        config = test_training.small(root, room, "run", keep_features=True, intra_epochs=1, joint_epochs=1)
        assert forked(training(config))[0] == 0  # this process must not have trained: its children could not
        run = room / "run"
        logging.disable(logging.NOTSET)
        kills = {"baseline": a.kills // 4 or 1, "MMM": a.kills // 4, "MMM released": a.kills // 4, "DMIC": a.kills // 4}
        rows = kill_training(root, room / "kill", kills, rng, until - 0.3 * 60 * a.minutes) + kill_commands(root, run, room / "kill", a.commands, rng, until)
        print("\nkilled in                      moments  kills  survived")
        for name, n, dead, fine in rows:
            print(f"{name:30s} {n:7d}  {dead:5d}  {'all' if fine else 'NOT ALL'}")
            bad += not fine
        before = sorted(p.name for p in room.iterdir())
        started = time.process_time()
        print("\ninputs by reader               tried    used  refused   wrong")
        for t in inputs(root, run, room / "in", a.inputs, rng):
            print(f"{t.name:30s} {t.n:6d}  {t.used:6d}  {t.refused:7d}  {len(t.wrong):6d}")
            bad += len(t.wrong)
            for w in t.wrong[:3]:
                print("   WRONG", ascii(w))
        print(f"files outside: {sorted({p.name for p in room.iterdir()} - {*before})}   CPU {time.process_time() - started:.0f} s")
        if a.epochs:
            told = long_run(root, room / "kill", a.epochs)
            print(
                f"\n{a.epochs} epochs: memory {told[len(told) // 10][1]:.0f} -> {told[-1][1]:.0f} MB, open files {told[0][2]} -> {told[-1][2]}, threads {told[0][3]} -> {told[-1][3]}"
            )
            print(f"memory {drawn([t[1] for t in told])}")
    finally:
        shutil.rmtree(room, ignore_errors=True)
    print(f"\n{'all held' if not bad else f'{bad} did not hold'}, {time.time() - began:.0f} s")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
