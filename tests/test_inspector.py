"Looking at runs that are whole, and at those that are not; no browser."
import html
import io
import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from looking import features_for, made_up_run
from markupsafe import escape
from PIL import Image

from vireid_nb import monitor as monitors
from vireid_nb.artifacts import Run
from vireid_nb.catalog import load_catalog
from vireid_nb.clustering import ClusterConfig, cross_modality_clustering
from vireid_nb.inspector import PALETTE, InspectorState, Thumbnails, cluster_fates, colour_by, neighbour_table, track_clusters
from vireid_nb.records import FeatureBank, Modality, PseudoLabels, VireidError
from vireid_nb.widgets import compare_epochs, inspect_clusters, inspect_matches, inspect_queries, modality_gap_view, tune_clustering

NASTY = "cam1/<script>alert('x')</script> \"quo'ted\" größe & 人.jpg"


@pytest.fixture(scope="module")
def run(sysu_root, tmp_path_factory):
    return made_up_run(sysu_root, tmp_path_factory.mktemp("looking") / "run")


def small_run(path, samples, modality, labels=None, features=None):
    "A run of one epoch with these samples."
    run = Run.create(path, {"data": {"root": str(path), "name": "folder"}}, samples)
    modality = np.asarray(modality)
    counts = [(modality == m).sum() for m in Modality]
    joint = np.zeros(len(modality), int) if labels is None else labels
    y = PseudoLabels(np.zeros(counts[0], int), np.zeros(counts[1], int), joint, modality)
    bank = None if features is None else FeatureBank(features, modality, np.zeros(len(modality), int), np.arange(len(modality)))
    run.save_epoch(0, y, bank)
    return run


labellings = arrays(np.int64, 30, elements=st.integers(-1, 5))


@given(labellings, labellings)
def test_tracking_only_renames(before, after):
    named = track_clusters(before, after, 10)
    assert ((named < 0) == (after < 0)).all()
    pairs = {(a, b) for a, b in zip(after, named)}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})  # one to one


@given(labellings, labellings)
def test_fates_account_for_every_cluster(before, after):
    fates = cluster_fates(before, after)
    old = fates[fates.fate != "new"]
    assert sorted(old.cluster) == sorted(set(before[before >= 0]))
    assert old["size"].sum() == (before >= 0).sum()
    assert set(fates[fates.fate == "new"].cluster) <= set(after[after >= 0])


@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("among", [None, 0, 1])
def test_neighbours_against_the_definition(run, k, among):
    bank = run.features(1)
    x, m = bank.features, bank.modality
    for row in (0, len(x) - 1):
        near = neighbour_table(bank, row, k, among)
        pool = [j for j in range(len(x)) if j != row and among in (None, m[j])]
        assert len(near) == min(k, len(pool))
        np.testing.assert_allclose(near.similarity, np.sort(x[pool] @ x[row])[::-1][:k], atol=1e-6)
        for j, mutual in zip(near.index, near.reciprocal):
            home = [i for i in range(len(x)) if i not in (j, row) and (among is None or m[i] == m[row])]
            margin = np.sort(x[home] @ x[j])[::-1]
            place = (margin > x[row] @ x[j] + 1e-6).sum()
            assert mutual == (place < k) or abs(margin - x[row] @ x[j]).min() < 1e-6


def test_colours_depend_on_the_name_alone():
    assert colour_by([3, 9, 20], "c").hex()[1] == colour_by([9], "c").hex()[0] == PALETTE[9]
    assert colour_by(np.zeros(0, np.int64), "c").hex() == [] and colour_by(np.zeros(0), "c").hex() == []


def test_queries_follow_the_camera_rule_and_the_evaluation(run):
    state = InspectorState(run)
    scores = state.queries()
    row = int(scores.index[0])
    ranked = state.ranking(row, 10**6)
    hits = np.flatnonzero([r is True for r in ranked.right])
    assert scores.ap[row] == pytest.approx(np.mean((np.arange(len(hits)) + 1) / (hits + 1)))
    numbers = state.camera_numbers
    for i in scores.index[:20]:
        hidden = numbers[i] == 3
        assert (2 in numbers[state.ranking(int(i), 10**6).index]) is not hidden


def test_selection_modes_and_rules(run):
    state, told = InspectorState(run), []
    state.observe(told.append)
    everyone = set(range(len(state.samples)))
    some = set(state.select(where="modality == 0").tolist())
    assert set(state.select(range(len(everyone)), mode="subtract").tolist()) == set()
    state.select(sorted(some))
    assert set(state.select(sorted(everyone - some), mode="add").tolist()) == everyone
    assert state.select().tolist() == [] and told == ["selection"] * 5
    assert state.filter("modality == 1") == (state.samples.modality == 1).sum()
    for bad in ("nonsense ==", "__import__('os').system('true')", "colour == 3"):
        with pytest.raises(VireidError, match="cannot be read"):
            state.select(where=bad)


def test_state_comes_back(run):
    state = InspectorState(run)
    state.set("epoch", 1), state.set("which", "intra"), state.set("colour", "camid"), state.filter("camid >= 0"), state.select([3, 1])
    state.tag("größe <b>")
    state.save("mine")
    state.save("other")
    again = InspectorState(run.path)
    again.load("mine")
    assert (again.epoch, again.which, again.colour, again.where, again.chosen.tolist()) == (1, "intra", "camid", "camid >= 0", [1, 3])
    assert again.tags == {"größe <b>": [1, 3]} and set(json.loads(state.file.read_text(encoding="utf-8"))["views"]) == {"mine", "other"}
    state.select([5])
    state.tag("one")  # what one layout keeps, another neither misses nor overwrites
    assert again.recall("one").tolist() == [5] and again.recall("größe <b>").tolist() == [1, 3] and set(again.kept["views"]) == {"mine", "other"}
    state.select()
    for deed, words in ((lambda: state.tag("none"), "nothing is chosen"), (lambda: state.tag(" "), "needs a name"), (lambda: state.save(""), "needs a name"), (lambda: state.recall("x"), "holds no tag 'x'")):
        with pytest.raises(VireidError, match=words):
            deed()
    state.file.unlink()


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"tags": []}', b"\xff\xfe", b'{"samples": 3}', b'{"views": {"mine": {}}}'])
def test_a_damaged_file_of_tags_stops_nobody(run, content):
    state = InspectorState(run)
    state.file.write_bytes(content)
    with pytest.raises(VireidError, match="is damaged|is of 3 samples"):
        state.load("mine")
    view = inspect_clusters(run)  # opens
    view.keep.name.value = "x"
    view.keep.tag.click()
    assert ("inspector.json" in view.keep.said.value) != ("tagged" in view.keep.said.value)
    state.file.unlink()


def test_tags_and_views_by_button(run):
    clusters, matches = inspect_clusters(run), inspect_matches(run)
    held = clusters.state.chosen.tolist()
    clusters.keep.tag.click()
    assert "needs a name" in clusters.keep.said.value
    clusters.keep.name.value = NASTY
    clusters.keep.tag.click()
    assert "<script" not in clusters.keep.said.value and escape(NASTY) in clusters.keep.said.value
    clusters.controls["epoch"].value = 0
    clusters.keep.name.value = "early"
    clusters.keep.view.click()
    again = inspect_clusters(run)
    assert [words for words, _ in again.keep.back.options] == ["choose ...", f"tag: {NASTY}", "view: early"]
    again.keep.back.value = ("views", "early")
    assert again.state.epoch == again.controls["epoch"].value == 0 and again.state.chosen.tolist() == clusters.state.chosen.tolist()
    again.keep.back.value = ("tags", NASTY)
    assert again.state.chosen.tolist() == held and again.keep.back.value == "" and again.pictures.value.count("<img") == len(held)
    matches.keep.name.value = "early"
    matches.keep.tag.click()
    assert set(InspectorState(run).tags) == {NASTY, "early"}
    clusters.state.file.unlink()


@pytest.mark.parametrize("layout", [inspect_clusters, inspect_matches, inspect_queries, modality_gap_view, lambda run: compare_epochs(run, 0, 2)])
def test_a_click_shows_the_point_or_its_neighbours(run, layout):
    view = layout(run)
    pane, sample = view.maps[0], 7
    pane.view.heard({"event": "click", "row": sample, "n": 1})
    assert view.state.caption(sample).split(",")[0] in html.unescape(view.card.value) and sample in view.state.chosen
    view.controls["click"].value = "near"
    pane.view.heard({"event": "click", "row": sample, "n": 2})
    near = [view.state.neighbours(sample, 10, m) for m in Modality]
    assert set(view.state.chosen) == {sample, *near[0].index, *near[1].index} and view.pictures.value.count("<img") == 22
    assert [int(n) for n in re.findall(r"(\d+) of them mutual", view.pictures.value)] == [n.reciprocal.sum() for n in near]
    assert np.array_equal(pane.view.chosen, view.state.chosen)
    view.state.select([0, 1])
    assert "mutual" not in view.pictures.value and view.pictures.value.count("<img") >= 2
    view.clicked(sample)
    view.state.set("which", "intra")  # other labels: what is shown follows
    assert view.near is None


def test_two_panes_are_one_family(run):
    view, other = compare_epochs(run, 0, 2), compare_epochs(run, 0, 1)
    links = [m.view.source.options["link"] for v in (view, other) for m in v.maps]
    assert links[0] == links[1] != links[2] == links[3] and all(links)  # the browser zooms and rings a family's maps together
    view.maps[0].view.heard({"event": "hover", "row": 9, "n": 1})
    assert view.state.caption(9).split(",")[0] in html.unescape(view.card.value)
    for mode, n in (("set", 30), ("add", 50), ("subtract", 20)):  # a lasso in either pane, marked in both
        rows = {"set": range(30), "add": range(10, 50), "subtract": range(30)}[mode]
        flags = np.isin(np.arange(len(view.state.samples)), rows)
        view.maps[1].view.heard({"event": "select", "mode": mode, "n": 2}, [np.packbits(flags).tobytes()])
        assert len(view.state.chosen) == n and all(np.array_equal(m.view.chosen, view.state.chosen) for m in view.maps)


def test_after_a_lasso_the_map_follows_the_list(run):
    view = inspect_clusters(run)
    plane, everybody = view.maps[0].view, np.ones(len(view.state.samples), bool)
    plane.heard({"event": "select", "mode": "set", "n": 1}, [np.packbits(everybody).tobytes()])
    assert len(plane.chosen) == len(everybody)
    view.panel.list.index = 1
    flags = np.unpackbits(np.frombuffer(plane.source.chosen, np.uint8), count=len(everybody))
    assert np.array_equal(np.flatnonzero(flags), view.state.chosen) and 0 < len(view.state.chosen) < len(everybody)


def test_each_lasso_is_answered_even_if_it_fails(run):
    plane, sent = inspect_clusters(run).maps[0].view, []
    plane.source.send = sent.append
    plane.on("click", lambda row: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plane.heard({"event": "click", "row": 0, "n": 7})
    assert sent == [{"done": 7}]


def test_half_written_and_foreign_runs(sysu_root, tmp_path):
    with pytest.raises(VireidError, match="is not a run folder"):
        InspectorState(tmp_path)
    run = made_up_run(sysu_root, tmp_path / "a", gaps=(0.5,))
    info = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps(info | {"format": 0}))
    with pytest.raises(VireidError, match="format 0"):
        InspectorState(run.path)
    (run.path / "config.json").write_text(json.dumps(info))
    whole = (run.folder(0) / "features.safetensors").read_bytes()
    (run.folder(0) / "features.safetensors").write_bytes(whole[:200])
    with pytest.raises(VireidError, match="features.safetensors is damaged"):
        InspectorState(run.path).xy()
    (run.folder(0) / "features.safetensors").unlink()
    assert InspectorState(run.path).mapped == []
    text = (run.path / "samples.csv").read_text().splitlines()
    (run.path / "samples.csv").write_text("\n".join(text[:-3]))
    with pytest.raises(VireidError, match="of different runs"):
        InspectorState(run.path)
    (run.folder(0) / "labels.safetensors").write_bytes(b"")
    (run.path / "samples.csv").write_text("\n".join(text))
    with pytest.raises(VireidError, match="labels.safetensors is damaged"):
        InspectorState(run.path)
    (run.folder(0) / "info.json").unlink()
    with pytest.raises(VireidError, match="keeps no epoch yet"):
        InspectorState(run.path)
    (run.path / "samples.csv").unlink()
    with pytest.raises(VireidError, match="ended before it began"):
        InspectorState(run.path)


def test_runs_that_keep_less(sysu_root, tmp_path):
    run = made_up_run(sysu_root, tmp_path / "bare", keep=False, ids=False)
    view = inspect_clusters(run)
    assert not view.maps and "--keep-features" in "".join(c.value for c in walk(view) if type(c).__name__ == "HTML")
    assert view.pictures.value.count("<img") > 0 and "identities unknown" in view.head.value
    assert not inspect_matches(run).maps and len(compare_epochs(run, 0, 2).panel.fates)
    for layout in (inspect_queries, modality_gap_view):
        with pytest.raises(VireidError, match="--keep-features"):
            layout(run)
    nameless = made_up_run(sysu_root, tmp_path / "nameless", gaps=(0.5, 0.2), ids=False)
    asked = inspect_queries(nameless)
    assert "no identities" in asked.panel.say.value and "?" in asked.pictures.value and "unknown" not in modality_gap_view(nameless).head.value.replace("identities unknown", "")


def test_moved_pictures(run, tmp_path, caplog):
    state = InspectorState(run, root=tmp_path)
    assert Image.open(io.BytesIO(state.thumbnails.jpeg(0))).size == (64, 128)
    assert "pass root=" in caplog.text
    view = inspect_clusters(state)
    assert view.pictures.value.count("<img") > 0 and any("pass root=" in w.value for w in walk(view) if type(w).__name__ == "HTML")  # said inside the view


@pytest.mark.parametrize("modality", [0, 1])
def test_one_modality(tmp_path, modality):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 8)).astype(np.float32)
    samples = pd.DataFrame({"path": [f"{i}.jpg" for i in range(12)], "modality": modality, "camid": 0, "pid": np.arange(12) // 4})
    run = small_run(tmp_path / "one", samples, [modality] * 12, np.arange(12) // 6, x / np.linalg.norm(x, axis=1, keepdims=True))
    view = inspect_clusters(run)
    assert len(view.selected) == 6
    view.controls["click"].value = "near"
    view.clicked(0)
    assert len(view.selected) == 11 and "the 0 nearest" in view.pictures.value  # ten of its kind, none of the other
    assert len(compare_epochs(run, 0, 0).panel.fates) == 2
    with pytest.raises(VireidError, match="modalit"):
        tune_clustering(InspectorState(run).bank())
    assert "no cluster of this epoch is matched" in inspect_matches(run).panel.count.value
    with pytest.raises(VireidError, match="both modalities are needed"):
        InspectorState(run).queries()
    with pytest.raises(VireidError, match="modality"):
        modality_gap_view(run)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_very_few_samples(tmp_path, n):
    x = np.eye(8, dtype=np.float32)[:n]
    samples = pd.DataFrame({"path": [f"{i}.jpg" for i in range(n)], "modality": [i % 2 for i in range(n)], "camid": -1, "pid": -1})
    view = inspect_clusters(small_run(tmp_path / "few", samples, [i % 2 for i in range(n)], np.full(n, -1), x))
    view.act("method", "umap")  # fewer points than neighbours
    view.state.select([0])
    assert len(view.selected) == 1
    view.maps[0].view.heard({"event": "select", "mode": "set", "n": 1}, [bytes(1)])
    assert len(view.selected) == 0 and "Drag around" in view.pictures.value


def test_names_are_escaped_wherever_html_is_made(tmp_path):
    root = tmp_path / "<script>'r\"un' größe"
    samples = pd.DataFrame({"path": [NASTY, "b.jpg"] * 4, "modality": [0, 1] * 4, "camid": 0, "pid": [0, 0, 1, 1] * 2})
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    run = small_run(root, samples, [0, 1] * 4, [0] * 8, x / np.linalg.norm(x, axis=1, keepdims=True))
    said = []
    for view in (inspect_clusters(run), inspect_matches(run), inspect_queries(run), modality_gap_view(run), compare_epochs(run, 0, 0)):
        view.state.extra["<script>"] = np.arange(8.0)
        view.act("colour", "<script>")
        view.show(0)
        view.controls["click"].value = "near"
        view.clicked(0)
        view.act("where", "<img src=x onerror=alert(1)>")
        view.keep.name.value = "<script>"
        view.keep.tag.click()
        said += [w.value for w in walk(view) if type(w).__name__ == "HTML"]
    text = "".join(s for s in said if not s.startswith("<style>"))
    assert escape(NASTY) in text and "&lt;script&gt;" in text and "&lt;img src=x" in text
    assert "tagged 8 as &lt;script&gt;" in text and escape(root.name) in text
    assert "<script" not in text and "onerror=alert(1)>" not in text
    assert set(re.findall(r"</?([a-z0-9]+)", text)) <= {"div", "h3", "b", "span", "i", "figure", "img", "figcaption", "table", "tr", "td", "svg", "text", "title", "g", "path", "circle", "line"}


def walk(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from walk(child)


def test_pictures_outside_the_root_are_not_read(tmp_path):
    (tmp_path / "root").mkdir()
    Image.new("RGB", (8, 16), "red").save(tmp_path / "secret.png")
    (tmp_path / "root/link.png").symlink_to(tmp_path / "secret.png")
    shown = Thumbnails(tmp_path / "root", ["../secret.png", str(tmp_path / "secret.png"), "link.png", "none.png"])
    assert len({shown.jpeg(i) for i in range(4)}) == 1  # all grey tiles


def test_views_share_a_state(run):
    state = InspectorState(run)
    clusters, matches = inspect_clusters(state), inspect_matches(state)
    clusters.state.select([0, 1, 2])
    assert len(matches.selected) == 3 and matches.maps[0].view.chosen.tolist() == [0, 1, 2]
    matches.controls["epoch"].value = 0
    assert clusters.controls["epoch"].value == 0


def test_a_change_sends_what_it_needs(run, monkeypatch):
    view = inspect_clusters(run)
    source, sent = view.maps[0].view.source, []
    monkeypatch.setattr(source, "_send", lambda msg, buffers=None: sent.append((set(msg.get("state", ())), sum(map(len, buffers or ())))))
    n = len(view.state.samples)
    for change, names in (
        (lambda: view.state.select(range(7)), {"chosen"}),
        (lambda: view.state.set("colour", "camid"), {"colour", "palette"}),
        (lambda: view.state.filter("modality == 1"), {"look"}),
        (lambda: view.state.set("epoch", 0), {"xy", "look", "options"}),
    ):
        sent.clear()
        change()
        assert set().union(*(keys for keys, _ in sent)) <= names | {"chosen", "options"} and len(sent) <= 2  # the change, and the choice a new list brings
        assert sum(size for _, size in sent) <= 6 * n + 64


def test_tuning_equals_clustering(sysu_root):
    samples = load_catalog(sysu_root, "sysu").train
    bank = features_for(samples, 0.4)
    config = ClusterConfig(k1=10, k2=3, joint_k1=12, joint_k2=4, joint_eps=0.5)
    view = tune_clustering(bank, samples.pid, config)
    for eps, groups in ((0.3, "none"), (0.7, "camera"), (0.5, "modality")):
        view.controls["joint_groups"].value = groups
        view.controls["eps"].value = eps
        fresh = cross_modality_clustering(bank, replace(view.tuner.config, joint_eps=eps, eps=eps))
        assert (view.tuner.labels() == fresh.joint).all()
    with pytest.raises(VireidError, match="one for each is needed"):
        tune_clustering(bank, samples.pid[:5], config)


def test_monitor_in_a_training(sysu_root, tmp_path):
    from vireid_nb.baseline import baseline_preset
    from vireid_nb.engine import EngineConfig
    from vireid_nb.training import BatchConfig, train

    config = baseline_preset("synth")
    config = replace(config, data=replace(config.data, root=str(sysu_root)), batch=BatchConfig(n_ids=3, n_instances=3, iterations=2), engine=EngineConfig(device="cpu", progress=False), intra_epochs=1, joint_epochs=1, runs=str(tmp_path))
    shown = []
    monitor = monitors.Monitor(every=0.0, show=shown.append)
    run = train(config, callbacks=[monitor])
    curves = {(title, line.name): len(line.x) for title, lines in monitor.series().items() for line in lines}
    assert len(shown) == 1 and curves["losses", "visible"] >= 2 and curves["clusters", "joint"] == 3 and curves["ARI", "infrared"] == 3
    theirs = monitors.watch(run.path, show=lambda widget: None)  # the same, from the run's folder alone
    assert theirs.ended and theirs.task is None
    told = {(title, line.name): len(line.x) for title, lines in theirs.monitor.series().items() for line in lines}
    assert told["clusters", "joint"] == 3 and told["losses", "visible"] >= 1
