"VI-Synth: the same pixels everywhere, independence of people and cameras, knobs, and the three layouts on disk."
import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vireid_nb.records import Modality, VireidError
from vireid_nb.synthetic import (
    DIGESTS,
    WORLDS,
    SynthConfig,
    camera_counts,
    camera_numbers,
    contact_sheet,
    make_camera,
    make_person,
    make_shot,
    make_vi_features,
    named_world,
    render,
    seen_in,
    world_digest,
    write_dataset,
)

TINY = dict(n_train_ids=10, n_test_ids=3, visible_shots=1, infrared_shots=2, size=(32, 16), progress=False)
CAMERAS = (0, 1, 3, 4, 2, 5)
# drawn once and looked at; a change of these numbers is a change of everybody's data
DRAWN = {
    "nir": "4231672b17d173b6",
    "thermal": "e23bb8cb3fed7508",
}


def digest(array):
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()


def some(config):
    pids, cams = np.repeat([0, 1, 2, 7], 6), np.tile(CAMERAS, 4)
    return render(config, pids, cams, np.arange(24) % 3)


# the easy world as it was before it had a hard one beside it
EASY = (
    ({}, "34f27d8e2759a17d"),
    ({"reflectance_tie": 0.6, "camera_gap": 0.5, "noise": 0.6, "occlusion": 0.05}, "687ff8b8146317e8"),  # the demo's
    ({"occlusion": 1.0, "camera_gap": 1.5, "noise": 3.0, "modality_gap": 0.5, "seed": 7}, "e354cfcd8285dac7"),
    ({"size": (144, 72), "seed": 3}, "26011477c937cb61"),
)


@pytest.mark.parametrize("infrared", DRAWN)
def test_checksum(infrared):
    assert digest(some(SynthConfig(infrared=infrared, occlusion=0.5))) == DRAWN[infrared]


@pytest.mark.parametrize("knobs, wanted", EASY)
def test_the_easy_world_keeps_its_bytes(knobs, wanted):
    assert digest(some(SynthConfig(**knobs))) == wanted


@pytest.mark.parametrize("name", DIGESTS)
def test_a_frozen_world_keeps_its_bytes(name):
    assert world_digest(named_world(name)) == DIGESTS[name]
    assert named_world(name)["n_train_ids"] >= 100 and named_world(name)["n_test_ids"] >= 60


def test_a_frozen_world_does_not_follow_the_hard_one():
    named_world("bench-v1").clear()  # a copy
    assert WORLDS["bench-v1"] and WORLDS["bench-v1"] is not WORLDS["hard"]


def test_compiled_and_interpreted_pixels_are_equal():
    "Without the compiler every operation is plain IEEE arithmetic: the oracle of 'same bytes on any machine'."
    config = "SynthConfig(size=(32, 16), occlusion=1.0)"
    code = f"import numpy as np; from vireid_nb.synthetic import *; np.seterr(over='ignore'); print(render({config}, [0, 1, 1], [0, 2, 4], 0).tobytes().hex())"
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == render(SynthConfig(size=(32, 16), occlusion=1.0), [0, 1, 1], [0, 2, 4], 0).tobytes().hex()


def test_adding_people_cameras_and_shots_changes_nobody():
    small, large = SynthConfig(n_visible_cams=2, n_infrared_cams=1), SynthConfig(n_visible_cams=2, n_infrared_cams=3, visible_shots=20, unpaired=0.5)
    assert (render(small, 3, 2, 1) == render(large, [0, 3, 9], [0, 2, 4], [0, 1, 2])[1:2]).all()


def test_worlds_of_other_seeds_share_nothing():
    a, b = SynthConfig(seed=0), SynthConfig(seed=1)
    assert make_person(0, 5) != make_person(1, 5)
    assert make_shot(a, 5, 0, 0, 0) != make_shot(b, 5, 0, 0, 0)
    assert (make_camera(0, 0, 0, a).scene != make_camera(1, 0, 0, b).scene).mean() > 0.9


@pytest.mark.parametrize("infrared", ["nir", "thermal"])
def test_infrared_is_colourless_and_visible_is_not(infrared):
    pictures = some(SynthConfig(infrared=infrared)).reshape(4, 6, 96, 48, 3).astype(int)
    assert pictures.dtype == int and (np.ptp(pictures[:, 4:], axis=-1) == 0).all()
    assert (np.ptp(pictures[:, :4], axis=-1).mean((2, 3)) > 3).all()


HARD = SynthConfig(**named_world("hard"))
KNOBS = {"tracklet": 8, "strays": 0.5, "sides": 1.0, "daylight": 1.0, "crop": 0.5, "fashion": 1.0, "uniforms": 1.0}


@pytest.mark.parametrize("knob", KNOBS)
def test_each_knob_changes_pictures_and_at_zero_nothing(knob):
    base = SynthConfig(size=(32, 16), tracklet=4 if knob == "strays" else 1)
    changed, off = (replace(base, **{knob: v}) for v in (KNOBS[knob], getattr(SynthConfig(), knob)))
    draw = lambda config: render(config, np.repeat(np.arange(6), 4), 0, np.tile(np.arange(4), 6))
    assert (draw(changed) != draw(base)).any() and (draw(replace(off, tracklet=base.tracklet)) == draw(base)).all()


def test_turning_a_knob_of_people_changes_nobody_elses_look():
    "Who wears a uniform at 0.3 wears the same one at 0.6."
    few, many = ([make_person(0, p, SynthConfig(uniforms=u)) for p in range(60)] for u in (0.3, 0.6))
    plain = [make_person(0, p) for p in range(60)]
    assert all(a in (b, c) for a, b, c in zip(few, many, plain)) and few != many


def test_frames_of_a_walk_are_alone_or_among_others_the_same():
    assert (render(HARD, 3, 1, 13)[0] == render(HARD, 3, 1, np.arange(20))[13]).all()


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_everybody_passes_two_visible_cameras_and_one_infrared(pid, absent, uneven):
    config = SynthConfig(absent=absent, uneven=uneven, visible_shots=7, infrared_shots=5)
    for m, cams in zip(Modality, camera_numbers()):
        counts = camera_counts(config, pid, m, cams)
        assert (1 if m else 2) <= len(counts) <= len(cams) and min(counts.values()) >= 1
        assert max(counts.values()) <= (5, 7)[m == 0] * (1 + uneven) + 0.5


def test_a_hard_set_on_disk_has_the_pictures_it_counts(tmp_path):
    values = named_world("hard") | {"visible_shots": 2, "infrared_shots": 2, "size": (32, 16)}
    root = write_dataset(tmp_path / "hard", n_train_ids=5, n_test_ids=2, progress=False, **values)
    config = SynthConfig(**values)
    wanted = sum(sum(camera_counts(config, p, m, cams).values()) for p in range(1, 8) for m, cams in zip(Modality, camera_numbers()))
    assert len(list(root.rglob("*.jpg"))) == wanted


def test_every_picture_shows_somebody():
    "A picture differs from the same place without the person."
    config = SynthConfig(noise=0.0, occlusion=0.0)
    two = np.stack([render(config, pid, CAMERAS, 0) for pid in (0, 1)]).astype(int)
    assert (np.abs(two[0] - two[1]).max(-1) > 20).mean((1, 2)).min() > 0.05


@pytest.mark.parametrize("size", [(16, 16), (64, 128), (288, 144)])
def test_sizes(size):
    assert render(SynthConfig(size=size), 0, [0, 2], 0).shape == (2, *size, 3)


def test_a_larger_picture_is_the_same_picture():
    low, high = (render(SynthConfig(size=s, noise=0.0), 0, [0, 1, 2], 0).astype(float) for s in ((96, 48), (288, 144)))
    assert np.abs(high.reshape(3, 96, 3, 48, 3, 3).mean((2, 4)) - low).mean() < 8


def test_camera_gap_zero_makes_cameras_alike():
    cameras = [make_camera(0, c, Modality.VISIBLE, SynthConfig(camera_gap=0.0)) for c in (0, 1, 3)]
    assert all((c.scene == cameras[0].scene).all() and (c.cast == cameras[0].cast).all() for c in cameras)
    assert len({(c.gain, c.zoom, c.high, c.roll, c.lamp, c.curve, c.haze, c.blur, c.grain) for c in cameras}) == 1


def test_modality_gap_zero_is_the_grey_picture():
    config = SynthConfig(modality_gap=0.0, camera_gap=0.0, noise=0.0)
    colour, infrared = (render(config, range(8), 0, 0, modality=m).astype(float).mean((0, 1, 2)) for m in Modality)
    assert abs((colour @ [0.3, 0.59, 0.11]) - infrared[0]) < 8


def test_contact_sheet_has_a_column_a_camera_and_shot():
    assert contact_sheet(SynthConfig(), [4, 9], shots=3, up=2).size == (48 * 6 * 3 * 2, 96 * 2 * 2 + 28)


@given(st.integers(1, 200), st.floats(0, 1))
def test_unpaired_share_is_exact(n, share):
    seen = [seen_in(p, share) for p in range(n)]
    alone = sum(v != i for v, i in seen)
    assert abs(alone - n * share) < 1 + 1e-6 and all(v or i for v, i in seen)
    assert abs(sum(v for v, _ in seen) - sum(i for _, i in seen)) <= 1


@given(st.integers(1, 6), st.integers(1, 4))
def test_camera_numbers_are_distinct(visible, infrared):
    a, b = camera_numbers(visible, infrared)
    assert (len(a), len(b)) == (visible, infrared) and sorted(a + b) == list(range(visible + infrared))


def test_features():
    bank, pids = make_vi_features(10, 6, 4, dim=32, unpaired=0.2)
    again, _ = make_vi_features(10, 6, 4, dim=32, unpaired=0.2)
    assert (bank.features == again.features).all() and np.allclose(np.linalg.norm(bank.features, axis=1), 1, atol=1e-6)
    assert len(bank.visible) == 9 * 6 and len(bank.infrared) == 9 * 4
    assert (np.diff(bank.modality) >= 0).all() and (bank.index == np.arange(len(bank))).all()
    assert set(bank.visible.camid) == {0, 1, 3, 4} and set(bank.infrared.camid) == {2, 5}
    assert all((np.diff(pids[bank.modality == m]) >= 0).all() for m in Modality)


def lines(path):
    return [line.rsplit(" ", 1) for line in path.read_text().splitlines()]


def test_sysu_layout(tmp_path):
    root = write_dataset(tmp_path / "sysu", "sysu", **TINY, unpaired=0.4)
    ids = {k: [int(i) for i in (root / f"exp/{k}_id.txt").read_text().split(",")] for k in ("train", "val", "test")}
    assert ids == {"train": list(range(1, 10)), "val": [10], "test": [11, 12, 13]}
    held = {c: {int(p.name) for p in (root / f"cam{c}").iterdir()} for c in range(1, 7)}
    assert held[1] == held[5] and held[3] == held[6] and held[1] | held[3] == set(range(1, 14))
    assert len(held[1]) == len(held[3]) == 11 and {11, 12, 13} <= held[1] & held[3]
    assert len(list(root.rglob("*.jpg"))) == 11 * 4 * 1 + 11 * 2 * 2
    assert Image.open(root / "cam1/0001/0001.jpg").size == (16, 32)
    assert not [p for p in tmp_path.iterdir() if p != root]  # nothing temporary is left


def test_fewer_cameras_are_the_first_ones(tmp_path):
    root = write_dataset(tmp_path / "sysu", "sysu", **TINY, n_visible_cams=2, n_infrared_cams=1)
    assert sorted(p.name for p in root.iterdir()) == ["cam1", "cam2", "cam3", "exp"]


def test_regdb_layout(tmp_path):
    root = write_dataset(tmp_path / "regdb", "regdb", **{**TINY, "visible_shots": 3, "infrared_shots": 2})
    assert len(list(root.glob("Visible/*/*.bmp"))) == 13 * 3 and len(list(root.glob("Thermal/*/*.bmp"))) == 13 * 2
    assert len(list((root / "idx").iterdir())) == 40
    splits = set()
    for trial in range(1, 11):
        rows = {(s, m): lines(root / f"idx/{s}_{m}_{trial}.txt") for s in ("train", "test") for m in ("visible", "thermal")}
        assert [sorted({int(y) for _, y in r}) for r in rows.values()] == [list(range(10))] * 2 + [list(range(3))] * 2
        folder = {k: {path.split("/")[1]: y for path, y in r} for k, r in rows.items()}
        assert folder["train", "visible"] == folder["train", "thermal"] and not set(folder["train", "visible"]) & set(folder["test", "visible"])
        assert all((root / path).is_file() for r in rows.values() for path, _ in r)
        splits.add(tuple(folder["test", "visible"]))
    assert len(splits) > 5


def test_regdb_unpaired_people_leave_the_training_lists(tmp_path):
    root = write_dataset(tmp_path / "regdb", "regdb", **TINY, unpaired=0.4)
    count = lambda name: len({y for _, y in lines(root / f"idx/{name}_1.txt")})
    assert [count(n) for n in ("train_visible", "train_thermal", "test_visible", "test_thermal")] == [8, 8, 3, 3]


def test_llcm_layout(tmp_path):
    root = write_dataset(tmp_path / "llcm", "llcm", **TINY)
    assert len(list(root.glob("vis/*/*_vis.jpg"))) == 13 * 9 and len(list(root.glob("nir/*/*_nir.jpg"))) == 13 * 9 * 2
    assert (root / "idx/test_id.txt").read_text() == "11,12,13\n"
    for kind in ("vis", "nir"):
        train, test = lines(root / f"idx/train_{kind}.txt"), lines(root / f"idx/test_{kind}.txt")
        assert sorted({int(y) for _, y in train}) == list(range(10)) and {int(y) for _, y in test} == {11, 12, 13}
        assert {int(path.split("_c")[1][:2]) for path, _ in train} == set(range(1, 10))
        assert all((root / path).is_file() for path, _ in train + test)


def test_same_seed_same_files(tmp_path):
    roots = [write_dataset(tmp_path / n, "sysu", **{**TINY, "n_train_ids": 2, "n_test_ids": 1}) for n in "ab"]
    a, b = ({p.relative_to(r): p.read_bytes() for p in r.rglob("*") if p.is_file()} for r in roots)
    assert a == b


@pytest.mark.parametrize("call, message", [
    (lambda d: write_dataset(d, "sysu", **TINY), "not an empty folder"),
    (lambda d: write_dataset(d / "x", "market"), "say one of sysu"),
    (lambda d: write_dataset(d / "x", shots=2), "unknown knobs"),
    (lambda d: write_dataset(d / "x", n_train_ids=1), "at least 2 and 1"),
    (lambda d: write_dataset(d / "x", n_visible_cams=5), "has places for"),
    (lambda d: write_dataset(d / "x", occlusion=2), "from 0 to 1"),
    (lambda d: write_dataset(d / "x", tracklet=0), "at least 1 picture"),
    (lambda d: write_dataset(d / "x", daylight=2), "from 0 to 1.5"),
    (lambda d: write_dataset(d / "x", absent=-0.1), "from 0 to 1"),
    (lambda d: named_world("harder"), "choose easy, hard, bench-v1"),
    (lambda d: render(SynthConfig(), 0, 6, 0), "not among the 6"),
    (lambda d: SynthConfig(size=(8, 8)), "at least 16"),
    (lambda d: make_vi_features(2, 2, 0), "must be positive"),
    (lambda d: make_vi_features(2, 2, 2, unpaired=-1), "between 0 and 1"),
])  # fmt: skip
def test_errors_are_one_line(tmp_path, call, message):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(VireidError, match=message) as e:
        call(tmp_path)
    assert "\n" not in str(e.value) and (tmp_path / "kept.txt").read_text() == "mine"
