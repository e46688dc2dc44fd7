"""Catalogue: the published SYSU-MM01 draws, every layout from real files, and every way a dataset can be wrong."""
import io
import json
import logging
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vireid_nb.catalog import census, check, guess_layout, load_catalog, read_image, trials
from vireid_nb.records import Modality, VireidError
from vireid_nb.synthetic import write_dataset

GOLDEN = Path(__file__).parent / "golden"


def picture(suffix=".jpg"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 12, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG" if suffix == ".jpg" else suffix[1:].upper())
    return buffer.getvalue()


JPEG, BMP = picture(), picture(".bmp")


def write(root, files):
    "`files`: path -> text or bytes; a picture where the content is None."
    for path, content in files.items():
        target = Path(root) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        content = (BMP if path.endswith(".bmp") else JPEG) if content is None else content
        target.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(root)


def sysu_files():
    files = {f"cam{c}/{i:04d}/{n:04d}.jpg": None for c in range(1, 7) for i in range(1, 5) for n in range(1, 4)}
    return files | {"exp/train_id.txt": "1", "exp/val_id.txt": "2", "exp/test_id.txt": "4,3"}


def regdb_files(trial=1):
    files = {f"{w}/{i}/{n}.bmp": None for w in ("Visible", "Thermal") for i in range(4) for n in range(2)}
    for split, ids in (("train", (0, 2)), ("test", (1, 3))):
        for w in ("Visible", "Thermal"):
            files[f"idx/{split}_{w.lower()}_{trial}.txt"] = "".join(f"{w}/{i}/{n}.bmp {k}\n" for k, i in enumerate(ids) for n in (1, 0))
    return files


def llcm_files(test_lists=True):
    files = {}
    for word in ("vis", "nir"):
        for split, ids in (("train", (1, 2)), ("test", (3, 4))):
            folder = lambda i, c: f"{word}/{i:04d}" if test_lists or split == "train" else f"test_{word}/cam{c}/{i:04d}"
            rows = [(f"{folder(i, c)}/{i:04d}_c{c:02d}_s0_f{n:04d}_{word}.jpg", i - 1 if split == "train" else i) for i in ids for c in (1, 4, 9) for n in range(2)]
            files |= {p: None for p, _ in rows}
            if test_lists or split == "train":
                files[f"idx/{split}_{word}.txt"] = "".join(f"{p} {label}\n" for p, label in rows)
    return files if test_lists else files | {"idx/test_id.txt": "4,3"}


CSV = "path,modality,camid,pid,split\nv/1.jpg,visible,0,1,train\ni/1.jpg,infrared,1,1,train\nv/2.jpg,0,0,2,test\ni/2.jpg,1,1,2,test\n"


def csv_files(text=CSV):
    return {f"{s}/{n}.jpg": None for s in "vi" for n in (1, 2)} | {"index.csv": text}


FOLDER = {"rgb/cam1/a.jpg": None, "rgb/cam2/x/b.jpg": None, "thermal/cam3/c.jpg": None}
FILES = {"sysu": sysu_files, "regdb": regdb_files, "llcm": llcm_files, "csv": csv_files, "folder": lambda: dict(FOLDER)}


# ---- the published draws


@pytest.fixture(scope="module")
def golden_catalog(tmp_path_factory):
    golden = json.loads((GOLDEN / "g_sysu_gallery.json").read_text())
    root = tmp_path_factory.mktemp("golden")
    files = {f"{folder}/{n:04d}.jpg": None for folder, numbers in golden["tree"].items() for n in numbers}
    files |= {"cam1/0600/0001.jpg": None, "cam3/0600/0001.jpg": None}
    files |= {"exp/train_id.txt": "600", "exp/val_id.txt": "600", "exp/test_id.txt": ",".join(map(str, golden["test_id_line"]))}
    return golden, load_catalog(write(root, files), "sysu")


@pytest.mark.parametrize("mode", ["all", "indoor"])
def test_gallery_draws_are_the_published_ones(golden_catalog, mode):
    golden, catalog = golden_catalog
    ten = trials(catalog, mode)
    assert len(ten) == 10
    for t, trial in enumerate(ten):
        columns = trial.columns(catalog.test)
        for side, rows, want in (("g", trial.gallery, golden["gallery"][f"{mode}_{t}"]), ("q", trial.query, golden["query"][mode])):
            assert catalog.test.path[rows].tolist() == want["img"]
            assert columns[f"{side}_camids"].tolist() == want["cam"]
            id_key = next(k for k in want if k not in ("img", "cam"))
            assert columns[f"{side}_pids"].tolist() == want[id_key]


def test_multi_shot_is_a_sample_of_every_folder(golden_catalog):
    golden, catalog = golden_catalog
    for t, trial in enumerate(trials(catalog, "all", shots=10, draws=3)):
        rng, want = random.Random(t), []
        for pid in sorted(golden["test_id_line"]):
            for cam in (1, 2, 4, 5):
                numbers = golden["tree"].get(f"cam{cam}/{pid:04d}", [])
                if numbers:
                    want += [f"cam{cam}/{pid:04d}/{n:04d}.jpg" for n in rng.sample(sorted(numbers), min(10, len(numbers)))]
        assert catalog.test.path[trial.gallery].tolist() == want


def test_draws_leave_the_global_generator_alone(golden_catalog):
    random.seed(5)
    want = random.Random(5).random()
    trials(golden_catalog[1])
    assert random.random() == want


# ---- layouts


@pytest.mark.parametrize("name", FILES)
def test_every_layout_loads_in_its_order(tmp_path, name):
    catalog = load_catalog(write(tmp_path, FILES[name]()), name)
    for table in (catalog.train, catalog.test):
        assert table.columns.tolist() == ["path", "modality", "camid", "pid"]
        assert table.index.tolist() == list(range(len(table)))
        keys = list(zip(table.modality, table.path))
        assert keys == sorted(keys)
        assert all((tmp_path / p).is_file() for p in table.path)
    assert guess_layout(tmp_path) == name
    assert check(tmp_path, name, progress=False).ok
    assert "infrared" in catalog._repr_html_()


def test_sysu_content(tmp_path):
    catalog = load_catalog(write(tmp_path, sysu_files()), "sysu")
    assert set(catalog.train.pid) == {1, 2} and set(catalog.test.pid) == {3, 4}
    assert set(catalog.train.camid[catalog.train.modality == Modality.INFRARED]) == {2, 5}
    assert {t.name for t in trials(catalog, "indoor")} == {"indoor"}
    assert set(trials(catalog, "indoor")[0].columns(catalog.test)["g_camids"]) == {1, 2}


def test_regdb_labels_follow_files_and_trials_differ(tmp_path):
    write(tmp_path, regdb_files(1))
    other = {p.replace("_1.txt", "_7.txt"): t for p, t in regdb_files().items() if p.endswith(".txt")}
    swapped = {p.replace("train", "@").replace("test", "train").replace("@", "test"): t for p, t in other.items()}
    write(tmp_path, swapped)
    one, seven = load_catalog(tmp_path, "regdb", 1), load_catalog(tmp_path, "regdb", 7)
    assert {p.split("/")[1]: pid for p, pid in zip(one.train.path, one.train.pid)} == {"0": 0, "2": 1}
    assert one.train.path.tolist() == seven.test.path.tolist()
    both = {t.name: t for t in trials(one)}
    assert set(both) == {"visible-thermal", "thermal-visible"}
    assert (one.test.modality[both["thermal-visible"].query] == Modality.INFRARED).all()
    assert sorted(np.concatenate([both["thermal-visible"].query, both["thermal-visible"].gallery])) == list(range(len(one.test)))


@pytest.mark.parametrize("test_lists", [True, False])
def test_llcm_from_lists_and_from_folders(tmp_path, test_lists):
    catalog = load_catalog(write(tmp_path, llcm_files(test_lists)), "llcm")
    assert set(catalog.train.camid) == {0, 3, 8} == set(catalog.test.camid)
    assert set(catalog.test.pid) == {3, 4}
    tasks = trials(catalog)
    assert [t.name for t in tasks] == ["visible-infrared"] * 10 + ["infrared-visible"] * 10
    rng = random.Random(3)
    want = [rng.choice(sorted(p for p in catalog.test.path if p.split("/")[-1].startswith(f"{i:04d}_c{c:02d}") and "nir" in p)) for i in (3, 4) for c in (1, 4, 9)]
    assert catalog.test.path[tasks[3].gallery].tolist() == want


def test_llcm_camera_from_folder_and_unknown(tmp_path):
    files = {f"{w}/{c}{i}.jpg": None for w in ("vis", "nir") for c in ("cam7/", "") for i in range(2)}
    files |= {f"idx/{s}_{w}.txt": f"{w}/cam7/{n}.jpg 0\n{w}/{n}.jpg 1\n" for n, s in enumerate(("train", "test")) for w in ("vis", "nir")}
    assert set(load_catalog(write(tmp_path, files), "llcm").train.camid) == {6, -1}


@pytest.mark.parametrize("first, want", [(0, [0, 1, 2]), (1, [0, 1, 2])])
def test_folder_cameras_count_from_zero(tmp_path, first, want):
    files = {"rgb/cam%d/a.jpg" % first: None, "rgb/x/cam%d/b.jpg" % (first + 1): None, "NIR/cam_%d/c.jpg" % (first + 2): None}
    catalog = load_catalog(write(tmp_path, files), "folder")
    assert sorted(catalog.train.camid) == want
    assert (catalog.train.pid == -1).all() and len(catalog.test) == 0 and trials(catalog) == []


def test_csv_file_or_folder(tmp_path, caplog):
    write(tmp_path, csv_files())
    shutil.copy(tmp_path / "index.csv", tmp_path / "mine.csv")
    one, two = load_catalog(tmp_path, "csv"), load_catalog(tmp_path / "mine.csv", "csv")
    assert one.train.equals(two.train) and one.test.equals(two.test)
    assert {t.name for t in trials(one)} == {"visible-infrared", "infrared-visible"}
    write(tmp_path, {"index.csv": "path,modality,split\nv/1.jpg,rgb,\ni/1.jpg,thermal,train\ni/2.jpg,1,extra\n"})
    catalog = load_catalog(tmp_path, "csv")
    write(tmp_path, {"index.csv": CSV.replace("1,2,test", "1,,test")})
    assert trials(load_catalog(tmp_path, "csv")) == [] and "1 of 2 test images have no identity" in caplog.text
    assert (catalog.train.camid == -1).all() and (catalog.train.pid == -1).all()
    assert "rows of split 'extra' left out: 1" in caplog.text and "no camera number" in caplog.text


@pytest.mark.parametrize("layout, unpaired", [("sysu", 0.0), ("regdb", 0.0), ("llcm", 0.0), ("sysu", 0.5)])
def test_synthetic_sets_are_read_by_the_real_loaders(tmp_path, layout, unpaired):
    root = write_dataset(tmp_path / layout, layout, n_train_ids=4, n_test_ids=2, visible_shots=2, infrared_shots=2, unpaired=unpaired)
    report = check(root, layout, progress=False)
    assert report.ok and report.decoded == len(list(root.rglob("*.jpg"))) + len(list(root.rglob("*.bmp")))
    catalog = load_catalog(root, layout)
    assert guess_layout(root) == layout and catalog.test.pid.nunique() == 2
    assert any("image of identity" in w for w in report.warnings) == (unpaired > 0)
    for trial in trials(catalog):
        columns = trial.columns(catalog.test)
        assert set(columns["q_pids"]) == set(columns["g_pids"]) and len(trial.query) and len(trial.gallery)


# ---- what can be wrong: one line each


def changed(files, paths):
    "`files` with some removed (None) or overwritten."
    files = dict(files)
    for path, content in paths.items():
        if content is None:
            files.pop(path)
        else:
            files[path] = content
    return files


no_infrared = lambda files: {p: c for p, c in files.items() if not p.startswith(("cam3", "cam6"))}

WRONG = {
    "wrong layout": ("sysu", regdb_files(), "is not laid out as SYSU-MM01: exp/train_id.txt"),
    "guess": ("sysu", regdb_files(), "it looks like RegDB: give the dataset name 'regdb'"),
    "one too high": ("sysu", {f"SYSU/{p}": c for p, c in sysu_files().items()}, "SYSU as root"),
    "one too low": ("regdb", {"a/b.jpg": None}, "is it one folder too high or too low?"),
    "no val list": ("sysu", changed(sysu_files(), paths={"exp/val_id.txt": None}), "exp/val_id.txt not found"),
    "empty list": ("sysu", changed(sysu_files(), paths={"exp/val_id.txt": "\n \n"}), "exp/val_id.txt is empty"),
    "bad id": ("sysu", changed(sysu_files(), paths={"exp/test_id.txt": "1,2\n3,four"}), "exp/test_id.txt line 2: 'four' is not an identity number"),
    "binary list": ("sysu", changed(sysu_files(), paths={"exp/test_id.txt": b"\xff\xfe\x00"}), "exp/test_id.txt line 1"),
    "no infrared": ("sysu", no_infrared(sysu_files()), "no infrared image for train"),
    "no test images": ("sysu", changed(sysu_files(), paths={"exp/val_id.txt": "2,3,4", "exp/test_id.txt": "9"}), None),
    "in both lists": ("sysu", changed(sysu_files(), paths={"exp/test_id.txt": "2,3"}), "identity 2 is listed for training and for testing"),
    "trial": ("regdb", {p: c for p, c in regdb_files(2).items()}, "idx/train_visible_1.txt"),
    "no label": ("regdb", changed(regdb_files(), paths={"idx/train_visible_1.txt": "Visible/0/1.bmp 0\nVisible/0/0.bmp"}), "idx/train_visible_1.txt line 2: 'Visible/0/0.bmp' should be"),
    "missing file": ("regdb", changed(regdb_files(), paths={"idx/test_thermal_1.txt": "Thermal/9/1.bmp 0"}), "idx/test_thermal_1.txt line 1: there is no image Thermal/9/1.bmp"),
    "dots": ("regdb", changed(regdb_files(), paths={"idx/test_thermal_1.txt": "Thermal/../../x.bmp 0"}), "line 1: 'Thermal/../../x.bmp' leads out of the dataset"),
    "absolute": ("regdb", changed(regdb_files(), paths={"idx/test_thermal_1.txt": "/etc/hosts 0"}), "'/etc/hosts' leads out of the dataset"),
    "drive": ("regdb", changed(regdb_files(), paths={"idx/test_thermal_1.txt": "C:\\x.bmp 0"}), "leads out of the dataset"),
    "twice": ("regdb", changed(regdb_files(), paths={"idx/train_visible_1.txt": "Visible/0/1.bmp 0\n./Visible/0/1.bmp 0"}), "listed more than once (first: Visible/0/1.bmp)"),
    "train and test": ("regdb", changed(regdb_files(), paths={"idx/test_visible_1.txt": "Visible/0/1.bmp 0"}), "listed more than once"),
    "llcm missing": ("llcm", changed(llcm_files(), paths={"idx/train_nir.txt": "nir/none.jpg 0"}), "there is no image nir/none.jpg"),
    "csv column": ("csv", csv_files("file,modality\nv/1.jpg,0\n"), "column path is missing (it has file, modality)"),
    "csv modality": ("csv", csv_files("path,modality\nv/1.jpg,0\ni/1.jpg,radar\n"), "index.csv line 3: modality is 'radar'"),
    "csv camid": ("csv", csv_files("path,modality,camid\nv/1.jpg,0,two\n"), "index.csv line 2: camid is 'two'"),
    "csv blank": ("csv", csv_files("path,modality\n,0\n"), "index.csv line 2: the path is blank"),
    "csv escape": ("csv", csv_files("path,modality\n../v/1.jpg,0\n"), "leads out of the dataset"),
    "csv twice": ("csv", csv_files("path,modality\nv/1.jpg,0\nv/1.jpg,0\ni/1.jpg,1\n"), "listed more than once"),
    "csv one modality": ("csv", csv_files("path,modality\nv/1.jpg,0\n"), "no infrared image for train"),
    "csv broken": ("csv", csv_files("path,modality\nv/1.jpg,0,1,2,3\nv,1,1\n"), "index.csv line 2: it should have 2 fields"),
    "csv short": ("csv", csv_files("path,modality\nv/1.jpg\n"), "index.csv line 2: it should have 2 fields"),
    "csv binary": ("csv", csv_files(b"\xff\xd8\xff"), "as CSV"),
    "csv empty": ("csv", csv_files(""), "column path and modality is missing (it has none)"),
    "folder empty": ("folder", {"rgb/a.jpg": None, "ir/readme.txt": "x"}, "no infrared image for train"),
    "folder": ("folder", {"rgb/a.jpg": None}, "infrared or ir or nir or thermal not found"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_datasets_are_one_clear_line(tmp_path, case):
    name, files, message = WRONG[case]
    write(tmp_path, files)
    if message is None:  # a set without test images can still train
        assert len(load_catalog(tmp_path, name).test) == 0
        return
    with pytest.raises(VireidError) as e:
        load_catalog(tmp_path, name)
    assert message in str(e.value)
    assert "\n" not in str(e.value)
    report = check(tmp_path, name, progress=False)
    assert not report.ok and report.problems == [str(e.value)]


def test_roots_that_cannot_be(tmp_path):
    with pytest.raises(VireidError, match="there is nothing at .*nowhere"):
        load_catalog(tmp_path / "nowhere", "sysu")
    (tmp_path / "file").write_text("x")
    with pytest.raises(VireidError, match="file is a file; give the folder"):
        load_catalog(tmp_path / "file", "regdb")
    with pytest.raises(VireidError, match="there is no dataset 'x'"):
        load_catalog(tmp_path, "x")
    assert not check(tmp_path, "x").ok


def test_unreadable_folder(tmp_path, monkeypatch):
    write(tmp_path, sysu_files())
    scandir = os.scandir

    def refuse(path="."):
        if str(path).endswith("0002"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(VireidError, match="cannot read the folder .*cam1/0002: Permission denied; mend its permissions"):
        load_catalog(tmp_path, "sysu")


@pytest.mark.parametrize("kind", ["file", "folder", "chain"])
@pytest.mark.parametrize("name", ["sysu", "regdb"])
def test_links_out_of_the_root(tmp_path, kind, name):
    root = write(tmp_path / "set", FILES[name]())
    outside = write(tmp_path / "outside", {"1.jpg": None, "2.bmp": None})
    folder = root / ("cam1/0001" if name == "sysu" else "Visible/0")
    if kind == "file":
        victim = next(folder.iterdir())
        victim.unlink()
        victim.symlink_to(outside / "1.jpg")
    else:
        shutil.rmtree(folder)
        goal = outside
        if kind == "chain":
            goal = tmp_path / "between"
            goal.symlink_to(outside)
        folder.symlink_to(goal)
    with pytest.raises(VireidError, match="is a symbolic link to .*outside the dataset"):
        load_catalog(root, name)


def test_links_inside_the_root_and_a_linked_root_are_fine(tmp_path):
    root = write(tmp_path / "set", sysu_files())
    os.rename(root / "cam1", root / "kept")
    (root / "cam1").symlink_to("kept")
    (tmp_path / "link").symlink_to(root)
    assert len(load_catalog(tmp_path / "link", "sysu").train) == 36


def test_links_that_nothing_uses_are_let_be(tmp_path):
    root = write(tmp_path / "set", sysu_files())
    (root / "results").symlink_to(tmp_path)
    (root / "cam1" / "0001" / "notes.txt").symlink_to("/etc/hostname")
    assert check(root, "sysu", progress=False).ok


def test_a_listed_folder_is_no_picture(tmp_path):
    write(tmp_path, changed(regdb_files(), {"idx/train_visible_1.txt": "Visible/0 0\n"}))
    with pytest.raises(VireidError, match="line 1: there is no image Visible/0 in"):
        load_catalog(tmp_path, "regdb")


def test_reports_escape_what_file_names_say(tmp_path):
    write(tmp_path, {"rgb/<b>x.jpg": b"", "ir/a.jpg": None})
    assert "&lt;b&gt;x.jpg" in check(tmp_path, "folder", progress=False)._repr_html_()


# ---- what is odd: warnings


def test_oddities_are_logged_and_listed(tmp_path, caplog):
    files = sysu_files() | {"exp/train_id.txt": "1,77", "cam1/0003/Thumbs.db": "x", "cam1/0003/._0001.jpg": "x"}
    gone = ("cam3/0002", "cam6/0002", "cam1/0001", "cam2/0001", "cam4/0001", "cam5/0001")
    files = {p: c for p, c in files.items() if not p.startswith(gone)}
    with caplog.at_level(logging.WARNING, "vireid_nb"):
        load_catalog(write(tmp_path, files), "sysu")
    report = check(tmp_path, "sysu", progress=False)
    text = "\n".join(report.warnings)
    for want in ("no image at all of identity 77", "no infrared image of identity 2", "no visible image of identity 1", "not images: 2"):
        assert want in caplog.text and want in text


def test_census_counts(tmp_path):
    report = check(write(tmp_path, regdb_files()), "regdb", progress=False)
    assert report.ok and report.decoded == 16
    assert report.census.loc[("train", "visible images")].tolist() == [4, 2060, -2056]
    assert any("counts differ" in w for w in report.warnings)
    assert "2060" in str(report) and "2060" in report._repr_html_()
    own = census(load_catalog(write(tmp_path / "own", FOLDER), "folder"))
    assert own.published.isna().all() and own.difference.isna().all()


# ---- broken pictures


BROKEN = {"truncated": (JPEG[: len(JPEG) - 60], ""), "empty": (b"", "an empty file"), "text": (b"no picture", "not an image"), "header only": (JPEG[:20], "")}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_pictures_are_problems(tmp_path, kind):
    content, reason = BROKEN[kind]
    write(tmp_path, sysu_files() | {"cam4/0003/0002.jpg": content})
    load_catalog(tmp_path, "sysu")  # listing does not open pictures
    assert check(tmp_path, "sysu", decode=False).ok
    report = check(tmp_path, "sysu", progress=False)
    assert len(report.problems) == 1 and "cam4/0003/0002.jpg: " in report.problems[0] and reason in report.problems[0]
    with pytest.raises(VireidError, match="vireid check"):
        read_image(tmp_path, "cam4/0003/0002.jpg")


def test_gray_palette_and_alpha_pictures_become_rgb_and_deep_ones_are_refused(tmp_path):
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        Image.new(mode, (6, 12)).save(tmp_path / f"{mode}.tiff")
        assert read_image(tmp_path, f"{mode}.tiff").mode == "RGB"
    Image.fromarray(np.full((12, 6), 4000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(VireidError, match="8 bits are needed"):
        read_image(tmp_path, "deep.png")
