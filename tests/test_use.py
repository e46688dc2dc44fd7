"A trained run put to use: features that agree with extraction, rankings, pages with hostile file names, exported files read without the package."
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vireid_nb import use
from vireid_nb.backbone import BackboneConfig, build_backbone
from vireid_nb.baseline import baseline_preset
from vireid_nb.catalog import load_catalog
from vireid_nb.engine import EngineConfig
from vireid_nb.features import extract
from vireid_nb.records import Modality, VireidError
from vireid_nb.training import load_model, train
from vireid_nb.transforms import ImageStore

QUIET = EngineConfig(device="cpu", progress=False)
RECEIVER = """
import json, sys
import numpy as np
from PIL import Image
file, modality, *paths = sys.argv[1:]
about = json.load(open(file + ".json"))
read = lambda p: np.array(Image.open(p).convert("RGB").resize((about["width"], about["height"]), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
images, kinds = np.stack([read(p) for p in paths]), np.full(len(paths), about["modality"][modality])
if about["format"] == "onnx":
    import onnxruntime
    features = onnxruntime.InferenceSession(file).run(None, {"images": images, "modality": kinds})[0]
else:
    import torch
    features = torch.jit.load(file)(torch.from_numpy(images), torch.from_numpy(kinds)).detach().numpy()
assert "vireid_nb" not in sys.modules and features.shape == (len(paths), about["feature_dim"])
np.save(sys.stdout.buffer, features)
"""


@pytest.fixture(scope="module")
def run(sysu_root, tmp_path_factory):
    "A run of two short epochs."
    base = baseline_preset("synth")
    return train(
        replace(
            base, data=replace(base.data, root=str(sysu_root)), runs=str(tmp_path_factory.mktemp("use")), name="first", intra_epochs=1, joint_epochs=1,
            batch=replace(base.batch, n_ids=3, iterations=2), cluster=replace(base.cluster, k1=8, k2=3, joint_k1=10, joint_k2=4), engine=QUIET,
        )
    )


@pytest.fixture(scope="module")
def embedder(run):
    return use.load(run)


@pytest.fixture
def gallery(sysu_root, tmp_path):
    "Six visible pictures in a folder below a folder."
    folder = tmp_path / "gallery" / "gate 3"
    folder.mkdir(parents=True)
    for i, picture in enumerate(sorted((sysu_root / "cam1").rglob("*.jpg"))[:6]):
        shutil.copy(picture, folder / f"{i}.jpg")
    return folder.parent


def query_picture(root):
    return sorted((root / "cam3").rglob("*.jpg"))[0]


def test_embed_is_extract(run, embedder, sysu_root):
    model, config = load_model(run)
    table = load_catalog(sysu_root, "sysu").test
    bank = extract(model, ImageStore(sysu_root, table.path, size=config.data.size), table.modality, table.camid, progress=False)
    paths = [sysu_root / p for p in table.path]
    assert np.array_equal(embedder.embed(paths, table.modality.tolist()), bank.features)
    kinds = [Modality(m).title for m in table.modality]
    np.testing.assert_allclose(embedder.embed([Image.open(p) for p in paths], kinds), bank.features, atol=1e-6)
    np.testing.assert_allclose(embedder.embed(ImageStore("", paths, size=(96, 48))[:5], 0), bank.features[:5], atol=1e-6)


def test_load_takes_path_text_or_run(run, embedder, sysu_root):
    picture = query_picture(sysu_root)
    for way in (run.path, str(run.path)):
        assert np.array_equal(use.load(way, "cpu").embed(picture, "infrared"), embedder.embed([picture], "ir"))
    assert repr(embedder) == "Embedder(first: 96 x 48 pictures -> 128 numbers)"


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_nearest_is_a_plain_sort(n_queries, n_gallery, k, seed):
    rng = np.random.default_rng(seed)
    q, g = (np.round(rng.normal(size=(n, 2))).astype(np.float32) for n in (n_queries, n_gallery))  # small whole numbers: many ties
    order, cosines = use.nearest(q, g, k)
    for i in range(n_queries):
        expect = sorted(range(n_gallery), key=lambda j: (-float(q[i] @ g[j]), j))[:k]
        assert order[i].tolist() == expect
        assert cosines[i].tolist() == [float(q[i] @ g[j]) for j in expect]


def test_k_larger_than_the_gallery_says_so(embedder, sysu_root, gallery, caplog):
    table = embedder.rank(query_picture(sysu_root), use.pictures_in(gallery, "visible"), k=99)
    assert len(table) == 6 and "k is 99, but the gallery has 6 pictures" in caplog.text


def test_query_command(run, sysu_root, gallery, tmp_path, capsys):
    out = tmp_path / "deep" / "answers.html"
    assert use.query(run.path, (query_picture(sysu_root), sysu_root / "cam6"), gallery, k=3, out=out, engine=QUIET) == 0
    table, printed = pd.read_csv(out.with_suffix(".csv")), capsys.readouterr().out
    n = 1 + len(list((sysu_root / "cam6").rglob("*.jpg")))
    assert list(table.columns) == ["query", "rank", "picture", "cosine"] and table["query"].nunique() == n and len(table) == 3 * n
    assert printed.count("gate 3") == 3 * n and str(out) in printed
    assert out.read_text(encoding="utf-8").count("data:image/jpeg;base64,") == 4 * n


def test_a_data_set_as_gallery_gives_the_wanted_modality_only(run, sysu_root, tmp_path, capsys):
    use.query(run.path, (query_picture(sysu_root),), sysu_root, k=10**6, out=tmp_path / "a.html", engine=QUIET)
    table = load_catalog(sysu_root, "sysu")
    visible = {str(sysu_root / p) for t in (table.train, table.test) for p in t.path[t.modality == 0]}
    assert set(pd.read_csv(tmp_path / "a.csv").picture) == visible
    assert {p.split("/")[-3] for p in use.pictures_in(sysu_root, "infrared")} == {"cam3", "cam6"}


def test_a_folder_with_both_modalities(sysu_root, tmp_path):
    for word, camera in (("RGB", "cam1"), ("thermal", "cam3")):
        shutil.copytree(sysu_root / camera, tmp_path / word)
    assert all("/RGB/" in p for p in use.pictures_in(tmp_path, "visible")) and all("/thermal/" in p for p in use.pictures_in(tmp_path, "infrared"))
    shutil.rmtree(tmp_path / "thermal")
    (tmp_path / "thermal").mkdir()
    assert use.pictures_in(tmp_path, "visible")
    with pytest.raises(VireidError, match="holds no infrared pictures"):
        use.pictures_in(tmp_path, "infrared")


NAMES = ["<script>alert(1)</script>.jpg".replace("/", "_"), "a \"quoted\" & 'single'.jpg", "  spaces  .jpg", "Zoë 東京 ☂.jpg", "=1+1,;.jpg"]


def test_hostile_file_names(run, embedder, sysu_root, tmp_path):
    folder = tmp_path / "<b>pictures & more</b>".replace("/", "_")
    folder.mkdir()
    for name in NAMES:
        shutil.copy(query_picture(sysu_root), folder / name)
    use.query(run.path, (folder,), folder, gallery_modality="infrared", k=9, out=tmp_path / "odd.html", engine=QUIET)
    page, table = (tmp_path / "odd.html").read_text(encoding="utf-8"), pd.read_csv(tmp_path / "odd.csv")
    assert "<script" not in page and "<b>pictures" not in page and 'a "quoted"' not in page
    for part in ("&lt;script&gt;alert(1)&lt;_script&gt;.jpg", "a &quot;quoted&quot; &amp; &#x27;single&#x27;.jpg", "Zoë 東京 ☂.jpg"):
        assert part in page
    assert set(table.picture) == {str(folder / n) for n in NAMES} and len(table) == len(NAMES) ** 2


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems know only UTF-8 names")
def test_a_name_that_is_no_text(run, sysu_root, tmp_path):
    raw = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg")
    shutil.copy(query_picture(sysu_root), raw)
    use.query(run.path, (query_picture(sysu_root),), tmp_path, k=1, out=tmp_path / "raw.html", engine=QUIET)
    assert b"caf\xe9.jpg" in (tmp_path / "raw.csv").read_bytes() and "caf?.jpg" in (tmp_path / "raw.html").read_text(encoding="utf-8")


def test_bad_input(run, embedder, sysu_root, gallery, tmp_path):
    picture, empty = query_picture(sysu_root), tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "cut.jpg").write_bytes(picture.read_bytes()[:500])
    (tmp_path / "notes.txt").write_text("no picture")
    bare = tmp_path / "bare"
    shutil.copytree(run.path, bare)
    shutil.rmtree(bare / "checkpoints")
    wrong = {
        "is not a run folder": lambda: use.load(tmp_path / "none"),
        "no checkpoint in": lambda: use.load(bare),
        "holds no pictures": lambda: use.query(run.path, (picture,), empty, engine=QUIET),
        "there is nothing at": lambda: use.query(run.path, (picture,), tmp_path / "elsewhere", engine=QUIET),
        "cut.jpg": lambda: embedder.embed(tmp_path / "cut.jpg", "visible"),
        "notes.txt: not an image": lambda: embedder.embed(tmp_path / "notes.txt", "visible"),
        "no modality 'sonar'": lambda: embedder.embed(picture, "sonar"),
        "no modality 2": lambda: embedder.embed(picture, 2),
        "1 images, 2 modalities": lambda: embedder.embed(picture, [0, 1]),
        "there are no pictures": lambda: embedder.embed([], "visible"),
        "of 8 bits": lambda: embedder.embed(Image.new("I;16", (48, 96)), "infrared"),
        r"uint8 \[B, 3, 96, 48\] is needed": lambda: embedder.embed(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "visible"),
        "at least 1 is needed": lambda: use.query(run.path, (picture,), gallery, k=0, engine=QUIET),
        r"ends in \.html": lambda: use.query(run.path, (picture,), gallery, out=tmp_path / "a.csv", engine=QUIET),
    }
    for message, call in wrong.items():
        with pytest.raises(VireidError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.html")) and not list(tmp_path.glob("*.csv"))


def without_stack_notes(file):
    "Whether the file holds no path of the machine it was made on."
    parts = zipfile.ZipFile(file) if zipfile.is_zipfile(file) else None
    content = [parts.read(n) for n in parts.namelist()] if parts else [file.read_bytes()]
    marks = [os.path.dirname(torch.__file__).encode(), os.path.dirname(use.__file__).encode(), b"stack_trace"]
    return not any(m in c for m in marks for c in content)


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_an_exported_file_serves_without_the_package(run, embedder, sysu_root, gallery, tmp_path, format, capsys):
    out = tmp_path / ("net.onnx" if format == "onnx" else "net.pt")
    assert use.export(run.path, format, out, str(sysu_root)) == 0
    assert "largest difference" in capsys.readouterr().out and without_stack_notes(out)
    about = json.loads((tmp_path / f"{out.name}.json").read_text())
    assert (about["height"], about["width"], about["feature_dim"]) == (96, 48, 128) and set(about["largest_difference_from_original"]) == {"visible", "infrared"}
    for modality, paths in (("visible", use.pictures_in(gallery, 0)), ("infrared", [str(query_picture(sysu_root))])):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", RECEIVER, out, modality, *paths], capture_output=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr.decode()
        (tmp_path / "features.npy").write_bytes(done.stdout)
        np.testing.assert_allclose(np.load(tmp_path / "features.npy"), embedder.embed(paths, modality), atol=1e-5)
    network = use.FORMATS[format][2](out)
    images = use.as_store(use.pictures_in(gallery, 0), (96, 48))[np.arange(6)].numpy()
    kinds = np.array([0, 1, 1, 0, 2, -1])
    mixed = network(images, kinds)
    np.testing.assert_allclose(mixed[:4], embedder.embed(images[:4], kinds[:4].tolist()), atol=1e-5)
    assert np.isnan(mixed[4:]).all(), "an unknown modality must not pass for a known one"


@pytest.mark.parametrize("name, format", [("resnet18", "onnx"), ("resnet50", "torchscript")])
def test_the_large_networks_export(tmp_path, name, format):
    model = build_backbone(BackboneConfig(name=name, weights="none")).eval()
    for module in model.non_local.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)  # starts at 0: the block would do nothing
    portable, g = use.Portable(model), torch.Generator().manual_seed(0)
    images, kinds = torch.randint(0, 256, (3, 3, 64, 32), generator=g, dtype=torch.uint8), torch.tensor([1, 0, 1])
    suffix, write, read = use.FORMATS[format]
    write(portable, images[:2], kinds[:2], tmp_path / f"net{suffix}")
    with torch.no_grad():
        expect = portable(images, kinds).numpy()
    np.testing.assert_allclose(read(tmp_path / f"net{suffix}")(images.numpy(), kinds.numpy()), expect, atol=1e-5)
    np.testing.assert_allclose(expect, extract(model, images, kinds, [-1] * 3, progress=False).features, atol=1e-5)


def test_export_refuses(run, sysu_root, tmp_path, monkeypatch):
    out = tmp_path / "net.pt"
    for message, call in {
        "give --root": lambda: use.export_run(run, out, "torchscript", tmp_path),
        "there are onnx, torchscript": lambda: use.export_run(run, out, "tflite"),
        "whose files end in .onnx": lambda: use.export_run(run, out, "onnx"),
    }.items():
        with pytest.raises(VireidError, match=message):
            call()
    with monkeypatch.context() as m:
        m.setattr(use, "TOLERANCE", -1.0)
        with pytest.raises(VireidError, match="differs from the original"):
            use.export_run(run, out, "torchscript")
    with monkeypatch.context() as m:
        m.setattr(use, "find_spec", lambda name: None if name.startswith("onnx") else 1)
        with pytest.raises(VireidError, match="pip install onnx onnxscript onnxruntime"):
            use.export_run(run, tmp_path / "net.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_load_from_the_top_of_the_package():
    "`vireid_nb.load` is there, and `import vireid_nb` alone stays cheap."
    code = "import sys, vireid_nb as v; assert 'torch' not in sys.modules; assert v.load.__module__ == 'vireid_nb.use'; assert v.__version__; v.no_such_name"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "AttributeError: module 'vireid_nb' has no attribute 'no_such_name'" in done.stderr, done.stderr
