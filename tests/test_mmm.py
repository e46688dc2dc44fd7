"MMM: its alignment terms move what they should and nothing else; its training can be cut anywhere; poor pseudo-labels do not stop it."
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from same_run import numbers, same, weights

from vireid_nb import training
from vireid_nb.backbone import BackboneConfig
from vireid_nb.losses import mmd2
from vireid_nb.mmm import ABLATIONS, mmm_preset, training_cost
from vireid_nb.records import VireidError, seeded, seeded_torch
from vireid_nb.sca import confidences, inter_alignment, intra_alignment, loss_mixture, weighted_centers
from vireid_nb.synthetic import write_dataset
from vireid_nb.training import BatchConfig, DataConfig, EngineConfig, load_model, train


def random(*shape, seed=0):
    return torch.randn(*shape, generator=seeded_torch(seed, "test_mmm"))


# ---- the mixture


def test_a_mixture_tells_low_losses_from_high_ones():
    low, high = seeded(0, "low").normal(0.1, 0.02, 80), seeded(0, "high").normal(0.9, 0.05, 20)
    w = confidences(np.concatenate([low, high]))
    assert w[:80].min() > 0.99 and w[80:].max() < 0.01


@given(st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_confidences_do_not_depend_on_the_losses_unit(scale, shift):
    losses = seeded(1, "losses").gamma(1.0, 1.0, 60)
    np.testing.assert_allclose(confidences(losses * scale + shift), confidences(losses), atol=1e-3)


def test_groups_know_nothing_of_each_other():
    losses, groups = seeded(2, "losses").gamma(1.0, 1.0, 100), np.arange(100) % 2
    other = np.where(groups == 1, 7 * losses**2, losses)
    np.testing.assert_array_equal(confidences(losses, groups)[groups == 0], confidences(other, groups)[groups == 0])


@pytest.mark.parametrize("losses", [[0.4], [0.4, 0.4], [0.0] * 9, np.full(9, 3e5, np.float32), [0.4, np.nan]])
def test_losses_without_a_mixture_count_fully(losses, caplog):
    np.testing.assert_array_equal(confidences(losses), np.isfinite(losses).astype(np.float32))
    assert "too few or all alike" in caplog.text


def test_samples_without_a_loss_get_no_weight(caplog):
    assert confidences([np.nan, np.nan]).tolist() == [0, 0] and confidences([]).tolist() == [] and not caplog.text
    with pytest.raises(VireidError, match="1 not finite"):
        loss_mixture([1.0, np.inf])


# ---- the terms


def test_centers_carry_no_gradient_and_skip_noise():
    features = random(6, 3).requires_grad_()
    centers = weighted_centers(features, [0, 0, -1, 2, 2, 2], [1, 3, 9, 0, 0, 0])
    assert not centers.requires_grad
    torch.testing.assert_close(centers[0], ((features[0] + 3 * features[1]) / 4).detach())
    torch.testing.assert_close(centers[1:], torch.stack([torch.zeros(3), features[3:].mean(0).detach()]))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_intra_moves_labelled_samples_only(norm):
    emb, weights, centers = random(5, 4).requires_grad_(), torch.tensor([1.0, 0.5, 1, 0, 1], requires_grad=True), random(3, 4, seed=1).requires_grad_()
    intra_alignment(emb, [0, 2, -1, 1, 1], weights, centers, norm).backward()
    assert (emb.grad.abs().sum(1) > 0).tolist() == [True, True, False, False, True]  # noise, and a sample nobody trusts, stay
    assert weights.grad is None and centers.grad is None


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_intra_gradient_is_right(norm):
    emb, centers, w, y = random(5, 4).requires_grad_(), random(3, 4, seed=1), torch.tensor([1, 0.5, 0.2, 1, 0.7]), torch.tensor([0, 2, 2, 1, 0])
    intra_alignment(emb, y, w, centers, norm).backward()
    away = (emb - centers[y]).detach()
    torch.testing.assert_close(emb.grad, w[:, None] * (2 * away / 5 if norm == "l2" else away.sign() / 20))


def test_inter_is_both_directions_with_the_other_side_still():
    v, r = random(7, 4).requires_grad_(), random(9, 4, seed=1).requires_grad_()
    yv, yr = torch.tensor([0, 0, 1, 1, -1, 3, 3]), torch.tensor([0, 1, 1, 1, -1, 4, 0, 0, 4])
    loss = inter_alignment(v, yv, r, yr)
    halves = [(mmd2(v[yv == k], r[yr == k].detach()) + mmd2(r[yr == k], v[yv == k].detach())) / 2 for k in (0, 1)]
    torch.testing.assert_close(loss, sum(halves) / 2)
    grads, literal = torch.autograd.grad(loss, (v, r)), torch.autograd.grad(sum(halves) / 2, (v, r))
    torch.testing.assert_close(grads, literal, atol=1e-6, rtol=1e-5)
    assert [(g.abs().sum(1) > 0).tolist() for g in grads] == [np.isin(yv, [0, 1]).tolist(), np.isin(yr, [0, 1]).tolist()]


@pytest.mark.parametrize("side", [0, 1])
def test_inter_moves_the_side_that_is_not_detached(side):
    sides = [random(4, 3).requires_grad_(), random(4, 3, seed=1).requires_grad_()]
    held = [s.detach() if i != side else s for i, s in enumerate(sides)]
    inter_alignment(held[0], [0, 0, 1, 1], held[1], [0, 0, 1, 1]).backward()
    assert sides[side].grad.abs().sum() > 0 and sides[1 - side].grad is None


@pytest.mark.parametrize("labels", [([0, 0], [1, 1]), ([-1, -1], [-1, -1])])
def test_a_batch_without_the_matched_cluster_gives_zero_with_graph(labels):
    v, r = random(2, 3).requires_grad_(), random(2, 3, seed=1).requires_grad_()
    loss = inter_alignment(v, labels[0], r, labels[1])
    loss.backward()
    assert loss.item() == 0 and not v.grad.any() and not r.grad.any()


# ---- training


def small(root, runs, recipe="paper", data="sysu", **more):
    "MMM of a few short epochs on the tiny network, from random weights."
    base = mmm_preset("synth" if recipe == "paper" else "synth-released")
    config = replace(
        base,
        data=DataConfig(root=str(root), name=data, size=(96, 48)),
        model=BackboneConfig(name="tiny", weights="none"),
        cluster=replace(base.cluster, k1=8, k2=2, eps=0.6, joint_k1=12, joint_k2=4, joint_eps=0.7, min_samples=2),
        batch=BatchConfig(n_ids=3, n_instances=2, iterations=3),
        align=replace(base.align, epochs=3, plain_epochs=1, n_ids=3, n_instances=2),
        sca=replace(base.sca, inter_from=2),
        engine=EngineConfig(device="cpu", progress=False),
        joint_labels="matched",
        runs=str(runs),
        name="run",
        intra_epochs=1,
        joint_epochs=2,
    )
    for key, value in more.items():
        *path, name = key.split("__")
        place = config
        for part in path:
            place = getattr(place, part)
        setattr(place, name, value)
    return config


def loss_names(run):
    return [{k for k in e["loss"]} for e in run.events() if e["event"] == "train"]


@pytest.fixture(scope="module", params=["paper", "released"])
def straight(request, sysu_root, tmp_path_factory):
    "One uninterrupted run of each recipe."
    return request.param, train(small(sysu_root, tmp_path_factory.mktemp(request.param), request.param))


def test_the_stages_have_their_losses(straight):
    recipe, run = straight
    within, across = {"visible", "infrared"}, {"matched_visible", "matched_infrared"}
    if recipe == "paper":
        pull = within | {"sca_intra"}
        assert loss_names(run) == [pull, pull | across | {"sca_inter"}, pull | across | {"sca_inter"}]
    else:
        joint, full = within | {"joint_visible", "joint_infrared"}, {"identity", "triplet", "sca_intra", "sca_inter"}
        assert loss_names(run) == [within, joint, joint, {"identity"}, full, full]


def test_matches_are_in_the_record(straight):
    recipe, run = straight
    matched = [run.labels(e).matched is not None for e in run.epochs]
    assert matched == ([True] * 4 if recipe == "paper" else [False] * 3 + [True] * 4)
    info = run.labels(run.epochs[-1]).info["matching"]
    assert info["rule"] == ("hungarian" if recipe == "paper" else "nearest") and len(info["pairs"]) == len(info["cost"]) > 0
    assert run.metrics("labels")["ari_all"].notna().all()


def test_released_labels_stay_fixed(straight):
    recipe, run = straight
    if recipe == "released":
        first = run.labels(3)
        assert all(np.array_equal(run.labels(e).matched, first.matched) for e in (4, 5, 6))


def test_a_trained_network_loads_without_its_classifier(straight):
    recipe, run = straight
    network, _ = load_model(run)
    assert not hasattr(network, "classifier") and ("classifier.weight" in weights(run)) == (recipe == "released")


class Cut(Exception):
    "Stands for a kill."


@pytest.mark.parametrize("moment", [("labels", 1), ("train", 2), ("labels", 3), ("train", 4)], ids=str)
def test_cut_and_resumed_is_bit_equal(straight, sysu_root, tmp_path, moment):
    recipe, run = straight
    if recipe == "paper" and moment[1] > 3:
        return

    def cut(_, entry):
        if (entry["event"], entry["epoch"]) == moment:
            raise Cut

    config = small(sysu_root, tmp_path, recipe)
    with pytest.raises(Cut):
        train(config, callbacks=[cut])
    again = train(config, resume=True)
    assert same(weights(run), weights(again)) and numbers(run) == numbers(again)
    for e in run.epochs:
        assert run.labels(e).info.get("matching") == again.labels(e).info.get("matching")


def test_every_ablation_row_is_a_configuration(sysu_root, tmp_path):
    seen = {}
    for row, changes in ABLATIONS["parts"].items():
        config = small(sysu_root, tmp_path / row, intra_epochs=0, joint_epochs=1, sca__inter_from=1, **{k.replace(".", "__"): v for k, v in changes.items()})
        run = train(config)
        seen[row] = loss_names(run)[-1] - {"visible", "infrared"}
        assert run.config["joint_labels"] == config.joint_labels
    cmc, mmlm = ({f"{name}_{m}" for m in ("visible", "infrared")} for name in ("joint", "matched"))
    sca = {"sca_intra", "sca_inter"}
    assert list(seen.values()) == [cmc, mmlm, mmlm | {"sca_intra"}, mmlm | {"sca_inter"}, mmlm | sca, cmc | mmlm | sca]


def test_both_label_sets_train_side_by_side(sysu_root, tmp_path):
    run = train(small(sysu_root, tmp_path, joint_labels="both", intra_epochs=0, joint_epochs=2))
    assert {"joint_visible", "matched_visible", "sca_inter"} <= loss_names(run)[-1]


def test_the_pull_across_meets_both_sides_however_batches_are_drawn(sysu_root, tmp_path):
    "Paired: it rides on the joint batches. Apart: each joint step has it too, from paired batches of its own."
    taken, seen = [], lambda run, entry: taken.append(entry["loss"]) if entry["event"] == "step" else None
    for draw in ("apart", "paired"):
        train(small(sysu_root, tmp_path / draw, batch__joint=draw, intra_epochs=0, joint_epochs=1, sca__inter_from=1), callbacks=[seen])
    across = [step for step in taken if "matched_visible" in step]
    assert len(across) == len(taken) / 2 == 6 and all(step["sca_inter"] > 0 for step in across)


def test_one_summed_step_takes_all_losses_at_once(sysu_root, tmp_path):
    taken = []
    run = train(small(sysu_root, tmp_path, summed=True, intra_epochs=0, joint_epochs=1, sca__inter_from=1), callbacks=[lambda run, e: taken.append({*e["loss"]}) if e["event"] == "step" else None])
    assert taken == [{"visible", "infrared", "sca_intra", "matched_visible", "matched_infrared", "sca_inter"}] * 3
    assert run.metrics("train").steps.tolist() == [3]


def test_without_a_restart_schedule_and_momentum_go_on(sysu_root, tmp_path):
    "One optimiser for both stages, also for a run that was cut in the second."
    def cut(_, entry):
        if (entry["event"], entry["epoch"]) == ("labels", 2):
            raise Cut

    optim = training.OptimConfig("sgd", lr=0.01, warmup=3, restart=False, nesterov=False)
    whole = train(small(sysu_root, tmp_path / "whole", optim=optim))
    np.testing.assert_allclose(whole.metrics("train").lr, [0.01 / 3, 0.02 / 3, 0.01])
    with pytest.raises(Cut):
        train(small(sysu_root, tmp_path / "cut", optim=optim), callbacks=[cut])
    assert same(weights(whole), weights(train(small(sysu_root, tmp_path / "cut", optim=optim), resume=True)))
    fresh = train(small(sysu_root, tmp_path / "fresh", optim=replace(optim, restart=True, warmup=0)))
    assert fresh.metrics("train").lr.tolist() == [0.01] * 3


def test_paper_and_released_differ_where_the_programs_do():
    paper, released = mmm_preset("sysu"), mmm_preset("sysu-released")
    assert not paper.optim.nesterov and released.align.optim.nesterov
    assert (released.align.draw, released.align.look_up, released.test_mirror, released.engine.precision) == ("uniform", "training", False, "no")
    views = {stage: v for stage, (_, v) in training_cost(released).items()}
    assert views["intra"] + views["joint"] == sum(v for _, v in training_cost(paper).values()) == 11_520_000
    both = training_cost(replace(paper, joint_labels="both", summed=True, batch=replace(paper.batch, joint="paired")))
    assert both["joint"] == (60 * 600, 60 * 600 * 96 * 3)


@pytest.mark.parametrize("data", ["regdb", "llcm"])
def test_other_layouts_train(tmp_path, data):
    root = write_dataset(tmp_path / "data", data, n_train_ids=4, n_test_ids=3, seed=0)
    run = train(small(root, tmp_path / "runs", data=data, joint_epochs=1))
    assert run.metrics("eval")["mAP"].between(0, 1).all() and run.labels(1).matched is not None


# ---- poor pseudo-labels


def without(labels, name):
    "The labels with one modality all noise."
    y = np.full_like(getattr(labels, name), -1)
    joint = np.where(labels.modality == (name == "infrared"), -1, labels.joint)
    _, joint[joint >= 0] = np.unique(joint[joint >= 0], return_inverse=True)
    return replace(labels, **{name: y}, joint=joint)


POOR = {
    "no visible cluster": lambda y: without(y, "visible"),
    "no infrared cluster": lambda y: without(y, "infrared"),
    "no cluster": lambda y: without(without(y, "visible"), "infrared"),
    "one cluster": lambda y: replace(y, visible=0 * y.visible, infrared=0 * y.infrared, joint=0 * y.joint),
    "one infrared cluster": lambda y: replace(y, infrared=0 * y.infrared),
}


@pytest.mark.parametrize("recipe", ["paper", "released"])
@pytest.mark.parametrize("poor", POOR)
def test_poor_labels_do_not_stop_training(sysu_root, tmp_path, monkeypatch, caplog, recipe, poor):
    whole = training.cross_modality_clustering
    monkeypatch.setattr(training, "cross_modality_clustering", lambda bank, config, **how: POOR[poor](whole(bank, config, **how)))
    run = train(small(sysu_root, tmp_path, recipe, joint_epochs=1, align__epochs=2))
    assert len(loss_names(run)) == (2 if recipe == "paper" else 4)
    assert all(w.isfinite().all() for w in weights(run).values())
    said = {"no cluster": "no cluster to learn from", "one cluster": "all alike for a mixture" if recipe == "paper" else ""}
    assert said.get(poor, poor if poor.startswith("no ") else "") in caplog.text


def test_fewer_samples_than_sub_memories(sysu_root, tmp_path):
    run = train(small(sysu_root, tmp_path, matching__n=64, joint_epochs=1))
    assert run.labels(1).info["matching"]["pairs"] and "matched_visible" in loss_names(run)[-1]


def test_nobody_in_both_modalities(tmp_path):
    root = write_dataset(tmp_path / "data", "sysu", n_train_ids=8, n_test_ids=4, seed=0, unpaired=1.0)
    run = train(small(root, tmp_path / "runs", joint_epochs=1))
    assert all(w.isfinite().all() for w in weights(run).values())
