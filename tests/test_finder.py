"The browser for the tests: which one is taken, how one is brought, what is said without one. No real browser is touched."
import subprocess
import sys
from pathlib import Path

import browser
import pytest

TESTS = Path(__file__).resolve().parent


@pytest.fixture
def bare(tmp_path, monkeypatch):
    "A machine without a browser: returns a function that puts a program on its PATH."
    for name in ("VIREID_BROWSER", "CI"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path / "downloads"))

    def program(name, body="exit 0"):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return str(path)

    return program


def test_which_browser_is_taken(bare, monkeypatch, tmp_path):
    nobody = lambda: str(tmp_path / "none")
    assert browser.find() is None and browser.find(nobody) is None  # the first asks playwright where its own would be
    own = bare("downloaded")
    assert browser.find(lambda: own) == own
    chrome = bare("google-chrome")
    assert browser.find(lambda: own) == chrome
    bare("chromium", "exit 127")  # a stub, or one that lacks a library
    assert browser.find(nobody) == chrome
    chromium = bare("chromium")
    assert browser.find(nobody) == chromium
    monkeypatch.setenv("VIREID_BROWSER", chrome)
    assert browser.find(nobody) == chrome
    monkeypatch.setenv("VIREID_BROWSER", str(tmp_path / "gone"))
    assert browser.find(nobody) is None  # the one named, and no other


def test_how_one_is_brought(bare, monkeypatch, tmp_path):
    assert [w[0][0] for w in browser.ways(root=True, apt=True)] == ["apt-get", sys.executable]
    for root, apt in ((True, False), (False, True)):
        assert [w[0][:5] for w in browser.ways(root, apt)] == [[sys.executable, "-m", "playwright", "install", "chromium"]]
    monkeypatch.setattr(browser.os, "geteuid", lambda: 0)
    wanted = tmp_path / "bin/chromium"
    bare("apt-get", f"[ $1 = install ] && printf '#!/bin/sh\\n' > {wanted} && /bin/chmod +x {wanted}; exit 0")
    assert browser.bring(lambda: str(tmp_path / "none")) == str(wanted)


@pytest.mark.parametrize("ci", [False, True])
def test_without_one_every_test_says_so_alike(bare, monkeypatch, tmp_path, ci):
    (tmp_path / "conftest.py").write_text("from browser import chromium, pytest_terminal_summary\n")
    (tmp_path / "test_it.py").write_text("def test_one(chromium): pass\ndef test_two(chromium): pass\n")
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    if ci:
        monkeypatch.setenv("CI", "1")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert ("2 errors" if ci else "2 skipped") in done.stdout and (done.returncode != 0) == ci
    assert ("2 tests skipped, no browser" in done.stdout) != ci and "python tests/browser.py" in done.stdout
