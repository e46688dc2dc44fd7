"The widgets in a real JupyterLab, in a real browser, moved by a real mouse."
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
from browser import missing
from looking import made_up_run

ROOT = Path(__file__).resolve().parent.parent
WAIT = int(os.environ.get("BROWSER_WAIT", 120_000))  # milliseconds; a busy two-core machine compiles for a long time


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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
    env["IN_TEST"] = "1"  # as under nbdev_test: a notebook's last cell exports nothing
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


HEAD, PICTURES, CARD = "h3 + .quiet", ".widget-html-content:has(> .strip)", ".widget-html-content:has(> .card)"  # parts of a layout


@pytest.fixture(scope="module")
def run(sysu_root, tmp_path_factory):
    return made_up_run(sysu_root, tmp_path_factory.mktemp("looked-at") / "run")


class Page:
    "A notebook in the browser, all its cells run, with what the console complained of."

    def __init__(self, chromium, lab, notebook):
        address, folder = lab
        shutil.copy(notebook, folder)
        self.page = chromium.new_page(viewport={"width": 1400, "height": 1500})
        self.page.set_default_timeout(WAIT)
        self.complaints = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.goto(f"{address}/lab/tree/{notebook.name}?reset", wait_until="domcontentloaded")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        self.page.get_by_text("| Idle").wait_for()  # a cell run before the kernel is there is forgotten
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    def has_run(self):
        "Wait for the last cell; no cell may have ended in an error."
        done = "/^\\[\\d+\\]:$/.test([...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].pop().innerText)"
        self.page.wait_for_function(f"() => {done} || document.querySelector('[data-mime-type=\"application/vnd.jupyter.error\"]')")
        assert self.page.locator("[data-mime-type='application/vnd.jupyter.error']").all_inner_texts() == []

    def close(self):
        "The page may not have complained."
        assert self.complaints == []
        self.page.close()


class View:
    "The layout that stands i-th in a page, and what a hand and an eye do with it."

    def __init__(self, page, i, figures=1):
        self.page, self.root = page.page, f"#view-{i}"
        self.page.wait_for_function("i => document.querySelectorAll('.widget-vbox.vireid').length > i", arg=i)
        self.page.evaluate("i => document.querySelectorAll('.widget-vbox.vireid')[i].id = `view-${i}`", i)
        self.drawn(figures)

    def drawn(self, n):
        "Wait until n figures hold data."
        self.page.wait_for_function(f"() => [...document.querySelectorAll('{self.root} .js-plotly-plot')].filter(g => g._fullData && g._fullData.some(t => t.x && t.x.length)).length >= {n}")

    def figure(self, expression, i=0):
        "A JavaScript expression about figure g."
        return self.page.evaluate(f"([s, i]) => {{const g = document.querySelectorAll(s)[i]; return {expression}}}", [f"{self.root} .js-plotly-plot", i])

    def html(self, selector):
        return self.page.eval_on_selector(f"{self.root} {selector}", "e => e.innerHTML")

    def changes(self, selector, before):
        "The HTML of an element once it differs from what it was."
        self.page.wait_for_function("([s, b]) => document.querySelector(s) && document.querySelector(s).innerHTML !== b", arg=[f"{self.root} {selector}", before])
        return self.html(selector)

    def caught(self, relation):
        "How many pictures the rows tell of, once that is in this relation to a number."
        total = f"[...(document.querySelector({json.dumps(f'{self.root} {PICTURES}')})?.innerText || '').matchAll(/(\\d+) (?:visible|infrared)/g)].reduce((n, m) => n + +m[1], 0)"
        self.page.wait_for_function(f"() => {total} {relation}")
        return self.page.evaluate(total)

    def slide(self, i, key, times=1):
        "Press an arrow key on the i-th slider."
        for _ in range(times):
            self.page.locator(f"{self.root} .noUi-handle").nth(i).focus()
            self.page.keyboard.press(key)

    def choose(self, label, words):
        "Choose from the drop-down with this label."
        self.page.locator(f"{self.root} .widget-dropdown", has=self.page.get_by_text(label, exact=True)).locator("select").select_option(label=words)

    def point(self, trace, i):
        "Where point i of a trace of the first figure lies on the screen."
        self.page.locator(f"{self.root} .js-plotly-plot").first.scroll_into_view_if_needed()
        where = "(() => {const l = g._fullLayout, d = g._fullData[%d], r = g.getBoundingClientRect(); return [r.left + l._size.l + l.xaxis.d2p(d.x[%d]), r.top + l._size.t + l.yaxis.d2p(d.y[%d])]})()"
        return self.figure(where % (trace, i, i))

    def lasso(self, left, top, right, bottom):
        "Drag a loop; the corners are shares of the first figure's width and height."
        area = self.page.locator(f"{self.root} .js-plotly-plot .nsewdrag").first
        area.scroll_into_view_if_needed()
        box, mouse = area.bounding_box(), self.page.mouse
        at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])
        mouse.move(*at(left, top))
        mouse.down()
        for corner in ((right, top), (right, bottom), (left, bottom), (left, top + 0.01)):
            mouse.move(*at(*corner), steps=8)
        mouse.up()


def test_the_tutorial(chromium, lab):
    "Reading a bad run, by hand: its three live cells, in the state in which 'Run All Cells' leaves them."
    page = Page(chromium, lab, ROOT / "nbs/97_tutorial_bad_run.ipynb")
    page.has_run()
    live, look, tune = View(page, 0), View(page, 1), View(page, 2, figures=2)

    points = {tuple(t) for t in live.figure("g._fullData.map(t => [t.meta, t.name, t.x.length])")}
    assert points >= {(chart, part, 3) for chart in (2, 3) for part in ("visible", "infrared", "joint")}  # before, and after each epoch
    assert {name: n for chart, name, n in points if chart == 1} == {"visible": 8, "infrared": 8, "joint_visible": 4, "joint_infrared": 4}  # epochs of four steps, two kinds in the second

    assert "epoch 2" in look.html(HEAD) and "<img" in look.html(PICTURES)  # useful without a click
    before, x = look.html(HEAD), look.figure("g._fullData[2].x[0]")
    look.slide(0, "ArrowLeft")
    assert "epoch 1" in look.changes(HEAD, before)
    look.page.wait_for_function(f"() => document.querySelector('{look.root} .js-plotly-plot')._fullData[2].x[0] !== {x}")

    look.lasso(0.01, 0.01, 0.99, 0.99)
    n = look.caught("> 300")
    assert n == look.figure("g._fullData.reduce((n, t) => n + t.x.length, 0)")  # everybody
    before = look.html(PICTURES)
    look.lasso(0.1, 0.1, 0.5, 0.9)
    assert 0 < look.caught(f"< {n}") < n and look.html(PICTURES) != before
    some = look.caught("> 0")

    tag = look.page.locator(f"{look.root} input[placeholder='of a selection or a view']")
    tag.fill("left <half>")
    tag.press("Tab")
    look.page.locator(f"{look.root} button", has_text="Tag selection").click()
    look.page.get_by_text(f"tagged {some} as left <half>").wait_for()

    before = look.html(CARD)
    for i in (0, 5):  # the mouse comes from elsewhere to the second point
        look.page.mouse.move(*look.point(2, i), steps=3)
        look.page.wait_for_timeout(400)
    assert "<img" in look.changes(CARD, before)

    look.choose("click", "shows neighbours")
    before = look.html(PICTURES)
    look.page.mouse.click(*look.point(2, 5))
    assert re.findall(r"the (\d+) nearest (\w+) pictures in the features", look.changes(PICTURES, before)) == [("10", "visible"), ("10", "infrared")]
    look.choose("bring back", "tag: left <half>")
    assert look.caught(f"=== {some}") == some

    clusters = lambda: int(re.search(r"(\d+) clusters", tune.html("b"))[1])
    first = clusters()
    tune.slide(0, "ArrowLeft", 30)
    tune.page.wait_for_function(f"() => !document.querySelector('{tune.root} b').innerText.startsWith('{first} ')")
    assert clusters() > first  # eps was too large
    page.close()


def test_the_other_layouts(chromium, lab, run, tmp_path):
    "Each opens quietly; two panes zoom as one."
    calls = ("inspect_matches(RUN)", "inspect_queries(RUN)", "compare_epochs(RUN, 0, 2)", "modality_gap_view(RUN)")
    cells = [f"from vireid_nb.widgets import *\nRUN = {str(run.path)!r}", *calls]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, tmp_path / "layouts.ipynb")
    page = Page(chromium, lab, tmp_path / "layouts.ipynb")
    page.has_run()
    views = [View(page, i, figures) for i, figures in enumerate((1, 1, 2, 3))]
    span = "g._fullLayout.xaxis.range[1] - g._fullLayout.xaxis.range[0]"
    before = [views[2].figure(span, i) for i in (0, 1)]
    assert before[0] == pytest.approx(before[1])
    page.page.mouse.move(*views[2].point(2, 0))
    page.page.mouse.wheel(0, -300)
    page.page.wait_for_function(f"([s, b]) => [...document.querySelectorAll(s)].every(g => {span} < 0.95 * b)", arg=[f"{views[2].root} .js-plotly-plot", before[0]])
    left, right = (views[2].figure("[...g._fullLayout.xaxis.range, ...g._fullLayout.yaxis.range]", i) for i in (0, 1))
    assert left == pytest.approx(right)
    page.close()
