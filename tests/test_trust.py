"Other people's run folders, lists and pictures: nothing in them runs, nothing outside the named folders is read or written, and whatever is wrong is one line."
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vireid_nb import cli
from vireid_nb.artifacts import Run
from vireid_nb.baseline import baseline_preset
from vireid_nb.inspector import InspectorState, Thumbnails, rows_where
from vireid_nb.records import VireidError
from vireid_nb.training import train
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
