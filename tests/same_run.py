"When two runs are the same run."
import torch
from safetensors.torch import load_file


def numbers(run):
    "Every logged event but the seconds."
    return [e for e in run.events() if e["event"] != "seconds"]


def weights(run):
    return load_file(run.checkpoint / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
