"""Maps that stay in place and gaps that are measured; reports that open for every run, fetch nothing, and cannot be broken by a name."""
import base64
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vireid_nb.artifacts import Run
from vireid_nb.clustering import ClusterConfig, cross_modality_clustering
from vireid_nb.evaluation import pseudo_label_scores
from vireid_nb.projection import align, gap_table, jumps, modality_gap, principal_axes, project, project_epochs, projection_table, save_projection, trust
from vireid_nb.records import FeatureBank, PseudoLabels, VireidError
from vireid_nb.report import curves, report, report_command
from vireid_nb.svg import Cell, markup, number, table, tick_texts, ticks, with_best
from vireid_nb.synthetic import make_vi_features

EVIL = """<script>alert('ä');</script> "größe" & 照片.png"""


def bank_of(n_ids=10, gap=0.3, seed=0, **knobs):
    return make_vi_features(n_ids, 6, 6, dim=32, modality_gap=gap, noise=0.5, seed=seed, **knobs)


def changed(bank, features):
    return FeatureBank(features, bank.modality, bank.camid, bank.index)


# maps


@pytest.mark.parametrize("n, d", [(50, 3), (200, 64), (30, 200), (5, 1), (2, 2), (1, 8)])
def test_principal_axes_catch_what_a_full_decomposition_does(n, d):
    x = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32) @ np.diag(np.linspace(3, 1, d)).astype(np.float32)
    axes, centred = principal_axes([x]), x - x.mean(0)
    best = (np.linalg.svd(centred, compute_uv=False)[:2] ** 2).sum()
    assert axes.shape == (d, 2) and np.array_equal(axes, principal_axes([x]))
    assert ((centred @ axes) ** 2).sum() >= 0.99 * best - 1e-6


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 16])
@pytest.mark.parametrize("method", ["pca", "umap"])
def test_too_few_points_for_umap_get_a_pca_map(n, method, caplog):
    bank = bank_of()[0].take(np.arange(n))
    with caplog.at_level("WARNING", "vireid_nb"):
        xy = project(bank, method)
    assert xy.shape == (n, 2) and np.isfinite(xy).all() and np.array_equal(xy, project(bank, "pca"))
    assert ("too few or too alike" in caplog.text) == (method == "umap" and n > 0)


def test_points_that_are_all_alike_get_a_map(caplog):
    bank = bank_of()[0]
    assert np.abs(project(changed(bank, np.ones_like(bank.features) / 32**0.5), "umap")).max() < 1e-5
    assert "too alike" in caplog.text


def test_umap_is_seeded_trusted_and_stays_in_place():
    banks = {e: bank_of(gap=gap)[0] for e, gap in enumerate((0.6, 0.4, 0.2, 0.1))}
    layouts, again = project_epochs(banks, "umap", seed=3), project_epochs(banks, "umap", seed=3)
    assert all(np.array_equal(layouts[e], again[e]) for e in banks)
    assert min(trust(banks[e], layouts[e]) for e in banks) > 0.85
    apart = jumps({e: project(b, "umap", seed=e) for e, b in banks.items()})
    assert sum(jumps(layouts).values()) < 0.5 * sum(apart.values())


def test_umap_leaves_torchs_threads_as_they_were():
    "UMAP sets numba's thread count, which moves OpenMP's under torch: torch's own count and OpenMP's are both read back."
    code = "import torch; torch.set_num_threads(1); from vireid_nb.synthetic import make_vi_features; from vireid_nb.projection import project"
    code += "; project(make_vi_features(6, 8, 8)[0], 'umap'); print(torch.__config__.parallel_info())"
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    counts = dict(re.findall(r"(at::get_num_threads|omp_get_max_threads|mkl_get_max_threads)\(\) : (\d+)", told))
    assert len(counts) == 3 and set(counts.values()) == {"1"}, told


def test_importing_the_module_does_not_import_umap():
    code = "import sys, vireid_nb.projection; print('umap' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 6.3), st.floats(0.1, 10), st.booleans(), st.floats(-5, 5))
def test_align_undoes_turning_mirroring_scaling_and_shifting(angle, scale, mirror, shift):
    xy = np.random.default_rng(0).normal(size=(40, 2))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.diag([1, -1 if mirror else 1])
    assert np.abs(align(scale * xy @ turn + shift, xy) - xy).max() < 1e-4


def test_pca_epochs_share_axes_and_ignore_a_common_shift():
    beside = lambda bank, axis: changed(bank, np.column_stack([0.6 * bank.features, 0.8 * np.eye(2)[[axis] * len(bank)]]))  # of unit length, wherever the middle is
    banks = {0: beside(bank_of(gap=0.5)[0], 0), 1: beside(bank_of(gap=0.4)[0], 0)}
    layouts = project_epochs(banks, "pca")
    shifted = project_epochs({0: banks[0], 1: beside(bank_of(gap=0.4)[0], 1)}, "pca")
    assert np.abs(layouts[1] - shifted[1]).max() < 1e-3
    assert jumps({0: layouts[0], 1: layouts[0]}) == {1: 0.0}


def test_epochs_are_read_one_at_a_time():
    class Lazy(dict):
        reads = []

        def __getitem__(self, e):
            self.reads.append(e)
            return super().__getitem__(e)

    banks = Lazy({e: bank_of()[0] for e in range(3)})
    assert list(project_epochs(banks, "pca")) == [0, 1, 2] and set(banks.reads) == {0, 1, 2}
    with pytest.raises(VireidError, match="other samples"):
        project_epochs({0: banks[0], 1: banks[1].take(slice(0, 8))})


def test_a_projection_goes_to_other_viewers(tmp_path):
    bank, _ = bank_of()
    paths = np.array([f"{EVIL}{i}" for i in range(200)])
    table = projection_table(bank, project(bank, "pca"), paths, k=4, epoch=7)
    back = pd.read_csv(save_projection(tmp_path / "map.csv", table))
    assert list(back.columns) == ["sample", "x", "y", "modality", "camid", "epoch", "neighbors", "thumbnail"]
    assert back.thumbnail[5] == paths[bank.index[5]] and set(back.modality) == {"visible", "infrared"}
    similar = bank.features @ bank.features.T
    for row in (0, 17, len(bank) - 1):
        found = json.loads(back.neighbors[row])
        assert len(found["ids"]) == 4 and row not in found["ids"]
        assert np.allclose(1 - similar[row, found["ids"]], found["distances"], atol=1e-4)
    assert len(projection_table(bank.take(slice(0, 1)), np.zeros((1, 2)))) == 1
    with pytest.raises(VireidError, match="xy has shape"):
        projection_table(bank, np.zeros((3, 2)))


def test_parquet_without_an_engine_is_a_clear_error(tmp_path):
    table = pd.DataFrame({"x": [1.0]})
    try:
        table.to_parquet(tmp_path / "t.parquet")
    except ImportError:
        with pytest.raises(VireidError, match="pip install pyarrow"):
            save_projection(tmp_path / "map.parquet", table)
        assert not list(tmp_path.glob("map*"))
    else:
        assert pd.read_parquet(save_projection(tmp_path / "map.parquet", table)).x[0] == 1.0


# the gap


@pytest.mark.parametrize("seed", range(3))
def test_measures_follow_the_knob(seed):
    banks = {g: make_vi_features(25, 8, 8, noise=0.7, camera_gap=0.0, modality_gap=g, seed=seed)[0] for g in (0.0, 0.3, 1.0)}
    table = gap_table(banks, make_vi_features(25, 8, 8, seed=seed)[1])
    for name in ("centroid_distance", "mmd2", "linear_accuracy"):
        assert table[name].is_monotonic_increasing, name
    for name in ("neighbour_mixing", "positive_across", "delta_across"):
        assert table[name].is_monotonic_decreasing, name
    assert np.ptp(table.delta_visible) < 1e-6 and np.allclose(table.delta_across, table.positive_across - table.negative_across)


def test_measures_do_not_depend_on_turning_the_space_or_the_order_of_rows():
    bank, pids = bank_of()
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 32)))[0]
    order = np.random.default_rng(1).permutation(len(bank))
    here, turned = modality_gap(bank, pids), modality_gap(changed(bank, bank.features @ turn), pids)
    moved = modality_gap(bank.take(order), pids[order])
    for name in set(here) - {"histograms", "linear_accuracy", "mmd2"}:  # those two draw folds and splits by position
        assert here[name] == pytest.approx(turned[name], abs=1e-3) and here[name] == pytest.approx(moved[name], abs=1e-3), name
    assert turned["mmd2"] == pytest.approx(here["mmd2"], abs=1e-4) and moved["mmd2"] == pytest.approx(here["mmd2"], abs=0.01)


def test_what_cannot_be_measured_is_refused_or_left_out():
    bank, pids = bank_of()
    for part, word in ((bank.visible, "no gap without infrared"), (bank.infrared, "no gap without visible")):
        with pytest.raises(VireidError, match=word):
            modality_gap(part)
    assert not any("delta" in k or k == "histograms" for k in modality_gap(bank))
    half = np.where(np.arange(len(pids)) % 2, pids, -1)
    assert np.isfinite(modality_gap(bank, half)["delta_across"])
    lonely = bank.take(np.r_[0, np.flatnonzero(bank.modality == 1)])
    assert np.isnan(modality_gap(lonely)["linear_accuracy"])
    strangers = np.arange(len(pids))
    assert np.isnan(modality_gap(bank, strangers)["delta_across"])


# reports

CLUSTERING = ClusterConfig(k1=8, k2=3, eps=0.6, joint_k1=12, joint_k2=4, joint_eps=0.6, min_samples=3)


def make_run(path, *, epochs=3, keep=True, ids=True, one_modality=False, names=str, root="gone", config=None):
    run = None
    for epoch in range(epochs):
        bank, pids = make_vi_features(6, 8, 6, dim=16, modality_gap=0.6 / (epoch + 1), noise=0.5, seed=1)
        bank, pids = (bank.visible, pids[bank.modality == 0]) if one_modality else (bank, pids)
        if run is None:
            samples = pd.DataFrame({"path": [names(f"{i:03d}.png") for i in range(len(bank))], "modality": bank.modality, "camid": bank.camid, "pid": pids if ids else -1})
            run = Run.create(path, {"data": {"root": str(root), "name": "sysu"}, "intra_epochs": 1, "joint_epochs": 5, "seed": 1, **(config or {})}, samples, device="cpu")
        if one_modality:
            labels = PseudoLabels(np.zeros(len(bank)), [], np.zeros(len(bank)), bank.modality)
        else:
            labels = cross_modality_clustering(bank, CLUSTERING)
        scores = pseudo_label_scores(labels, pids if ids else np.full(len(pids), -1))
        run.save_epoch(epoch, labels, bank if keep else None, phase="intra", scores=scores)
        run.log("labels", epoch, phase="intra" if epoch < 2 else "joint", **scores)
        run.log("train", epoch, loss={"visible": 1.0 / (epoch + 1)}, lr=1e-3, steps=epoch)
        run.log("eval", epoch, protocol="all", rank1=0.5, mAP=0.4, spread={"rank1": 0.01}, trials=10)
        run.log("seconds", epoch, learn=1.5, peak_memory_gb={"process": 1.0})
    return run


class Checked(HTMLParser):
    "Every element is closed, and what would fetch or run is collected."

    def __init__(self, text):
        super().__init__()
        self.open, self.refs, self.tags, self.handlers, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.refs += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster", "xlink:href")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def read(path):
    text = Path(path).read_text(encoding="utf-8")
    page = Checked(text)
    assert page.tags.count("section") == 12
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags) and not page.handlers
    assert all(r.startswith(("data:image/jpeg;base64,", "#")) for r in page.refs) and sum(r[0] == "#" for r in page.refs) == 12
    held = sum(r.startswith("data:") for r in page.refs)
    assert (f"This page holds {held} image" if held else "This page holds no image.") in text
    assert not re.search(r"https?:|url\(|@import|@font-face", text)
    assert "default-src 'none'" in text
    return page, " ".join(page.text)


def test_a_report_holds_everything_and_fetches_nothing(tmp_path):
    path = report(make_run(tmp_path / "run"))
    page, text = read(path)
    assert path == tmp_path / "run" / "report.html" and path.stat().st_size < 120_000
    for word in ("Rank-1", "ARI of pseudo-labels", "50.0 ± 1.0", "Matched clusters", "6 people, after 2 epochs", "δ across", "mean AP", "intra_epochs", "torch"):
        assert word in text, word
    assert page.tags.count("svg") > 20 and "not ended" in text and "The pictures are not under gone" in text


def damage_metrics_missing(run):
    (run.path / "metrics.jsonl").unlink()


def damage_metrics_torn(run):
    with open(run.path / "metrics.jsonl", "a") as f:
        f.write('3\n"text"\n[]\n{"event": "labels"}\n{"event": "eval", "epoch": 9, "rank1": "high"}\n{"event": "train", "epoch": 3, "lo')


def damage_samples_missing(run):
    (run.path / "samples.csv").unlink()


def damage_samples_other(run):
    (run.path / "samples.csv").write_text("index,path,modality,camid,pid\n0,a.png,0,0,1\n")


def damage_last_labels(run):
    (run.folder(2) / "labels.safetensors").write_bytes(b"cut")


def damage_features(run):
    for e in run.epochs:
        (run.folder(e) / "features.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")


def damage_info(run):
    (run.folder(1) / "info.json").write_text("{")


def damage_config(run):
    (run.path / "config.json").write_text(json.dumps({"format": 1, "config": {"data": None, "seed": [1], "optim": {}}}))


def damage_epochs(run):
    for e in run.epochs:
        (run.folder(e) / "info.json").unlink()


DAMAGE = {
    damage_metrics_missing: "no pseudo-labels recorded yet",
    damage_metrics_torn: "δ across",  # what is no event is left out, the others stand
    damage_samples_missing: "has no samples.csv",
    damage_samples_other: "samples.csv lists 1",
    damage_last_labels: "labels.safetensors is damaged",
    damage_features: "could not be read|features.safetensors is damaged",
    damage_info: "δ across",
    damage_config: "δ across",
    damage_epochs: "No epoch was kept yet",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_run_still_has_a_report(damage, tmp_path):
    run = make_run(tmp_path / "run")
    damage(run)
    _, text = read(report(tmp_path / "run"))
    assert re.search(DAMAGE[damage], text)
    compared = read(report([tmp_path / "run", make_run(tmp_path / "sound")], tmp_path / "c.html"))[1]
    assert "2 runs compared" in compared and "δ across" in compared


@pytest.mark.parametrize(
    "how, word",
    [
        (dict(keep=False), "No features were kept"),
        (dict(ids=False), "knows no identities"),
        (dict(ids=False), "Identities are not known"),
        (dict(one_modality=True), "no gap without infrared"),
        (dict(epochs=1), "people, after 0 epochs"),
    ],
)
def test_what_a_run_lacks_is_said_in_place(how, word, tmp_path):
    assert word in read(report(make_run(tmp_path / "run", **how)))[1]


def test_matchings_and_schedules_are_told(tmp_path):
    run = make_run(tmp_path / "run", keep=False)
    for e in run.epochs:
        labels = run.labels(e)
        made = {"pairs": [[0, 0], [1, 1]], "cost": [0.1, 0.2], "alone_visible": [2, 3, 4], "alone_infrared": [2], "rule": "hungarian", "n": 4}
        told = replace(labels, info={**labels.info, "matching": made, "eps": 0.6 - 0.1 * e, "k2": 6 + e, "joint_k2": 32})
        run.save_epoch(e, told, phase="intra")
    text = read(report(run))[1]
    assert "matches at the end 2" in text and "visible ones left alone 3" in text and "rule hungarian" in text
    drawn = curves(run)
    assert drawn["Schedule of k2"].series == {"within modalities": [(0, 6), (1, 7), (2, 8)]}
    assert drawn["Schedule of eps"].series["within modalities"][-1] == (2, pytest.approx(0.4))


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    run = Run.create(tmp_path / "new", {}, pd.DataFrame({"path": [], "modality": []}))
    assert "No epoch was kept yet" in read(report(run))[1]


def test_runs_that_cannot_be_opened(tmp_path):
    good, old = make_run(tmp_path / "good", keep=False), make_run(tmp_path / "old", keep=False)
    (old.path / "config.json").write_text(json.dumps({**old.info, "format": 99}))
    assert "has run-folder format 99" in read(report([good, old.path], tmp_path / "x.html"))[1]
    for broken in ([old.path], [tmp_path / "nowhere"], []):
        with pytest.raises(VireidError):
            report(broken, tmp_path / "y.html")
    assert not (tmp_path / "y.html").exists()


def test_names_are_escaped_wherever_they_stand(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    evil = lambda name: EVIL.replace(";</script>", "").replace(".png", name)  # a name without a slash can be a file
    run = make_run(tmp_path / "<b>run & 'x'", names=evil, root=pictures, config={"name": EVIL, "method": EVIL})
    run.log("train", 3, loss={EVIL: 0.5}, lr=1e-4)
    run.log("eval", 3, protocol=EVIL, rank1=0.5, mAP=0.5)
    run.log("seconds", 3, **{EVIL: 2.0})
    for i in range(0, 84, 2):  # every other picture is there
        Image.new("RGB", (24, 48), (i * 3, 90, 200)).save(pictures / evil(f"{i:03d}.png"))
    page, text = read(report(run))
    assert EVIL in text and "<b>run & 'x'" in text and "b" in page.tags
    assert len(page.refs) >= 6 * 11
    gone = read(report(make_run(tmp_path / "gone", names=evil), tmp_path / "gone.html"))[1]
    assert evil("0")[:20] in gone


def test_bytes_that_are_no_character_do_not_stop_a_report(tmp_path):
    run = make_run(tmp_path / "run", keep=False, config={"note": "broken \udcff name"})
    assert "broken ? name" in read(report(run))[1]


def test_pictures_outside_the_data_folder_are_not_taken(tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (24, 48), (255, 0, 255)).save(secret)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(84):
        Image.new("RGB", (24, 48)).save(pictures / f"{i:03d}.png")
    honest = report(make_run(tmp_path / "honest", root=pictures)).read_text()
    run = make_run(tmp_path / "sly", names=lambda n: "../secret.png" if n < "040" else n, root=pictures)
    seen = re.findall(r"base64,([^\"]+)", report(run).read_text())
    colours = [Image.open(io.BytesIO(base64.b64decode(s))).getpixel((12, 4)) for s in seen]
    assert len(colours) and not any(r > 200 and b > 200 and g < 60 for r, g, b in colours) and "base64," in honest


def test_moved_pictures_are_found_with_root(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    for i in range(84):
        Image.new("RGB", (24, 48)).save(here / f"{i:03d}.png")
    run = make_run(tmp_path / "run")
    assert "base64," not in report(run).read_text() and "base64," in report(run, root=here).read_text()


def test_a_comparison_names_what_differs(tmp_path):
    a = make_run(tmp_path / "a" / "run", config={"eps": 0.5, "joint": True})
    b = make_run(tmp_path / "b" / "run", config={"eps": 0.6, "joint": True}, epochs=2)
    path = report([a, b])
    page, text = read(path)
    assert path == tmp_path / "a" / "comparison.html"
    at = text.rindex("Configuration")
    before_all = text[at : text.index("All ", at)]
    assert "eps" in before_all and "joint" not in before_all and "a/run" in text and "b/run" in text
    same = read(report([a, a], tmp_path / "same.html"))[1]
    assert "The runs have the same configuration and versions." in same


def test_the_command(tmp_path, capsys):
    run = make_run(tmp_path / "run", keep=False)
    assert tyro.cli(report_command, args=[str(run.path), "-o", str(tmp_path / "r.html")]) == 0
    assert str(tmp_path / "r.html") in capsys.readouterr().out and (tmp_path / "r.html").exists()
    assert tyro.cli(report_command, args=[str(run.path), str(run.path), "--out", str(tmp_path / "two.html")]) == 0
    assert "2 runs compared" in read(tmp_path / "two.html")[1]


@settings(max_examples=60, deadline=None)
@given(st.text(), st.text())
def test_no_text_leaves_its_element(content, attribute):
    page = Checked(markup("report", "run", content, markup("report", "about", attribute)))
    assert page.tags == ["div", "h3", "p"]
    row = pd.DataFrame({content or "c": [Cell(attribute, content, True)], "d": [attribute], "e": [1]}, index=[content])
    assert set(Checked(table(row, attribute)).tags) == {"div", "table", "thead", "tr", "th", "tbody", "td", "b"} | ({"span"} if content else set())


@settings(max_examples=80, deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_and_inside(low, width):
    high = low + max(width, abs(low) * 1e-6)
    found = ticks(low, high)
    assert 1 <= len(found) <= 9 and len(tick_texts(found)) == len(found)
    assert all(low - 1e-3 * (high - low) <= t <= high + 1e-3 * (high - low) for t in found)


@pytest.mark.parametrize("value, text", [(0, "0"), (0.0, "0"), (-0.5, "-0.500"), (1e7, "1e+07"), (float("inf"), "–"), ("x", "x"), ("", "(empty)"), ([], "[]"), (False, "False")])
def test_numbers(value, text):
    assert number(value) == text


def test_the_best_is_marked_where_there_is_one():
    best = lambda values, **how: [c.best for c in with_best([Cell(str(v)) for v in values], values, **how)]
    assert best([1.0, 3.0, 2.0]) == [False, True, False] and best([1.0, 3.0], lower=True) == [True, False]
    assert best([2.0, 2.0]) == [False, False] and best([float("nan"), 1.0]) == [False, False] and best([3.0, 3.0, 1.0]) == [True, True, False]


def test_no_picture_leaves_where_none_is_asked_for(tmp_path):
    for i in range(84):
        Image.new("RGB", (24, 48)).save(tmp_path / f"{i:03d}.png")
    run = make_run(tmp_path / "run", root=tmp_path)
    assert tyro.cli(report_command, args=[str(run.path), "--no-pictures"]) == 0
    page, text = read(run.path / "report.html")
    assert "This page holds no image." in text and "img" not in page.tags and "--no-pictures" in text
    assert "img" in read(report(run))[0].tags


def test_matched_labels_are_not_compared_with_joint_ones(tmp_path):
    joint, matched = make_run(tmp_path / "joint", keep=False), make_run(tmp_path / "matched", keep=False)
    last = {k: v for k, v in [e for e in matched.events() if e["event"] == "labels"][-1].items() if k not in ("event", "epoch")}
    matched.log("labels", 3, **last | {"ari_all": 0.9, "n_clusters_all": 7})
    text = read(report([joint, matched]))[1]
    assert "90.0 (matched)" in text and "(joint)" in text and "their ARI is not compared" in text
    assert "not compared" not in read(report([joint, joint]))[1]


def test_what_went_wrong_stands_first(tmp_path):
    run = make_run(tmp_path / "run", keep=False)
    run.log("labels", 3, n_clusters_visible=2, noise_visible=0.9)
    run.log("labels", 4, n_clusters_visible=2, noise_visible=0.9)
    run.log("eval", 4, protocol="all", rank1=0.1, mAP=0.1)
    text = read(report(run))[1]
    first = text[text.index("What looks wrong", text.index("Configuration")) : text.index("In a nutshell", text.index("Configuration"))]
    for word in ("visible clusters fell from", "90% of the visible images are outliers", "Rank-1 (all) is 10.0%", "divide optim.lr by 3"):
        assert word in first, word


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_without_a_network(chromium, tmp_path, scheme):
    path = report(make_run(tmp_path / "run"))
    page = chromium.new_context(offline=True, color_scheme=scheme, viewport={"width": 1240, "height": 900}).new_page()
    said, asked = [], []
    page.on("console", lambda m: said.append(m.text))
    page.on("request", lambda r: asked.append(r.url))
    page.goto(path.as_uri())
    assert page.title() == "run" and not said and asked == [path.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == 1240
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    boxes = page.evaluate("[...document.querySelectorAll('figure > svg')].map(s => s.getBoundingClientRect()).map(b => Math.min(b.width, b.height))")
    assert len(boxes) > 10 and min(boxes) > 100
    page.context.close()


@pytest.mark.parametrize("width", [390, 760, 1240])
def test_no_table_is_crushed_or_cut_off_at_any_width(chromium, tmp_path, width):
    runs = [make_run(tmp_path / f"a-run-with-a-long-name-{i}", config={"eps": 0.1 * i}) for i in range(1, 5)]
    page = chromium.new_context(offline=True, viewport={"width": width, "height": 900}).new_page()
    page.goto(report(runs, tmp_path / "four.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    heads = page.evaluate("[...document.querySelectorAll('section > details > .scroll tbody th')].map(t => t.getBoundingClientRect()).map(b => [b.width, b.height])")
    assert len(heads) > 20 and min(w for w, _ in heads) >= 100 and max(h for _, h in heads) <= 70
    gap = page.evaluate("(t => [t.scrollWidth, t.parentElement.clientWidth, t.querySelectorAll('tbody tr').length])(document.querySelector('#modality-gap table'))")
    assert gap[2] == 4 and (gap[0] <= gap[1] or width == 760)  # all runs are rows; between phone and desk the box scrolls
    page.context.close()
