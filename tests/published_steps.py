"""The published MMM program's training steps beside ours, in float64: weights and pictures are made by a rule, only its outputs are kept (tests/golden/h_steps_*.npz).

    python tests/published_steps.py     prints the largest differences
"""
import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

from vireid_nb import baseline, mmm
from vireid_nb.backbone import BackboneConfig, build_backbone
from vireid_nb.baseline import baseline_preset
from vireid_nb.engine import Engine, EngineConfig
from vireid_nb.memories import ClusterMemory
from vireid_nb.mmm import align_steps, make_classifier, mmm_preset, plain_steps
from vireid_nb.records import FeatureBank, PseudoLabels
from vireid_nb.training import Batch, Learner, learning_rate, make_optimizer

GOLDEN = Path(__file__).parent / "golden"


@cache
def golden(name: str) -> dict:  # network, stages or third
    with np.load(GOLDEN / f"h_steps_{name}.npz") as z:
        return dict(z)


# ---- the rule


def normal(name: str, shape) -> torch.Tensor:
    seed = int.from_bytes(hashlib.blake2b(f"0:{name}".encode(), digest_size=8).digest(), "little")
    return torch.from_numpy(np.asarray(np.random.default_rng(seed).standard_normal(tuple(shape)).astype(np.float32)))


def by_rule(name: str, shape) -> torch.Tensor:
    "The value of a tensor with this name."
    if name.endswith("num_batches_tracked") or name == "neck.bias":
        return torch.zeros(tuple(shape), dtype=torch.long if name != "neck.bias" else torch.float32)
    z = normal(name, shape)
    if name == "classifier.weight":
        return 0.001 * z
    if name.endswith("running_mean"):
        return 0.1 * z
    if name.endswith("running_var"):
        return 1 + 0.1 * z.abs()
    if name == "neck.weight":
        return 1 + 0.01 * z
    if z.ndim == 1:
        small = name.startswith("non_local") or name.endswith("bias")
        return 0.1 * z if small else (0.3 if ".bn3." in name else 1.0) * (1 + 0.1 * z)
    return z * np.float32(np.sqrt(2 / np.prod(z.shape[1:])))


def start(model: torch.nn.Module) -> torch.nn.Module:
    "The model with weights by the rule, in double. The published output convolution of a non-local block has a bias, ours has none: it shifts the running mean behind it."
    state = {k: by_rule(k, v.shape) for k, v in model.state_dict().items()}
    for k in state:
        if k.startswith("non_local") and k.endswith("out.1.running_mean"):
            bias = k.replace("out.1.running_mean", "out.0.bias")
            state[k] = state[k].double() - by_rule(bias, state[k].shape).double()
    model = model.double()
    model.load_state_dict(state)
    return model


def images(n: int, h: int, w: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, 3, h, w)).astype(np.float32)).double()


# ---- our classes, fed with these


class Given(Learner):
    "A learner whose batches are given: {stream: [Batch]}."

    def __init__(self, config, model, given: dict):
        super().__init__(config, Engine(config.engine), model, None)
        self.given = given

    def batches(self, pairs, epoch, stream):
        yield from self.given[stream]


class Kept(ClusterMemory):
    "A memory that can be looked at afterwards."
    made = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.made.append(self)


def batch(visible, infrared, seed: int, apart: int = 3) -> Batch:
    return Batch(visible, infrared, *(images(8, 64, 32, seed + apart * k) for k in range(3)))


def trained(config, learner: Learner, steps, epoch: int) -> list:  # [{name: loss}] of each step
    "Our engine's optimiser steps."
    learner.model, optimizer = learner.engine.prepare(learner.model, make_optimizer(config, learner.model, epoch))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch) * group["scale"]
    learner.model.train()
    out = []
    for losses in steps:
        learner.engine.step(sum(losses.values()), optimizer)
        out.append({k: v.item() for k, v in losses.items()})
    return out


def engine(config):
    return replace(config, engine=EngineConfig(device="cpu", precision="no", progress=False))


def bank_of(features, modality) -> FeatureBank:
    return FeatureBank(features, modality, np.full(len(modality), -1), np.arange(len(modality)))


def network() -> tuple:  # (outputs by name, model)
    "Unit features of pictures in evaluation mode, raw ones in training mode."
    model, out = start(build_backbone(BackboneConfig(weights="none"))), {}
    sides = {"visible": images(4, 144, 72, 1), "infrared": images(4, 144, 72, 2)}
    with torch.no_grad():
        model.eval()
        for m, (title, x) in enumerate(sides.items()):
            for name, y in zip(("neck", "pooled"), model(x, m, return_pooled=True)):
                out[f"eval_{title}_{name}_unit"] = F.normalize(y, dim=1)
        model.train()
        out["train_neck"], out["train_pooled"] = model(torch.cat([*sides.values()]), torch.arange(8) // 4, return_pooled=True)
    return out, model


def stages(joint: bool) -> tuple:  # (losses of each step, model, {memory: entries})
    "Three steps within modalities; or two iterations of one such step and one across them."
    z, config, made = golden("stages"), engine(baseline_preset("sysu")), []

    class Kept(ClusterMemory):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    given = {
        kind: [batch(v, r, 100 + 10 * i + shift) for i, (v, r) in enumerate(zip(z[f"{kind}_batch_visible"], z[f"{kind}_batch_infrared"]))][: 2 if joint else 3]
        for kind, shift in (("intra", 0), ("joint", 50))
    }
    learner = Given(config, start(build_backbone(replace(config.model, weights="none"))), given)
    labels = PseudoLabels(z["labels_visible"], z["labels_infrared"], z["joint"], z["modality"])
    epoch = config.intra_epochs if joint else 0
    with patch.object(baseline, "ClusterMemory", Kept):
        steps = config.make_method().steps(learner, bank_of(z["features"], z["modality"]), labels, epoch)
        losses = trained(config, learner, steps, epoch)
    return losses, learner.model, dict(zip(("visible", "infrared", "joint"), (m.features for m in made)))


def third(plain: bool) -> tuple:  # (losses of each step, model)
    "Three steps of the released third stage with given confidences and prototypes: cross-entropy alone, or everything."
    z = golden("third")
    config = engine(mmm_preset("sysu-released"))
    epoch = config.intra_epochs + config.joint_epochs + 5
    labels, modality = z["labels"], z["modality"]
    sides = [labels[modality == m] for m in (0, 1)]
    model = build_backbone(replace(config.model, weights="none"))
    model.classifier = make_classifier(model, PseudoLabels(*sides, labels, modality, matched=labels), 0)
    given = [batch(v, r, 500 + 10 * i, 1) for i, (v, r) in enumerate(zip(z["batch_visible"], z["batch_infrared"]))]
    learner = Given(config, start(model), {"align": given})
    prototypes = [torch.from_numpy(z[f"prototypes_{m}"]) for m in ("visible", "visible", "infrared")]
    with patch.object(mmm, "trust", lambda *a: (np.stack([z["weights"]] * 2), prototypes)):
        steps = plain_steps(learner, labels, modality, epoch) if plain else align_steps(learner, bank_of(np.ones((40, 1)), modality), labels, epoch)
        return trained(config, learner, steps, epoch), learner.model


# ---- the differences


def weights_apart(model, name: str, case: str) -> dict:  # {"weights": .., "shifted means": ..}, the largest
    "Norm and first values of every weight and running statistic. The running means behind the published bias are compared without it."
    z, state, out = golden(name), model.state_dict(), {"weights": 0.0, "shifted means": 0.0}
    held = {n: (first, norm) for n, first, norm in zip(*(z[f"{case}_{k}"] for k in ("names", "first", "norm")))}
    for n, (first, norm) in held.items():
        if n not in state:  # the published bias
            continue
        shift = n.replace("out.1.running_mean", "out.0.bias") if n.startswith("non_local") else n
        ours = state[n].double().flatten().cpu().numpy()
        if shift != n:
            bias = held[shift][0] if shift in held else by_rule(shift, ours.shape)[:1].numpy()
            out["shifted means"] = max(out["shifted means"], np.abs(first - bias - ours[: len(bias)]).max())
        else:
            out["weights"] = max(out["weights"], np.abs(first - np.resize(ours, np.shape(first))).max(), abs(norm - np.linalg.norm(ours)))
    return out


def network_differences() -> dict:
    z, (out, model) = golden("network"), network()
    apart = {k: (np.abs(z[k] - v.numpy()) / np.abs(z[k]).clip(1)).max() for k, v in out.items()}  # kept in float32: relative above 1
    which = lambda *parts: max(v for k, v in apart.items() if all(p in k for p in parts))
    return {"network, evaluation": {"outputs": which("eval")}, "network, training": {"outputs": which("train")} | weights_apart(model, "network", "running")}


def stage_differences(case: str, ran: tuple) -> dict:  # ran: of `stages`
    z, (losses, model, memories) = golden("stages"), ran
    side = {"infrared": "infrared", "visible": "visible", "joint": "joint_infrared"}
    want, got = z[f"{case}_losses"], []
    for i, n in enumerate(z[f"{case}_loss_names"]):  # infrared, visible, joint infrared, joint visible
        twice = n == "joint" and z[f"{case}_loss_names"][i - 1] == "joint"
        got.append(losses[i // 2]["joint_visible" if twice else side[n]])
    apart = np.abs(want - got)
    entries = {k: np.abs(z[f"{case}_memory_{k}"] - m.numpy()[:, : z[f"{case}_memory_{k}"].shape[1]]).max() for k, m in memories.items()}
    return {"losses": apart.max(), "first losses": apart[:3].max(), "memories": max(entries.values())} | weights_apart(model, "stages", case)


def third_differences(plain: bool) -> dict:
    z, (losses, model) = golden("third"), third(plain)
    out = weights_apart(model, "third", "warm" if plain else "train")
    if plain:
        return out
    pairs = [*zip(z["identity"], (s["identity"] for s in losses)), *zip(z["triplet"], (s["triplet"] for s in losses))]
    pulls = z["sm_md_first"]
    pairs += [(pulls[:2].sum(), losses[0]["sca_intra"]), (pulls[2:].sum(), losses[0]["sca_inter"])]
    return {"losses": max(abs(a - b) for a, b in pairs)} | out


@cache
def differences() -> dict:  # {golden: {what: largest absolute difference}}
    "Ours minus theirs, for everything recorded."
    joint = stages(joint=True)
    return network_differences() | {
        "within modalities, 3 Adam steps": stage_differences("intra", stages(joint=False)),
        "with joint batches, 4 Adam steps, gradient of the memory before its update": stage_differences("joint_old_gradient", joint),
        "the same as published": stage_differences("joint", joint),
        "third stage, cross-entropy alone, 3 SGD steps": third_differences(plain=True),
        "third stage, 3 SGD steps": third_differences(plain=False),
    }


def table() -> str:
    "The differences as Markdown."
    columns = ("outputs", "losses", "memories", "weights", "shifted means")
    rows = [["", *columns], ["---"] * (1 + len(columns))]
    rows += [[k, *(f"{v[c]:.1e}" if c in v else "" for c in columns)] for k, v in differences().items()]
    return "\n".join("| " + " | ".join(r) + " |" for r in rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
