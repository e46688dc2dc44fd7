"Training as its users meet it: real picture files, real processes, real kills."
import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from same_run import numbers, same, weights

from vireid_nb.artifacts import Run
from vireid_nb.backbone import BackboneConfig, build_backbone
from vireid_nb.baseline import baseline_preset
from vireid_nb.catalog import load_catalog
from vireid_nb.features import extract
from vireid_nb.records import VireidError, seeded_torch
from vireid_nb.synthetic import write_dataset
from vireid_nb.training import BatchConfig, DataConfig, EngineConfig, load_model, open_session, train
from vireid_nb.transforms import ImageStore


def small(root, runs, name="run", data="sysu", **more):
    "A baseline of three short epochs on the tiny network, from random weights."
    base = baseline_preset("synth")
    return replace(
        base,
        data=DataConfig(root=str(root), name=data, size=(96, 48)),
        model=BackboneConfig(name="tiny", weights="none"),
        cluster=replace(base.cluster, k1=8, k2=2, eps=0.6, joint_k1=12, joint_k2=4, joint_eps=0.7, min_samples=2),
        batch=BatchConfig(n_ids=3, n_instances=2, iterations=4),
        engine=EngineConfig(device="cpu", progress=False),
        runs=str(runs),
        name=name,
        **{"intra_epochs": 1, "joint_epochs": 2, **more},
    )


@pytest.fixture(scope="module")
def straight(sysu_root, tmp_path_factory):
    "One uninterrupted run that several tests compare with."
    told = []
    run = train(small(sysu_root, tmp_path_factory.mktemp("runs"), keep_features=True), callbacks=[lambda run, entry: told.append(entry)])
    return run, told


def test_a_run_leaves_its_whole_record(straight):
    run, told = straight
    assert run.epochs == [0, 1, 2, 3]  # the last one is of the final features
    assert [run.epoch_info(e)["phase"] for e in run.epochs] == ["intra", "joint", "joint", "end"]
    assert len(run.features(3)) == len(run.samples()) == len(run.labels(3).joint)
    assert set(run.metrics("eval")["protocol"]) == {"all", "indoor"}
    assert run.info["versions"]["torch"] and run.config["seed"] == 1
    steps = [e for e in told if e["event"] == "step"]
    assert len(steps) == run.metrics("train")["steps"].iloc[-1] > 0
    assert sum(e["event"] == "train" for e in told) == 3
    assert {"joint_visible", "joint_infrared"} <= {k for e in told if e["event"] == "train" for k in e["loss"]}, "the joint stage took no joint step"


def test_same_seed_same_run(straight, sysu_root, tmp_path):
    again = train(small(sysu_root, tmp_path, keep_features=True))
    assert same(weights(straight[0]), weights(again)) and numbers(straight[0]) == numbers(again)


def command(config, *more):
    "The command line that trains `config`."
    flags = {
        "--data.root": config.data.root, "--data.name": config.data.name, "--model.weights": "none", "--runs": config.runs, "--name": config.name,
        "--cluster.k1": 8, "--cluster.k2": 2, "--cluster.eps": 0.6, "--cluster.joint-k1": 12, "--cluster.joint-k2": 4, "--cluster.joint-eps": 0.7,
        "--cluster.min-samples": 2, "--batch.n-ids": 3, "--batch.n-instances": 2, "--batch.iterations": 4, "--engine.device": "cpu",
        "--intra-epochs": config.intra_epochs, "--joint-epochs": config.joint_epochs,
    }
    out = [sys.executable, "-c", "import sys; from vireid_nb.cli import main; sys.exit(main())", "train", "baseline", "--preset", "synth", "--keep-features", "--engine.no-progress"]
    return [*out, *(str(x) for pair in flags.items() for x in pair), *more]


@pytest.mark.parametrize("moment", ["begun", "half"])
def test_sigkill_in_stage_two_then_resume_is_bit_equal(straight, sysu_root, tmp_path, moment):
    config = small(sysu_root, tmp_path)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(config), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    record, wanted = tmp_path / "run" / "metrics.jsonl", 1 if moment == "begun" else 2
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None:
        if record.exists() and f'"event": "labels", "epoch": {wanted}' in record.read_text():
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, f"the run ended before it could be killed: {process.stderr.read()}"
    held = json.loads((tmp_path / "run/checkpoints/last/state.json").read_text())["state"]["epoch"]
    assert held <= wanted and Run(tmp_path / "run").epochs, "the killed run's folder must stay readable"
    done = subprocess.run(command(config, "--resume"), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resumed = Run(tmp_path / "run")
    assert same(weights(straight[0]), weights(resumed)) and numbers(straight[0]) == numbers(resumed)


def test_true_ids_cannot_leak(sysu_root, tmp_path):
    "All train ids replaced by noise: other scores, the same weights bit for bit."
    runs = {}
    for name, pids in {"true": lambda t: t.pid, "noise": lambda t: np.random.default_rng(0).integers(0, 50, len(t))}.items():
        root = tmp_path / name
        root.mkdir()
        table = load_catalog(sysu_root, "sysu").train
        for p in table.path:
            (root / p).parent.mkdir(parents=True, exist_ok=True)
            os.link(sysu_root / p, root / p)
        pd.DataFrame({"path": table.path, "modality": table.modality, "camid": table.camid, "pid": pids(table)}).to_csv(root / "index.csv", index=False)
        runs[name] = train(small(root, tmp_path / "runs", name, data="csv"))
    assert same(weights(runs["true"]), weights(runs["noise"]))
    ari = [r.metrics("labels")["ari_visible"].tolist() for r in runs.values()]
    assert ari[0] != ari[1], "the scores must see the ids, or this test compares nothing"


def test_views_cut_in_two_is_what_two_replicas_compute(sysu_root, tmp_path):
    "Plain views and half of infrared through one copy, channel-augmented views and the other half through another; the first one's running statistics stay, gradients add up."
    config = small(sysu_root, tmp_path)
    config = replace(config, batch=BatchConfig(n_ids=4, n_instances=3, iterations=1, groups=2, cut="views"))
    session = open_session(config, (), resume=False)
    learner, model = session.learner, session.learner.model.train()
    table = session.catalog.train
    rows = [np.flatnonzero(table.modality == m)[:12] for m in (0, 1)]
    batch = next(learner.batches([tuple(rows)], 0, "test"))
    replicas = [copy.deepcopy(model) for _ in range(2)]
    emb = learner.embed(batch)
    halves = [(batch.plain, batch.ir[:6]), (batch.ca, batch.ir[6:])]
    there = [net(torch.cat(views), torch.tensor([0] * 12 + [1] * 6)) for net, views in zip(replicas, halves)]
    torch.testing.assert_close(emb.visible, torch.cat([t[:12] for t in there]))
    torch.testing.assert_close(emb.infrared, torch.cat([t[12:] for t in there]))
    weight = torch.randn(36, emb.visible.shape[1], generator=seeded_torch(0, "weight"))
    (torch.cat(emb) * weight).sum().backward()
    (torch.cat([*(t[:12] for t in there), *(t[12:] for t in there)]) * weight).sum().backward()
    for (name, p), a, b in zip(model.named_parameters(), *(net.parameters() for net in replicas)):
        if p.grad is not None:
            assert (p.grad - a.grad - b.grad).abs().max() <= 1e-4 * p.grad.abs().max().clamp(min=1), name
    first, second = (dict(net.named_buffers()) for net in replicas)
    for name, b in model.named_buffers():
        torch.testing.assert_close(b, first[name])
    assert not torch.allclose(first["neck.running_mean"], second["neck.running_mean"])
    alone = open_session(replace(config, name="alone", batch=replace(config.batch, groups=1)), (), resume=False)
    same_views = next(alone.learner.batches([tuple(rows)], 0, "test"))
    assert all(torch.equal(a, b) for a, b in zip(batch[2:], same_views[2:])), "the cut must not change the pictures"


def test_a_run_with_cut_views_resumes_to_the_same_bits(sysu_root, tmp_path):
    def cut(_, entry):
        if (entry["event"], entry["epoch"]) == ("labels", 1):
            raise KeyboardInterrupt

    config = replace(small(sysu_root, tmp_path / "whole"), batch=BatchConfig(n_ids=3, n_instances=2, iterations=3, groups=2, cut="views"))
    whole, again = train(config), replace(config, runs=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        train(again, callbacks=[cut])
    resumed = train(again, resume=True)
    assert same(weights(whole), weights(resumed)) and numbers(whole) == numbers(resumed)


def test_resume_refuses_other_values(straight, sysu_root):
    run = straight[0]
    config = small(sysu_root, run.path.parent, keep_features=True, seed=2)
    with pytest.raises(VireidError, match="was begun with other values .*seed 1 -> 2"):
        train(config, resume=True)
    with pytest.raises(VireidError, match="--resume"):
        train(small(sysu_root, run.path.parent))
    with pytest.raises(VireidError, match="nothing to resume"):
        train(small(sysu_root, run.path.parent, name="never"), resume=True)


def test_a_run_from_before_batches_could_be_drawn_apart_goes_on_as_it_was(sysu_root, tmp_path):
    config = small(sysu_root, tmp_path, intra_epochs=0, joint_epochs=1)
    config = replace(config, batch=replace(config.batch, joint="paired"))
    record = train(config).path / "config.json"
    held = json.loads(record.read_text())
    (held.get("config") or held)["batch"].pop("joint")
    record.write_text(json.dumps(held))
    with pytest.raises(VireidError, match="batch.joint paired -> apart"):
        train(replace(config, batch=replace(config.batch, joint="apart")), resume=True)
    assert train(config, resume=True).epochs == [0, 1]


def test_a_finished_run_resumes_to_itself(straight, sysu_root):
    run = straight[0]
    before, record = weights(run), numbers(run)
    train(small(sysu_root, run.path.parent, keep_features=True), resume=True)
    assert same(before, weights(run)) and record == numbers(run)


def test_full_disk_keeps_what_was_saved(straight, sysu_root, tmp_path):
    "A limit on file size stands in for a full disk: the weights no longer fit."
    run = train(small(sysu_root, tmp_path, intra_epochs=1, joint_epochs=0))
    before = weights(run)
    code = f"""
import resource, signal, sys
from vireid_nb import engine, artifacts
import torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
from vireid_nb.training import load_model
from vireid_nb.records import VireidError, seeded_torch
run = artifacts.Run({str(run.path)!r})
model, _ = load_model(run)
try:
    engine.save_checkpoint(run.checkpoint, model, torch.optim.Adam(model.parameters()), {{"epoch": 9}})
except VireidError as e:
    print(e)
    sys.exit(2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "what was saved before is untouched" in done.stdout, done.stderr
    assert same(before, weights(run)) and [p.name for p in run.checkpoint.parent.iterdir()] == ["last"]


def test_all_noise_is_said_and_changes_nothing(sysu_root, tmp_path, caplog):
    config = small(sysu_root, tmp_path, joint_epochs=0)
    run = train(replace(config, cluster=replace(config.cluster, min_samples=10_000)))
    assert "no cluster to learn from" in caplog.text
    fresh, _ = load_model(run)
    start = build_backbone(config.model, seed=config.seed).state_dict()
    assert same(start, fresh.state_dict())


@pytest.mark.parametrize("layout,protocols", [("regdb", {"thermal-visible", "visible-thermal"}), ("llcm", None)])
def test_other_layouts_train_and_are_judged(tmp_path, layout, protocols):
    root = write_dataset(tmp_path / "data", layout, n_train_ids=4, n_test_ids=3, seed=0)
    run = train(small(root, tmp_path / "runs", data=layout, joint_epochs=1))
    found = set(run.metrics("eval")["protocol"])
    assert found == protocols if protocols else len(found) == 2
    assert run.metrics("eval")["mAP"].between(0, 1).all()


def test_a_plain_folder_without_ids_trains(sysu_root, tmp_path):
    table = load_catalog(sysu_root, "sysu").train
    for i, row in table.iterrows():
        place = tmp_path / "data" / ("visible" if row.modality == 0 else "infrared") / f"{i:04d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(sysu_root / row.path, place)
    run = train(small(tmp_path / "data", tmp_path / "runs", data="folder", joint_epochs=0))
    assert len(run.metrics("eval")) == 0 and run.metrics("train")["steps"].iloc[-1] > 0


def test_a_picture_that_breaks_after_the_check_is_named(sysu_root, tmp_path):
    table = load_catalog(sysu_root, "sysu").train
    for i, row in table.iterrows():
        place = tmp_path / "data" / ("visible" if row.modality == 0 else "infrared") / f"{i:04d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((sysu_root / row.path).read_bytes()[: 300 if i == 5 else None])
    with pytest.raises(VireidError, match="0005.jpg.*vireid check"):
        train(small(tmp_path / "data", tmp_path / "runs", data="folder"))


def test_features_are_extracted_in_float32_whatever_training_computes_in(sysu_root, tmp_path):
    catalog, banks = load_catalog(sysu_root, "sysu"), {}
    for features in ("float32", "same"):
        config = small(sysu_root, tmp_path, name=features, intra_epochs=1, joint_epochs=0, eval_every=0, keep_features=True)
        config = replace(config, engine=EngineConfig(device="cpu", precision="bf16", features=features, progress=False), batch=replace(config.batch, iterations=1))
        banks[features] = train(config).features(0).features
    plain = extract(build_backbone(config.model, seed=config.seed), ImageStore(sysu_root, catalog.train.path, size=(96, 48)), catalog.train.modality, catalog.train.camid, progress=False)
    kept = np.abs(banks["float32"] - plain.features).max()  # the run folder keeps float16
    assert kept < 5e-4 and np.abs(banks["same"] - plain.features).max() > 2 * kept


def test_test_pictures_may_be_resized_as_the_programs_do(sysu_root, tmp_path):
    scores = []
    for resize in ("bicubic", "lanczos"):
        config = small(sysu_root, tmp_path, name=resize, intra_epochs=1, joint_epochs=0, eval_every=0)
        config = replace(config, data=replace(config.data, size=(64, 32), test_resize=resize), batch=replace(config.batch, iterations=1))
        run = train(config)
        scores.append((run.metrics("eval")["mAP"].tolist(), run.metrics("train")["loss.visible"].tolist()))
    assert scores[0][1] == scores[1][1] and scores[0][0] != scores[1][0]
