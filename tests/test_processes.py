"Several processes against one: real ones, started by torchrun, talking through gloo."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import together
import torch
from safetensors.torch import load_file
from same_run import numbers, same, weights

from vireid_nb import cli
from vireid_nb.artifacts import Run
from vireid_nb.features import load_bank
from vireid_nb.processes import everywhere, gather_rows, main, rank, share, start, world
from vireid_nb.records import VireidError
from vireid_nb.training import train

TESTS = Path(__file__).parent
METHODS = list(together.METHODS)


def torchrun(*command, n=2):
    "(exit code, stdout, stderr) of a command in n processes."
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *map(str, command)], capture_output=True, text=True, env=env, timeout=300)
    return done.returncode, done.stdout, done.stderr


def vireid(*args):
    return torchrun("--no-python", sys.executable, "-c", "import sys; from vireid_nb.cli import main; sys.exit(main())", *args)


@pytest.fixture(scope="module")
def two(sysu_root, tmp_path_factory):
    "The folder in which two processes did everything."
    out = tmp_path_factory.mktemp("two")
    code, _, err = torchrun(TESTS / "together.py", "everything", sysu_root, out)
    assert code == 0, err[-3000:]
    return out


@pytest.fixture(scope="module")
def one(sysu_root, tmp_path_factory):
    "The trainings of one process."
    out = tmp_path_factory.mktemp("one")
    return {method: train(together.small(method, sysu_root, out)) for method in METHODS}


def answers(folder):
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(2)]


def same_labels(a, b):
    for e in a.epochs:
        for name in ("visible", "infrared", "joint", "shared"):
            assert np.array_equal(getattr(a.labels(e), name), getattr(b.labels(e), name)), (e, name)


@pytest.mark.parametrize("method", METHODS)
def test_with_groups_two_processes_train_the_network_of_one_bit_for_bit(one, two, method):
    a, b = one[method], Run(two / method)
    assert a.epochs == b.epochs
    same_labels(a, b)
    assert numbers(a) == numbers(b)  # every loss, metric and count
    assert same(weights(a), weights(b))  # sums of two terms have one order
    assert (a.info["world_size"], b.info["world_size"]) == (1, 2)
    assert a.metrics("train")["steps"].iloc[-1] > 0


def test_weights_and_memories_are_the_same_bits_in_both_processes_after_every_step(two):
    first, second = (a["seen"] for a in answers(two))
    assert first == second and len(set(first)) > 40


def test_without_groups_a_step_is_that_of_one_process_to_rounding(two, sysu_root, tmp_path):
    alone = together.one_step(sysu_root, tmp_path)
    first, second = (load_file(two / f"{i}.safetensors") for i in range(2))
    assert same(first, second) and first.keys() == alone.keys()
    for name, there in alone.items():
        assert (first[name] - there).abs().max() <= 1e-5 * there.abs().max().clamp(min=1), name


def test_shared_extraction_gives_the_same_bits(two):
    assert [a["same"] for a in answers(two)] == [[True] * 3] * 2


def test_a_killed_process_ends_the_other_and_either_number_of_processes_goes_on(one, sysu_root, tmp_path):
    code, _, err = torchrun(TESTS / "together.py", "killed", sysu_root, tmp_path)
    assert code != 0 and "Signal 9" in err
    assert Run(tmp_path / "baseline").epochs == [0, 1]
    shutil.copytree(tmp_path, tmp_path / "again")
    code, _, err = torchrun(TESTS / "together.py", "resumed", sysu_root, tmp_path)
    assert code == 0, err[-3000:]
    resumed = [Run(tmp_path / "baseline"), train(together.small("baseline", sysu_root, tmp_path / "again"), resume=True)]
    for run in resumed:
        assert same(weights(run), weights(one["baseline"]))
        assert [e for e in numbers(run) if e["event"] != "processes"] == numbers(one["baseline"])
    told = [[e["world_size"] for e in run.events() if e["event"] == "processes"] for run in resumed]
    assert told == [[], [1]]


def test_a_problem_is_told_once_and_ends_both(sysu_root, tmp_path):
    code, out, err = vireid("train", "baseline", "--data.root", tmp_path / "nowhere", "--runs", tmp_path, "--engine.device", "cpu")
    lines = [line for line in err.splitlines() if line.startswith("vireid")]
    assert code != 0 and len(lines) == 1 and "nowhere" in lines[0] and out == ""
    assert "vireid_nb/" not in err, "a traceback of ours"


def test_groups_that_do_not_divide_are_refused(two):
    first, second = (a["refused"] for a in answers(two))
    assert first == second.replace("Elsewhere", "VireidError") and "2 processes cannot share batch.groups 3; set --batch.groups to 1" in first
    assert not (two / "three").exists()


def test_the_command_trains_judges_and_extracts_and_speaks_once(sysu_root, tmp_path):
    flags = "--preset synth --batch.n-ids 3 --batch.n-instances 4 --batch.iterations 2 --intra-epochs 1 --joint-epochs 0 --engine.device cpu --model.weights none".split()
    commands = [
        ["train", "baseline", "--data.root", sysu_root, "--runs", tmp_path, "--name", "run", *flags],
        ["evaluate", tmp_path / "run", "--engine.device", "cpu"],
        ["extract", tmp_path / "run", sysu_root / "cam3", "-o", tmp_path / "ir.safetensors", "--modality", "infrared", "--engine.device", "cpu"],
    ]
    commands = json.dumps([[*map(str, c)] for c in commands])
    code, out, err = torchrun("--no-python", sys.executable, "-c", "import json, sys; from vireid_nb.cli import main; sys.exit(max(map(main, json.loads(sys.argv[1]))))", commands)
    assert code == 0, err[-3000:]
    assert [out.count(x) for x in ("run folder", "trials", "wrote")] == [1, 1, 1]
    lines = [line.split() for line in out.splitlines()]
    trained, judged = lines[3], next(line for line in lines if line[0] == "all")
    assert float(judged[4]) == pytest.approx(float(trained[7]), abs=0.06)
    assert len(load_bank(tmp_path / "ir.safetensors")) == len(list((sysu_root / "cam3").rglob("*.jpg")))


def test_other_commands_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["cluster", "bank.safetensors"]) == 2
    assert "`vireid cluster` runs in one process; torchrun can start train, evaluate, extract" in capsys.readouterr().err


def test_one_process_is_a_plain_no_op(monkeypatch):
    rows = torch.ones(2, requires_grad=True)
    assert (world(), rank(), main(), share(7)) == (1, 0, True, slice(0, 7))
    assert gather_rows(rows) is rows and everywhere(lambda: rows) is rows
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(VireidError, match="no MASTER_ADDR"):
        start("cpu")
