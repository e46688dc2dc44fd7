"Shared by all tests: one thread, no progress bars, reproducible examples, and a tiny synthetic set in the real layout."
import os

for name, value in {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}.items():  # before torch and numba are first imported
    os.environ.setdefault(name, value)

import pytest
import torch
from browser import chromium, pytest_terminal_summary  # noqa: F401  every test may ask for the browser
from hypothesis import settings

torch.set_num_threads(1)  # bit-for-bit comparisons must not depend on the machine
settings.register_profile("vireid_nb", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("vireid_nb")


@pytest.fixture(scope="session")
def sysu_root(tmp_path_factory):
    "A small VI-Synth set in SYSU-MM01's layout, drawn once for all tests: read it, never write to it."
    from vireid_nb.synthetic import write_dataset

    root = tmp_path_factory.mktemp("vi-synth") / "sysu"
    write_dataset(root, "sysu", n_train_ids=6, n_test_ids=4, seed=0)
    return root
