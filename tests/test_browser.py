"The widgets in a real JupyterLab, in a real browser, moved by a real mouse. Chromium is needed: where CI is set its absence is a failure, elsewhere a skip."
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from looking import made_up_run

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
WAIT = int(os.environ.get("BROWSER_WAIT", 120_000))  # milliseconds; a busy two-core machine compiles for a long time


def missing(reason):
    "Fail where everything was promised, skip elsewhere."
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; CI must have it: apt-get install -y chromium && pip install playwright jupyterlab")
    pytest.skip(reason)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def chromium():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        missing("there is no chromium")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab of its own over an empty folder: (address, folder)."
    if shutil.which("jupyter-lab", path=str(Path(sys.executable).parent)) is None:
        missing("jupyterlab is not installed")
    folder, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    for extension, name, values in (
        ("apputils-extension", "notification", {"checkForUpdates": False, "fetchNews": "false"}),
        ("notebook-extension", "tracker", {"windowingMode": "none"}),
    ):
        file = home / "settings/@jupyterlab" / extension / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    port, env = free_port(), {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"), "JUPYTER_RUNTIME_DIR": str(home / "runtime")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    log = home / "log"
    with open(log, "w") as out:
        server = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, cwd=folder)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5)
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", folder
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def run(sysu_root, tmp_path_factory):
    return made_up_run(sysu_root, tmp_path_factory.mktemp("looked-at") / "run")


class Page:
    "A notebook in the browser, run, with what its console complained of."

    def __init__(self, chromium, lab, name, *cells):
        address, folder = lab
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(book, folder / f"{name}.ipynb")
        self.page = chromium.new_page(viewport={"width": 1400, "height": 1500})
        self.page.set_default_timeout(WAIT)
        self.complaints = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.goto(f"{address}/lab/tree/{name}.ipynb?reset", wait_until="domcontentloaded")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        self.page.get_by_text("| Idle").wait_for()  # a cell run before the kernel is there is forgotten
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    def drawn(self, n):
        "Wait until n figures hold data."
        self.page.wait_for_function(f"() => [...document.querySelectorAll('.vireid .js-plotly-plot')].filter(g => g._fullData && g._fullData.some(t => t.x && t.x.length)).length >= {n}")

    def changes(self, selector, before):
        "The HTML of an element once it differs from what it was."
        self.page.wait_for_function("([s, b]) => document.querySelector(s) && document.querySelector(s).innerHTML !== b", arg=[selector, before])
        return self.html(selector)

    def caught(self, selector, relation):
        "How many pictures an element tells of, once that is in this relation to a number."
        total = f"[...(document.querySelector({json.dumps(selector)})?.innerText || '').matchAll(/(\\d+) (?:visible|infrared)/g)].reduce((n, m) => n + +m[1], 0)"
        self.page.wait_for_function(f"() => {total} {relation}")
        return self.page.evaluate(total)

    def html(self, selector):
        return self.page.eval_on_selector(selector, "e => e.innerHTML")

    def point(self, trace, i):
        "Where point i of a trace of the first figure lies on the screen."
        return self.page.evaluate(
            """([t, i]) => {const g = document.querySelector('.vireid .js-plotly-plot'), l = g._fullLayout, d = g._fullData[t], r = g.getBoundingClientRect();
            return [r.left + l._size.l + l.xaxis.d2p(d.x[i]), r.top + l._size.t + l.yaxis.d2p(d.y[i])]}""",
            [trace, i],
        )

    def lasso(self, left, top, right, bottom):
        "Drag a loop; the corners are shares of the first figure's width and height."
        box = self.page.locator(".vireid .js-plotly-plot .nsewdrag").first.bounding_box()
        at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])
        mouse = self.page.mouse
        mouse.move(*at(left, top))
        mouse.down()
        for corner in ((right, top), (right, bottom), (left, bottom), (left, top + 0.01)):
            mouse.move(*at(*corner), steps=8)
        mouse.up()


def test_clusters_by_mouse(chromium, lab, run):
    page = Page(chromium, lab, "clusters", "from vireid_nb.widgets import inspect_clusters", f"view = inspect_clusters({str(run.path)!r})\nview")
    page.drawn(1)
    head, pictures, card = (f".vireid {s}" for s in ("h3 + .quiet", ".widget-html-content:has(> .strip)", ".widget-html-content:has(> .card)"))
    page.page.wait_for_selector(pictures)
    assert "epoch 2" in page.html(head) and "<img" in page.html(pictures)  # useful without a click

    before, x = page.html(head), page.page.evaluate("document.querySelector('.vireid .js-plotly-plot')._fullData[2].x[0]")
    page.page.locator(".vireid .noUi-handle").first.focus()
    page.page.keyboard.press("ArrowLeft")
    assert "epoch 1" in page.changes(head, before)
    page.page.wait_for_function(f"() => document.querySelector('.vireid .js-plotly-plot')._fullData[2].x[0] !== {x}")

    n = len(run.samples())
    page.lasso(0.02, 0.02, 0.98, 0.98)
    page.caught(pictures, f"=== {n}")  # everything
    page.lasso(0.1, 0.1, 0.5, 0.9)
    assert 0 < page.caught(pictures, f"< {n}") < n

    before = page.html(card)
    points = [page.point(2, i) for i in (0, 5)]
    for at in points:
        page.page.mouse.move(*at, steps=3)
        page.page.wait_for_timeout(400)
    assert "<img" in page.changes(card, before)
    assert page.complaints == []
    page.page.close()


def test_eps_by_slider(chromium, lab, run):
    config = "ClusterConfig(k1=10, k2=3, joint_k1=12, joint_k2=4, joint_eps=0.3)"
    cell = f"run = Run({str(run.path)!r})\ntune_clustering(run.features(2), run.samples().pid, {config})"
    imports = "from vireid_nb.artifacts import Run\nfrom vireid_nb.clustering import ClusterConfig\nfrom vireid_nb.widgets import tune_clustering"
    page = Page(chromium, lab, "eps", imports, cell)
    page.drawn(2)
    clusters = lambda: int(re.search(r"(\d+) clusters", page.html(".vireid b"))[1])
    first = clusters()
    handle = page.page.locator(".vireid .noUi-handle").first
    for _ in range(30):
        handle.focus()
        page.page.keyboard.press("ArrowRight")
    page.page.wait_for_function(f"() => !document.querySelector('.vireid b').innerText.startsWith('{first} ')")
    assert clusters() != first
    assert page.complaints == []
    page.page.close()


def test_every_layout_opens_quietly(chromium, lab, run):
    calls = ("inspect_matches(RUN)", "inspect_queries(RUN)", "compare_epochs(RUN, 0, 2)", "modality_gap_view(RUN)")
    page = Page(chromium, lab, "layouts", f"from vireid_nb.widgets import *\nRUN = {str(run.path)!r}", *calls)
    page.drawn(1 + 1 + 2 + 3)
    assert page.complaints == []
    page.page.close()
