"The `vireid` command in real processes: exit codes, one-line errors, files left behind."
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vireid_nb.artifacts import Run
from vireid_nb.features import load_bank

SMALL = "--batch.n-ids 3 --batch.n-instances 2 --batch.iterations 2 --intra-epochs 1 --joint-epochs 1 --engine.device cpu --model.weights none".split()


def vireid(*args, cwd=None):
    "Run the command; returns (exit code, stdout, stderr)."
    code = "import sys; from vireid_nb.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"})
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def run(sysu_root, tmp_path_factory):
    "A trained run, made by the command."
    runs = tmp_path_factory.mktemp("cli")
    code, out, err = vireid("train", "baseline", "--preset", "synth", "--data.root", sysu_root, "--runs", runs, "--name", "first", *SMALL)
    assert code == 0, err
    assert "Rank-1" in out and "ARI all" in out and str(runs / "first") in out
    return runs / "first"


def test_help_names_every_command():
    code, out, err = vireid("--help")
    assert code == 0 and all(name in out for name in ("demo", "synth", "check", "train", "evaluate", "extract", "cluster", "bench", "ablate", "report", "query", "export"))
    code, out, err = vireid("train", "baseline", "--help")
    assert code == 0 and "--cluster.joint-eps" in out and "--resume" in out


def test_presets_follow_the_data_set():
    code, out, err = vireid("train", "baseline", "--data.name", "regdb", "--help")
    assert code == 0 and "(default: 38)" in out, "joint k1 of RegDB"
    code, out, err = vireid("train", "baseline", "--data.name", "market", "--help")
    assert code == 2 and "no preset 'market'" in err and "Traceback" not in err


def test_a_preset_of_one_method_does_not_trouble_the_others():
    code, out, err = vireid("train", "mmm", "--preset", "sysu-released", "--help")
    assert code == 0 and "(default: released)" in out and "regdb-released" in out, err
    code, out, err = vireid("train", "dmic", "--preset", "sysu-released", "--help")
    assert code == 2 and "no preset 'sysu-released'" in err and "Traceback" not in err


def test_evaluate_repeats_the_training_scores(run):
    code, out, err = vireid("evaluate", run, "--engine.device", "cpu")
    assert code == 0, err
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:]}
    last = Run(run).metrics("eval").groupby("protocol").last()
    for protocol in ("all", "indoor"):
        assert float(rows[protocol][3]) == pytest.approx(100 * last.loc[protocol, "mAP"], abs=0.01)


def test_extract_then_cluster(run, sysu_root, tmp_path):
    code, out, err = vireid("extract", run, sysu_root / "cam3", "-o", tmp_path / "ir.safetensors", "--modality", "infrared", "--engine.device", "cpu")
    assert code == 0, err
    bank, table = load_bank(tmp_path / "ir.safetensors"), pd.read_csv(tmp_path / "ir.csv")
    assert len(bank) == len(table) == sum(p.suffix == ".jpg" for p in (sysu_root / "cam3").rglob("*")) and (bank.modality == 1).all()
    np.testing.assert_allclose(np.linalg.norm(bank.features, axis=1), 1, atol=1e-5)
    code, out, err = vireid("cluster", tmp_path / "ir.safetensors")
    assert code == 2 and "both modalities are needed" in err, "a bank of one modality has nothing to match"

    both = tmp_path / "both"
    for modality, cam in (("visible", "cam1"), ("infrared", "cam3")):
        for i, picture in enumerate(sorted((sysu_root / cam).rglob("*.jpg"))):
            place = both / modality / cam / f"{i:03d}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(picture, place)
    code, out, err = vireid("extract", run, both, "-o", tmp_path / "both.safetensors", "--engine.device", "cpu")
    assert code == 0, err
    assert sorted(set(load_bank(tmp_path / "both.safetensors").camid)) == [0, 2]
    code, out, err = vireid("cluster", tmp_path / "both.safetensors", "-o", tmp_path / "labels.csv", "--k1", "6", "--joint-k1", "8", "--joint-k2", "4", "--min-samples", "2")
    assert code == 0, err
    labels = pd.read_csv(tmp_path / "labels.csv")
    assert list(labels.columns) == ["index", "modality", "camid", "intra", "joint"] and len(labels) == len(load_bank(tmp_path / "both.safetensors"))


@pytest.mark.parametrize("method", ["mmm", "dmic"])
def test_both_papers_on_regdb(method, tmp_path):
    code, out, err = vireid("synth", tmp_path / "data", "--layout", "regdb", "--n-train-ids", "4", "--n-test-ids", "3")
    assert code == 0, err
    where = ["--preset", "synth", "--data.root", tmp_path / "data", "--data.name", "regdb", "--data.trial", "2", "--runs", tmp_path, "--name", "r"]
    code, out, err = vireid("train", method, *where, *SMALL)
    assert code == 0, err
    judged = Run(tmp_path / "r").metrics("eval")
    assert set(judged.protocol) == {"visible-thermal", "thermal-visible"} and all(p in out for p in set(judged.protocol))
    assert Run(tmp_path / "r").config["data"]["trial"] == 2


def test_report_query_and_ablation(run, sysu_root, tmp_path):
    code, out, err = vireid("report", run, "-o", tmp_path / "report.html")
    assert code == 0 and (tmp_path / "report.html").stat().st_size > 10_000, err
    picture = next((sysu_root / "cam3").rglob("*.jpg"))
    code, out, err = vireid("query", run, picture, "--gallery", sysu_root / "cam1", "--out", tmp_path / "found.html", "--engine.device", "cpu")
    assert code == 0 and picture.name in out, err
    code, out, err = vireid("ablate", "mmm", "nothing")
    assert code == 2 and "no table 'nothing'" in err and "Traceback" not in err


@pytest.mark.parametrize("eps", ["0", "1", "-0.5"])
def test_eps_out_of_range(run, tmp_path, eps, sysu_root):
    code, out, err = vireid("train", "baseline", "--preset", "synth", "--data.root", sysu_root, "--runs", tmp_path, "--cluster.eps", eps, *SMALL)
    assert code == 2 and "eps" in err and "Traceback" not in err


def problem(case, tmp_path, sysu_root):
    "Arguments of a command that cannot work, and a word its message must hold."
    empty = tmp_path / "empty"
    empty.mkdir()
    text = tmp_path / "x.safetensors"
    text.write_text("not tensors")
    train = ["train", "baseline", "--preset", "synth", *SMALL, "--runs", tmp_path / "runs"]
    return {
        "no root": ([*train, "--data.root", tmp_path / "nowhere"], "nowhere"),
        "wrong layout": ([*train, "--data.root", empty], "empty"),
        "other layout": ([*train, "--data.root", sysu_root, "--data.name", "regdb"], "sysu"),
        "no run": (["evaluate", empty], "not a run folder"),
        "broken features": (["cluster", text], "x.safetensors"),
        "synth onto files": (["synth", sysu_root], "empty"),
        "no weights file": ([*train, "--data.root", sysu_root, "--model.weights", tmp_path / "w.safetensors"], "w.safetensors"),
        "no epochs": ([*train, "--data.root", sysu_root, "--intra-epochs", "0", "--joint-epochs", "0"], "nothing to train"),
        "unknown flag": (["train", "baseline", "--nonsense", "1"], "nonsense"),
    }[case]


@pytest.mark.parametrize("case", ["no root", "wrong layout", "other layout", "no run", "broken features", "synth onto files", "no weights file", "no epochs", "unknown flag"])
def test_a_mistake_is_one_line_and_exit_code_two(case, tmp_path, sysu_root):
    args, word = problem(case, tmp_path, sysu_root)
    code, out, err = vireid(*args)
    assert code == 2 and word in err and "Traceback" not in err, err
    if case != "unknown flag":  # the parser frames its own messages
        assert sum(line.startswith("vireid: ") for line in err.splitlines()) == 1, err
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir()), "a failed start must leave no half-made run"


def test_check_says_what_is_broken(sysu_root, tmp_path):
    root = tmp_path / "set"
    for p in (p for p in sysu_root.rglob("*") if p.is_file()):
        (root / p.relative_to(sysu_root)).parent.mkdir(parents=True, exist_ok=True)
        os.link(p, root / p.relative_to(sysu_root))
    assert vireid("check", root)[0] == 0
    code, out, err = vireid("check", tmp_path / "nowhere")
    assert code == 2 and "there is nothing at" in out and "Traceback" not in err
    victims = sorted((root / "cam1").rglob("*.jpg"))[:3]
    whole = victims[0].read_bytes()
    for victim, content in zip(victims, (whole[: len(whole) // 2], b"", b"a text that calls itself a picture")):
        victim.unlink()
        victim.write_bytes(content)
    code, out, err = vireid("check", root)
    assert code == 2 and all(v.relative_to(root).as_posix() in out for v in victims)


def test_bench_prints_a_table():
    code, out, err = vireid("bench", "jaccard", "--n", "1200", "--dim", "32")
    assert code == 0, err
    assert "modality-camera" in out and "memory GB" in out


def test_demo_refuses_a_folder_that_is_not_its_own(tmp_path):
    picture = tmp_path / "mine.png"
    Image.new("RGB", (2, 2)).save(picture)
    code, out, err = vireid("demo", "--out", tmp_path)
    assert code == 2 and "choose another --out" in err and picture.exists()
