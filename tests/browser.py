"""A browser for the tests that look at pages: found, else brought, else said.

    python tests/browser.py    finds one or brings one, prints what came of it; with CI set, none is a failure (`make test` runs this)
"""
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")  # all of one engine
FLAGS = ("--no-sandbox", "--disable-gpu", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
NONE = "no browser: the browser tests are skipped; to have one: python tests/browser.py, or name yours: VIREID_BROWSER=/path/to/chromium"


def playwrights_own() -> str:
    "Where playwright keeps the chromium that it downloads; '' without playwright."
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return ""
    with sync_playwright() as p:
        return p.chromium.executable_path


def answers(path: str) -> bool:
    "Whether a browser starts: one that lacks a library, or is a stub that asks for a store, does not."
    try:
        return subprocess.run([path, "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def find(own=playwrights_own) -> str | None:  # own: says where playwright's is
    "A browser that starts: the one named in VIREID_BROWSER and no other, else one on the PATH, else playwright's own."
    named = os.environ.get("VIREID_BROWSER")
    if named:
        return next(filter(answers, filter(None, [shutil.which(named)])), None)
    return next((path for path in filter(None, map(shutil.which, NAMES)) if answers(path)), None) or next(filter(answers, filter(os.path.isfile, [own()])), None)


def ways(root: bool, apt: bool) -> Iterable:  # lists of commands, to be tried in turn
    "How a browser may be brought: apt where that may install, else playwright's download."
    if root and apt:
        options = ["-qq", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20"]
        yield [["apt-get", "update", *options], ["apt-get", "install", "-y", *options, "--no-install-recommends", "chromium"]]
    yield [[sys.executable, "-m", "playwright", "install", *(["--with-deps"] if root and apt else []), "chromium"]]


def bring(own=playwrights_own) -> str | None:
    "Install a browser by the first way that works."
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for way in ways(getattr(os, "geteuid", lambda: 1)() == 0, bool(shutil.which("apt-get"))):
        try:
            for command in way:
                print("   bringing a browser:", *command, flush=True)
                subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=True)
        except (OSError, subprocess.SubprocessError) as e:
            said = (getattr(e, "stderr", None) or str(e)).strip().splitlines()
            print("   that did not work:", said[0][:200] if said else e, flush=True)
        if path := find(own):
            return path
    return None


def missing(reason: str = NONE) -> None:
    "Fail where everything was promised, skip elsewhere."
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="module")
def chromium():
    "The browser, started; every test that needs one asks for this."
    path = find()
    if path is None:
        missing()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


def pytest_terminal_summary(terminalreporter):
    "Say aloud that tests were skipped for want of a browser."
    n = sum(NONE in str(report.longrepr) for report in terminalreporter.getreports("skipped"))
    if n:
        terminalreporter.section(f"{n} tests skipped, {NONE}", yellow=True, bold=True)


if __name__ == "__main__":
    found = find() or (None if os.environ.get("VIREID_BROWSER") else bring())
    print(f"   browser: {found}" if found else f"!! {NONE}")
    sys.exit(1 if os.environ.get("CI") and not found else 0)
