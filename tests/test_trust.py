"Other people's run folders, lists and pictures: nothing in them runs, nothing outside the named folders is read or written, and whatever is wrong is one line."
import errno
import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from same_run import numbers as told_by
from same_run import same, weights

from vireid_nb import cli
from vireid_nb.artifacts import Run, check_values, sole
from vireid_nb.baseline import baseline_preset
from vireid_nb.cli import first_difference
from vireid_nb.engine import Engine
from vireid_nb.inspector import InspectorState, Thumbnails, rows_where
from vireid_nb.records import VireidError
from vireid_nb.training import Stopped, train
from vireid_nb.use import sample_pictures


def small(root, runs, name="run", **more):
    base = baseline_preset("synth")
    flat = {"intra_epochs": 1, "joint_epochs": 1, "eval_every": 0, "batch": replace(base.batch, n_ids=2, n_instances=4, iterations=2)}
    return replace(base, data=replace(base.data, root=str(root), size=(48, 24)), runs=str(runs), name=name, **{**flat, **more})


@pytest.fixture(scope="module")
def made(sysu_root, tmp_path_factory):
    "A trained run; copy it before changing it."
    return train(small(sysu_root, tmp_path_factory.mktemp("trust"), keep_features=True))


@pytest.fixture
def run(made, tmp_path):
    "A copy of that run."
    return Run(shutil.copytree(made.path, tmp_path / "run"))


# ---- text that becomes code


TRAPS = (
    "@os.system('touch {mark}')", "__import__('os').system('touch {mark}') == 0", "pid == __import__('os').system('touch {mark}')", "(lambda: open('{mark}', 'w'))() == 1",
    "[open('{mark}', 'w') for x in (1,)] == 1", "path.map(open) == 1", "pid in (open('{mark}', 'w'),)", "pid == 1 and (x := open('{mark}', 'w'))", "f'{{open(\"{mark}\", \"w\")}}' == path",
    "(open('{mark}', 'w') if pid else 1) == 1", "path == path.__class__", "pid[0] == 1", "*pid == 1", "pid == b'1'", "pid == ...", "pid is 1", "pid == 1j", "'{mark}'", "pid", "1", "not pid", "pid + 1 == 2",
)  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_a_filter_does_nothing_but_filter(run, tmp_path, trap):
    mark = tmp_path / "ran"
    state = InspectorState(run)
    state.save("mine")
    held = state.kept
    held["views"]["mine"]["where"] = trap.format(mark=mark)
    state.file.write_text(json.dumps(held))
    opened = InspectorState(run.path)
    for deed in (lambda: opened.load("mine"), lambda: opened.filter(trap.format(mark=mark)), lambda: opened.select(where=trap.format(mark=mark))):
        with pytest.raises(VireidError, match="cannot be read") as e:
            deed()
        assert "\n" not in str(e.value)
    assert not mark.exists() and opened.shown.all()


TABLE = pd.DataFrame({"a": [0, 1, 2, -1, 5], "x": [0.5, np.nan, 2, -1, 1e9], "t": ["u", "cam1/v", "", "u", "w"], "b": [True, False, True, True, False]})
numbers = st.sampled_from(["a", "x", "b", "0", "1", "-1", "2.5", "True", "99999999999999999999"])
texts = st.sampled_from(["t", "'u'", "''", "'cam1/v'"])
comparisons = st.one_of(
    st.tuples(numbers, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), numbers).map(" ".join),
    st.tuples(texts, st.sampled_from(["==", "!="]), texts).map(" ".join),
    st.tuples(st.sampled_from(["a", "x"]), st.sampled_from(["in", "not in"]), st.lists(st.sampled_from(["0", "1", "-1", "2.5"]), max_size=3).map(lambda v: f"[{', '.join(v)}]")).map(" ".join),
)
sentences = st.recursive(comparisons, lambda s: st.one_of(s.map(lambda q: f"not ({q})"), st.tuples(s, st.sampled_from(["and", "or"]), s).map(lambda t: f"({t[0]}) {t[1]} ({t[2]})")), max_leaves=6)


@given(sentences)
def test_a_filter_says_what_python_says(sentence):
    rows = [i for i, row in enumerate(TABLE.to_dict("records")) if eval(sentence, {"__builtins__": {}}, row)]
    assert rows_where(TABLE, sentence).tolist() == rows


@given(st.one_of(st.text(max_size=60), st.text(alphabet="atx'\"()[]<>=!-@&|~`.,: \n0123", max_size=40)))
def test_any_text_filters_or_is_refused_in_one_line(text):
    try:
        rows = rows_where(TABLE, text)
    except VireidError as e:
        assert "cannot be read" in str(e) and len(str(e).splitlines()) == 1
    else:
        assert set(rows.tolist()) <= set(range(len(TABLE)))


# ---- text that becomes a path


@pytest.mark.parametrize("name", ["../outside", "/absolute", "a/b", "..", ".", ".hidden", "a\\b", "two\nlines", "x" * 300])
def test_a_run_stays_in_its_folder(sysu_root, tmp_path, name):
    name = str(tmp_path / "absolute") if name == "/absolute" else name
    with pytest.raises(VireidError, match="a plain folder name is needed"):
        train(small(sysu_root, tmp_path / "runs", name))
    assert not [*tmp_path.rglob("*")]


def test_listed_pictures_outside_the_root_are_never_read(run, sysu_root, tmp_path):
    table = pd.read_csv(run.path / "samples.csv")
    away = tmp_path / "away.jpg"
    shutil.copy(next(sysu_root.rglob("*.jpg")), away)
    root = shutil.copytree(sysu_root, tmp_path / "data")
    os.symlink(away, root / "link.jpg")
    for path, words in ((str(away), "leads out"), (os.path.relpath(away, sysu_root), "leads out"), ("link.jpg", "leads out")):
        table.assign(path=path).to_csv(run.path / "samples.csv", index=False)
        with pytest.raises(VireidError, match=words):
            sample_pictures(run, root)
        assert cli.main(["report", str(run.path), "--root", str(root)]) == 0
        assert Thumbnails(tmp_path, ["away.jpg"], height=96).uri(0) not in (run.path / "report.html").read_text()


# ---- run folders: two at once, moved, asked to stop, spoiled losses, made again


def test_two_trainings_in_one_folder(run, made):
    config = replace(small(made.config["data"]["root"], run.path.parent, run.path.name), keep_features=True)
    with sole(run):
        with pytest.raises(VireidError, match=rf"is being trained by process {os.getpid()} on .* since "):
            train(config, resume=True)
    assert train(config, resume=True).epochs == run.epochs  # free again
    (run.path / ".training.json").write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "yesterday"}))  # a killed one's
    left = run.path / "checkpoints" / ".last.abc.tmp"
    left.mkdir()
    (left / "lock").touch()
    train(config, resume=True)
    assert not left.exists() and not (run.path / ".training.json").exists()


def test_a_moved_folder_finds_its_pictures(sysu_root, tmp_path, monkeypatch):
    shutil.copytree(sysu_root, tmp_path / "old/data")
    monkeypatch.chdir(tmp_path)
    run = train(replace(small("old/data", "old/runs"), keep_features=True))  # as it was typed: relative
    assert os.path.isabs(run.config["data"]["root"]) and InspectorState(run).thumbnails.there()
    shutil.move(tmp_path / "old", tmp_path / "new")
    moved = InspectorState(tmp_path / "new/runs/run")
    assert moved.root == tmp_path / "new/data" and moved.thumbnails.there()
    assert cli.main(["evaluate", str(moved.run.path)]) == 0
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "new/data", other)
    next(other.glob("cam1/*/*.jpg")).unlink()
    with pytest.raises(VireidError, match="training pictures"):
        train(replace(small(other, tmp_path / "new/runs"), keep_features=True), resume=True)


def test_asked_to_stop_between_two_steps(made, tmp_path):
    config, seen = small(made.config["data"]["root"], tmp_path, keep_features=True), []

    def ask(run, entry):
        seen.append(entry["event"])
        if entry["event"] == "step" and entry["epoch"] == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped) as e:
        train(config, callbacks=(ask,))
    assert e.value.code == 143 and seen[-1] == "step" and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run = train(config, resume=True)
    assert same(weights(made), weights(run)) and told_by(made) == told_by(run)


def test_a_bad_loss_says_where_it_came_from(made, tmp_path, monkeypatch):
    config, true, calls = small(made.config["data"]["root"], tmp_path), Engine.step, []

    def spoil(self, loss, optimizer):
        calls.append(0)
        return true(self, loss * float("nan") if len(calls) == 4 else loss, optimizer)

    monkeypatch.setattr(Engine, "step", spoil)
    with pytest.raises(VireidError, match=r"epoch 2, step \d: the training loss became nan.*checkpoints/last, is of epoch 1; the step saw \d+ pictures: .*jpg") as e:
        train(config)
    assert len(str(e.value).splitlines()) == 1
    told = Run(tmp_path / "run").events()[-1]
    assert told["event"] == "bad-loss" and set(told["pictures"]) <= set(made.samples().path)


@pytest.mark.parametrize("flags", [
    ["--optim.lr", "-1"], ["--data.size", "-1", "-1"], ["--optim.decay-every", "0"], ["--seed", "9" * 20], ["--augment.erase", "nan"], ["--augment.erase-aspect", "nan", "1"],
    ["--optim.backbone", "inf"], ["--optim.decay", "nan"], ["--batch.iterations", "9" * 30],
])  # fmt: skip
def test_numbers_that_cannot_be(sysu_root, tmp_path, capsys, flags):
    assert cli.main(["train", "baseline", "--preset", "synth", "--data.root", str(sysu_root), "--runs", str(tmp_path / "runs"), *flags]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and flags[0].lstrip("-").replace("-", "_") in said[0] and not (tmp_path / "runs").exists()


def test_every_method_has_every_value_checked():
    for cls, preset, known, _ in cli.METHODS.values():
        for name in known:
            check_values(preset(name))


def test_a_run_is_made_again_and_differences_are_found(made, run, capsys):
    assert cli.main(["reproduce", str(made.path)]) == 0 and "the same in all of 2 epochs" in capsys.readouterr().out
    record = run.path / "metrics.jsonl"
    record.write_text(record.read_text().replace('"n_clusters_visible": ', '"n_clusters_visible": 1', 1))
    assert first_difference(made, run, 3).startswith("epoch 1, event 'labels': n_clusters_visible")


def test_a_report_without_pictures_holds_none(run):
    page = run.path / "report.html"
    assert cli.main(["report", str(run.path), "--no-pictures"]) == 0 and "data:image" not in page.read_text() and "This page holds no image." in page.read_text()
    assert cli.main(["report", str(run.path)]) == 0
    held = page.read_text().count("data:image")
    assert held > 0 and f"This page holds {held} images of people" in page.read_text()


@pytest.mark.parametrize("where", ["epochs/0001 copy", "epochs/notes", "epochs/0001.bak"])
def test_what_people_leave_among_the_epochs(run, where):
    shutil.copytree(run.folder(1), run.path / where)
    assert Run(run.path).epochs == [0, 1, 2]
    assert cli.main(["report", str(run.path)]) == 0


def test_a_pipe_among_the_pictures_is_no_picture(sysu_root, tmp_path, capsys):
    root = shutil.copytree(sysu_root, tmp_path / "data")
    os.mkfifo(next(root.glob("cam1/*")) / "a\nb.jpg")
    assert cli.main(["check", str(root), "--dataset", "sysu"]) == 2
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "ordinary" in x]
    assert r"a\nb.jpg: no ordinary file" in line


def test_read_only_and_full(made, tmp_path, monkeypatch, capsys):
    "What the system says in these cases, said by the call that brings bytes to the disk."
    for code, words in ((errno.EROFS, "is read-only; choose a folder that can be written"), (errno.ENOSPC, "MB free); free some space there"), (errno.EDQUOT, "your quota there is used up")):
        with monkeypatch.context() as m:
            m.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
            assert cli.main(["report", str(made.path), "-o", str(tmp_path / "page.html")]) == 2
        assert words in capsys.readouterr().err and [*tmp_path.iterdir()] == []
