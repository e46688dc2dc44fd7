"Tables of trainings: what is swept, what is refused, what survives a kill, and what ends up in the files."
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tyro

from vireid_nb.ablation import (
    ablate_command,
    ablation_table,
    config_values,
    cross,
    finished,
    grid_cells,
    make_jobs,
    override,
    parse_value,
    run_ablation,
    run_scores,
    to_markdown,
    world_values,
)
from vireid_nb.artifacts import Run
from vireid_nb.backbone import BackboneConfig
from vireid_nb.baseline import baseline_preset
from vireid_nb.engine import EngineConfig
from vireid_nb.records import VireidError
from vireid_nb.synthetic import SynthConfig
from vireid_nb.training import BatchConfig, TrainConfig, train

WORLD = {"n_train_ids": 8, "n_test_ids": 4, "visible_shots": 2, "infrared_shots": 4, "seed": 0}
PARTS = {"per modality": {"joint": False}, "joint (CMC)": {"joint": True}}


def tiny(**more):
    base = baseline_preset("synth")
    return replace(
        base,
        model=BackboneConfig(name="tiny", weights="none"),
        cluster=replace(base.cluster, k1=8, k2=2, eps=0.6, joint_k1=12, joint_k2=4, joint_eps=0.7, min_samples=2),
        batch=BatchConfig(n_ids=3, n_instances=2, iterations=2),
        engine=EngineConfig(device="cpu", progress=False),
        **{"intra_epochs": 1, "joint_epochs": 1, **more},
    )


def numbers(runs):
    return runs.drop(columns="seconds")


# ---- values, cells, jobs


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("cluster.eps", "0.25", 0.25), ("cluster.k1", "12", 12), ("joint", "False", False), ("data.size", "128x64", (128, 64)), ("augment.erase_area", "0.1x0.2", (0.1, 0.2)),
        ("model.non_local", "true", True), ("model.non_local", "none", None), ("model.name", "resnet18", "resnet18"), ("optim.lr", 0.1, 0.1), ("model.weights", "none", "none"),
    ],
)  # fmt: skip
def test_values_take_the_fields_type(name, text, value):
    got = config_values(override(tiny(), {name: text}))[name][0]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "name, text, word",
    [
        ("cluster.k1", "2.5", "a whole number"), ("cluster.eps", "half", "a number"), ("joint", "1", "true or false"), ("data.size", "96", "2 numbers joined by x"), ("data.size", "axb", "joined by x"),
        ("optim.optimizer", "lion", "choose adam, sgd"), ("cluster.eps", "1.5", "0 < eps < 1"), ("eps", "0.5", "cluster.eps"), ("cluster.epss", "0.5", "cluster.eps"),
        ("cluster", "1", "there is no value 'cluster'"), ("method", "mmm", "there is no value 'method'"), ("qqqq", "1", "vireid train --help"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(name, text, word):
    with pytest.raises(VireidError) as e:
        override(tiny(), {name: text})
    assert word in str(e.value) and "\n" not in str(e.value)


def test_every_value_of_the_package_can_be_parsed_from_its_own_text():
    for values in (config_values(TrainConfig()), config_values(tiny()), world_values()):
        for name, (value, hint) in values.items():
            text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert parse_value(name, text, value, hint) == value, name


def test_a_sweep_is_the_product_and_names_what_varies():
    values = config_values(tiny()) | world_values()
    cells = grid_cells(["cluster.eps=0.4,0.6", "joint=true,false", "seed=3"], values)
    assert list(cells) == ["cluster.eps=0.4, joint=true", "cluster.eps=0.4, joint=false", "cluster.eps=0.6, joint=true", "cluster.eps=0.6, joint=false"]
    assert all(c["seed"] == 3 for c in cells.values())
    assert grid_cells([], values) == {"": {}}
    with pytest.raises(VireidError, match="swept twice"):
        grid_cells(["seed=1", "seed=2"], values)
    for bad in ("seed", "seed=", "seed=1,,2", "=1"):
        with pytest.raises(VireidError):
            grid_cells([bad], values)
    with pytest.raises(VireidError, match="a value twice"):
        grid_cells(["cluster.eps=0.5,0.50"], values)
    with pytest.raises(VireidError, match="set by 'a' already"):
        cross({"a": {"seed": 1}}, cells)


def test_jobs_are_refused_before_anything_is_written(tmp_path):
    bad = [
        ({"a": {"seed": 1}}, (1,), "--seeds"),
        ({"a": {"data.root": "x"}}, (1,), "--data"),
        ({}, (1,), "at least one"),
        ({"a": {}}, (), "at least one"),
        ({"a b": {}, "a_b": {}}, (1,), "no two alike"),
        ({"a": {"synth.unpaired": 3}}, (1,), "from 0 to 1"),
        ({"a": {"synth.gap": 3}}, (1,), "synth.camera_gap"),
    ]
    for cells, seeds, word in bad:
        with pytest.raises(VireidError, match=word):
            make_jobs(tiny(), cells, seeds, tmp_path, WORLD)
    with pytest.raises(VireidError, match="leave one of them out"):
        make_jobs(override(tiny(), {"data.root": "there"}), {"a": {"synth.unpaired": 0.5}}, (1,), tmp_path, WORLD)
    assert not list(tmp_path.iterdir())


def test_worlds_differ_exactly_where_knobs_do(tmp_path):
    cells = cross(PARTS, grid_cells(["synth.unpaired=0,0.25"], world_values()))
    jobs = make_jobs(tiny(), cells, (1, 2), tmp_path, WORLD)
    roots = [job.config.data.root for job in jobs]
    assert len(jobs) == 8 and len(set(roots)) == 2 and len({job.path for job in jobs}) == 8
    assert {job.world["unpaired"] for job in jobs} == {0.0, 0.25} and jobs[0].world["n_train_ids"] == 8
    other = make_jobs(tiny(), cells, (1,), tmp_path, WORLD | {"noise": 0.5})
    assert not {job.config.data.root for job in other} & set(roots), "another standard world must not be taken for this one"
    assert set(WORLD) <= {k[6:] for k in world_values()} and SynthConfig().unpaired == 0


# ---- running


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "A table of two cells under two seeds."
    out = tmp_path_factory.mktemp("table")
    return out, run_ablation(tiny(), PARTS, seeds=(1, 2), out=out, world=WORLD, title="Stages")


def test_files_say_what_the_runs_say(table):
    out, runs = table
    saved = pd.read_csv(out / "ablation.csv")
    assert len(saved) == 4 and np.allclose(saved["all mAP"], runs["all mAP"]) and set(saved["joint"]) == {True, False}
    text = (out / "ablation.md").read_text()
    mean, spread = runs[runs.cell == "joint (CMC)"]["all mAP"].agg(["mean", "std"])
    assert text.startswith("# Stages\n") and f"{mean:.1f} ± {spread:.1f}" in text and "* joint (CMC): `joint = True`" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and len({row.count("|") for row in rows}) == 1
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_scores_are_those_of_the_run(table):
    out, runs = table
    run = Run(out / "per_modality-seed2")
    scores, judged = run_scores(run, ("all", "indoor")), run.metrics("eval").groupby("protocol").last()
    assert scores["indoor Rank-1"] == pytest.approx(100 * judged.loc["indoor", "rank1"])
    last = run.metrics("labels").iloc[-1]
    assert last.epoch == 2 and scores["ARI all"] == pytest.approx(100 * last.ari_all) and scores["clusters ir"] == last.n_clusters_infrared
    assert runs.iloc[1]["ARI all"] == scores["ARI all"]


def test_nothing_is_trained_twice(table, capsys):
    out, runs = table
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/metrics.jsonl")}
    again = run_ablation(tiny(), PARTS, seeds=(1, 2), out=out, world=WORLD, title="Stages")
    assert numbers(again).equals(numbers(runs)) and capsys.readouterr().out.count("(there,") == 4
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*/metrics.jsonl")}


def test_a_half_finished_run_is_resumed_to_the_same_numbers(table, tmp_path, capsys):
    _, runs = table
    (job,) = make_jobs(tiny(), {"joint (CMC)": {"joint": True}}, (1,), tmp_path, WORLD)
    run_ablation(tiny(joint_epochs=0), {"drawn": {}}, out=tmp_path, world=WORLD)  # draws the same world

    def stop(run, entry):
        if entry["event"] == "labels" and entry["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(job.config, callbacks=[stop])
    assert not finished(Run(job.path), job.config)
    capsys.readouterr()
    resumed = run_ablation(tiny(), {"joint (CMC)": {"joint": True}}, out=tmp_path, world=WORLD)
    assert "(resumed," in capsys.readouterr().out and finished(Run(job.path), job.config)
    assert numbers(resumed).iloc[0].tolist() == numbers(runs)[(runs.cell == "joint (CMC)") & (runs.seed == 1)].iloc[0].tolist()


SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
from test_ablation import *
run_ablation(tiny(joint_epochs=2), PARTS, seeds=(1,), out={out!r}, world=WORLD)
"""


def test_sigkill_then_the_same_words_again(tmp_path):
    code = SCRIPT.format(tests=str(Path(__file__).parent), out=str(tmp_path / "killed"))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    record, deadline = tmp_path / "killed" / "joint_CMC-seed1" / "metrics.jsonl", time.time() + 300
    while time.time() < deadline and process.poll() is None:
        if record.exists() and '"event": "labels", "epoch": 1' in record.read_text():
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, f"the table was done before it could be killed: {process.stderr.read()}"
    first = (tmp_path / "killed" / "ablation.md").read_text()
    assert "| per modality |" in first and "| joint (CMC) |" not in first, "the finished row is readable, the other not there yet"
    again = run_ablation(tiny(joint_epochs=2), PARTS, seeds=(1,), out=tmp_path / "killed", world=WORLD)
    straight = run_ablation(tiny(joint_epochs=2), PARTS, seeds=(1,), out=tmp_path / "straight", world=WORLD)
    assert numbers(again).equals(numbers(straight))


def test_other_values_under_the_same_name_are_a_failed_row(table, capsys):
    out, _ = table
    runs = run_ablation(tiny(joint_epochs=2), {"joint (CMC)": {"joint": True}}, seeds=(1,), out=out, world=WORLD)
    assert "joint_epochs 1 -> 2" in runs.error[0] and "choose another --out" in runs.error[0] and "\n" not in runs.error[0]
    assert "failed: joint (CMC), seed 1" in (out / "ablation.md").read_text() and "–" not in ablation_table(table[1]).to_string()


def test_a_data_set_of_ones_own(sysu_root, tmp_path):
    runs = run_ablation(override(tiny(joint_epochs=0), {"data.root": str(sysu_root)}), {"": {}}, out=tmp_path)
    assert not (tmp_path / "data").exists() and runs["all mAP"].notna().all() and "(as it is)" in (tmp_path / "ablation.md").read_text()


# ---- the command


def command(*args):
    methods = {"baseline": (lambda preset: tiny(), {"stages": PARTS}), "bare": (lambda preset: tiny(), {})}
    return tyro.cli(ablate_command(methods, WORLD), args=[str(a) for a in args])


def test_the_command(table, tmp_path, capsys):
    assert command("baseline", "stages", "--grid", "joint_epochs=0", "synth.camera_gap=0,1", "--seeds", 1, "--protocols", "all", "indoor", "--out", tmp_path / "stress") == 0
    text = (tmp_path / "stress" / "ablation.md").read_text()
    assert "# baseline: stages, preset synth, seeds 1" in text and "| joint (CMC), synth.camera_gap=1.0 |" in text and "indoor Rank-1" in text
    assert len(list((tmp_path / "stress" / "data").iterdir())) == 2
    out = capsys.readouterr().out
    assert out.count("(trained,") == 4 and "ablation.md" in out
    assert command("bare", "--grid", "model.weights=none,missing.pth", "joint_epochs=0", "--seeds", 1, "--out", tmp_path / "failing") == 2


@pytest.mark.parametrize(
    "args, word",
    [
        (("nothing",), "choose baseline, bare"), (("baseline",), "name a table"), (("bare",), "bare has none"), (("baseline", "parts"), "it has stages"), (("bare", "parts"), "use --grid"),
        (("baseline", "stages", "--preset", "sysu"), "needs --data"), (("baseline", "--grid", "clusters.eps=1,2"), "cluster.eps"),
    ],
)  # fmt: skip
def test_the_command_refuses_in_one_line(args, word):
    with pytest.raises(VireidError) as e:
        command(*args)
    assert word in str(e.value) and "\n" not in str(e.value)


def test_its_help_tells_tables_and_units(capsys):
    with pytest.raises(SystemExit):
        command("--help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "baseline: stages" in text and "name=value,value" in text and "--seeds" in text


def test_markdown_of_awkward_text():
    assert to_markdown(pd.DataFrame({"a|b": ["c\nd"]}, index=["x"])) == "|  | a\\|b |\n| --- | --- |\n| x | c d |"
