"What the processes of test_processes.py do. Run by torchrun: `together.py JOB DATA OUT`; each process writes its answers to OUT/<its number>.json (and .safetensors)."
import hashlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from vireid_nb.backbone import BackboneConfig, build_backbone
from vireid_nb.baseline import baseline_preset
from vireid_nb.catalog import load_catalog
from vireid_nb.dmic import dmic_preset
from vireid_nb.engine import Engine, EngineConfig
from vireid_nb.features import extract
from vireid_nb.hmcl import EntryMemory
from vireid_nb.memories import ClusterMemory
from vireid_nb.mmm import mmm_preset
from vireid_nb.processes import average_gradients, rank, start
from vireid_nb.records import VireidError
from vireid_nb.training import BatchConfig, open_session, train
from vireid_nb.transforms import ImageStore

METHODS = {"baseline": baseline_preset("synth"), "mmm": mmm_preset("synth"), "released": mmm_preset("synth-released"), "dmic": dmic_preset("synth"), "views": baseline_preset("synth")}


def small(method, root, runs, groups=2, **more):
    "A training of a few steps on the tiny network, from random weights."
    base = METHODS[method]
    if method == "released":
        base = replace(base, align=replace(base.align, epochs=2, plain_epochs=1, n_ids=4, n_instances=3))
    return replace(
        base,
        data=replace(base.data, root=str(root)),
        model=BackboneConfig(name="tiny", weights="none"),
        cluster=replace(base.cluster, k1=8, k2=2, eps=0.6, joint_k1=12, joint_k2=4, joint_eps=0.7, min_samples=2),
        batch=BatchConfig(n_ids=3, n_instances=4, iterations=3, groups=groups, cut="views" if method == "views" else "identities"),
        engine=EngineConfig(device="cpu", progress=False),
        runs=str(runs),
        **{"name": method, "intra_epochs": 1, "joint_epochs": 1, **more},
    )


def watched(cls, name, tensors, seen):
    "From now on, note a hash of the tensors after every call of the method."
    plain = getattr(cls, name)

    def call(self, *args, **more):
        out = plain(self, *args, **more)
        seen.append(hashlib.sha1(b"".join(t.detach().numpy().tobytes() for t in tensors(self, *args))).hexdigest())
        return out

    setattr(cls, name, call)


def trainings(root, out):
    "All methods, with a hash of weights and memories after every step."
    seen = []
    watched(Engine, "step", lambda engine, loss, optimizer: [loss, *(p for g in optimizer.param_groups for p in g["params"])], seen)
    watched(ClusterMemory, "update", lambda memory, *_: [memory.features], seen)
    watched(EntryMemory, "update", lambda memory, *_: [memory.entries], seen)
    for method in METHODS:
        train(small(method, root, out))
    return {"seen": seen}


def one_step(root, out):
    "The first step of a training without groups: loss, gradients and running statistics. In float64: at ReLU's and pooling's kinks float32 makes of another order of summation another gradient."
    config = small("baseline", root, out, groups=1, name="step")
    method = config.make_method()
    session = open_session(config, (), resume=False)
    model = session.learner.model
    bank = session.extract(session.learner.store, session.catalog.train)
    model.train().double()
    loss = sum(next(method.steps(session.learner, bank, method.cluster(bank, 0), 0)).values())
    loss.backward()
    average_gradients(model.parameters())
    tensors = {"loss": loss.detach(), **{f"grad {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}}
    return tensors | {k: b.float() for k, b in model.named_buffers()}


def extractions(root, out):
    "Features by share and alone, of some sizes: more processes than batches, whole batches, a last small one."
    start("cpu")
    catalog = load_catalog(root, "sysu")
    table = catalog.train
    store, model, same = ImageStore(catalog.root, table.path, size=(96, 48)), build_backbone(BackboneConfig("tiny", weights="none"), seed=1), []
    for n, batch_size in ((3, 64), (16, 8), (37, 8)):
        rows = np.arange(len(store))[::-3][:n]
        shared, alone = (extract(model, store, table.modality, table.camid, index=rows, batch_size=batch_size, shared=s, progress=False) for s in (True, False))
        same.append(np.array_equal(shared.features, alone.features) and np.array_equal(shared.index, rows))
    return {"same": same}


def refusal(root, out):
    "What is said of three groups."
    try:
        train(small("baseline", root, out, groups=3, name="three"))
    except VireidError as e:
        return {"refused": f"{type(e).__name__}: {e}"}


def everything(root, out):
    "The jobs above."
    step = one_step(root, out)
    return refusal(root, out) | extractions(root, out) | trainings(root, out), step


def killed(root, out):
    "A training whose process 1 is killed in the second epoch."
    plain, steps = Engine.step, []

    def step(*args):
        steps.append(plain(*args))
        if len(steps) == 5 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Engine.step = step
    train(small("baseline", root, out))


def resumed(root, out):
    "The same, to its end."
    train(small("baseline", root, out), resume=True)
    return {}


if __name__ == "__main__":
    torch.set_num_threads(1)
    job, root, out = sys.argv[1:]
    answers = globals()[job](root, Path(out))
    answers, tensors = answers if isinstance(answers, tuple) else (answers, {})
    (Path(out) / f"{rank()}.json").write_text(json.dumps(answers))
    save_file({k: v.contiguous() for k, v in tensors.items()}, Path(out) / f"{rank()}.safetensors")
