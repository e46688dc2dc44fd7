"A share of the torture (`make torture` runs all of it): kills at random moments and malformed input of every reader, in a process of its own."
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_kill_is_survived_and_every_input_refused_or_used():
    done = subprocess.run([sys.executable, TESTS / "torture.py", "--share"], capture_output=True, text=True)
    assert done.returncode == 0 and "all held" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
    rows = [line.rsplit(None, 3) for line in done.stdout.splitlines()]
    kills = [r for r in rows if len(r) == 4 and r[3] == "all" and r[2].isdigit()]
    wrong = [int(r[3]) for r in (line.rsplit(None, 4)[1:] for line in done.stdout.splitlines()) if len(r) == 4 and all(x.isdigit() for x in r)]
    assert sum(int(r[2]) for r in kills) >= 10 and len(wrong) >= 15 and not any(wrong)
