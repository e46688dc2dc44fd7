"What may stand at import: nothing that only one operating system has."
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UNIX_ONLY = ("fcntl", "resource", "grp", "pwd", "termios")


def test_every_module_imports_without_what_windows_lacks():
    modules = [f"vireid_nb.{p.stem}" for p in sorted((ROOT / "vireid_nb").glob("*.py")) if p.stem not in ("__init__", "_modidx")]
    assert len(modules) > 30
    block = "; ".join(f"sys.modules[{name!r}] = None" for name in UNIX_ONLY)
    others = "accelerate, concurrent.futures, filelock, anywidget, ipywidgets, psutil, scipy.stats, sklearn.cluster, torch, torchvision, tyro"  # what they import is their business
    code = f"import sys, {others}; {block}; import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="needs the module that Windows lacks")
def test_peak_memory_is_that_of_the_operating_system():
    import resource

    from vireid_nb.engine import peak_memory_gb

    unit = 1 if sys.platform == "darwin" else 1024
    assert abs(peak_memory_gb()["process"] - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9) < 0.01
