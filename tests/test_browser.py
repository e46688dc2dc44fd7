"The views in a real JupyterLab, in a real browser, moved by a real mouse; on a slow line and a slow processor too."
import io
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
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
WAIT = int(os.environ.get("BROWSER_WAIT", 300_000))  # milliseconds; a busy two-core machine compiles for a long time
SHOTS = os.environ.get("BROWSER_SHOTS")  # a folder for pictures of every view; None = not kept
SIX = ("inspect_clusters(RUN)", "inspect_matches(RUN)", "inspect_queries(RUN)", "compare_epochs(RUN, 0, 2)", "modality_gap_view(RUN)", "tune_clustering(RUN)")
MAPS, POINTS = 7, "[...document.querySelectorAll('canvas[data-drawn]')]"  # maps of these six; all maps that have been drawn
HEAD, PICTURES, CARD = "h3 + .quiet", ".widget-html-content:has(> .strip)", ".widget-html-content:has(> .card)"  # parts of a layout
PARTS = ("h3", ".widget-dropdown", "canvas", ".widget-select, .vchart", ".strip, .vchart ~ .vchart ~ .vchart", ".widget-text:has(input[placeholder^='of a selection'])")  # what the numbers in the pictures stand at
DEAF = re.compile(r"\[anywidget\] Failed to initialize model")  # a script that came late; the maps do not need it in time


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab of its own over an empty folder: (address, folder)."
    if shutil.which("jupyter-lab", path=str(Path(sys.executable).parent)) is None:
        missing("jupyterlab is not installed")
    folder, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    for extension, name, values in (
        ("apputils-extension", "notification", {"checkForUpdates": False, "fetchNews": "false"}),
        ("notebook-extension", "tracker", {"windowingMode": "none"}),
        ("docmanager-extension", "plugin", {"autosave": False}),
    ):
        file = home / "settings/@jupyterlab" / extension / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"), "JUPYTER_RUNTIME_DIR": str(home / "runtime")}
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


@pytest.fixture(scope="module")
def run(sysu_root, tmp_path_factory):
    return made_up_run(sysu_root, tmp_path_factory.mktemp("looked-at") / "run")


def notebook(path, *cells):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, path)
    return path


class Page:
    "A notebook in the browser, with what the console complained of and what came over its web sockets."

    def __init__(self, chromium, lab, path, keep=False):  # keep: it is in the folder already
        self.address, folder = f"{lab[0]}/lab/tree/{path.name}", lab[1]
        if not keep:
            shutil.copy(path, folder)
        self.page = chromium.new_page(viewport={"width": 1400, "height": 1500})
        self.page.set_default_timeout(WAIT)
        self.complaints, self.received = [], 0
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("websocket", lambda socket: socket.on("framereceived", self.count))
        self.page.goto(f"{self.address}?reset", wait_until="domcontentloaded")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")

    def count(self, data):
        self.received += len(data)

    def menu(self, *names):
        for name in names[:-1]:
            self.page.get_by_role("menuitem", name=name, exact=True).click()
        self.page.get_by_role("menuitem", name=names[-1], exact=True).click()

    def run(self):
        "Run all cells; none may end in an error."
        self.page.get_by_text("| Idle").wait_for()  # a cell run before the kernel is there is forgotten
        self.menu("Run", "Run All Cells")
        done = "/^\\[\\d+\\]:$/.test([...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].pop().innerText)"
        self.page.wait_for_function(f"() => {done} || document.querySelector('[data-mime-type=\"application/vnd.jupyter.error\"]')")
        assert self.page.locator("[data-mime-type='application/vnd.jupyter.error']").all_inner_texts() == []
        return self

    def save(self):
        self.page.get_by_role("menuitem", name="File", exact=True).click()
        self.page.get_by_role("menuitem", name=re.compile("^Save Notebook")).first.click()
        self.page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')")

    def maps(self, n):
        "Wait until n maps are drawn with all their points: [[points, chosen, lines]]."
        self.page.wait_for_function(f"n => {POINTS}.filter(c => +c.dataset.drawn.split(' ')[0] > 0).length >= n", arg=n)
        return [[int(v) for v in text.split()] for text in self.page.evaluate(f"{POINTS}.map(c => c.dataset.drawn)")]

    def slow(self, kilobytes=None, times=1):  # kilobytes a second; times: how much slower a processor; the defaults are as fast as can be
        "Make the line and the processor slow; what is sent over web sockets is slowed by the processor alone."
        session = self.page.context.new_cdp_session(self.page)
        speed = kilobytes * 1024 if kilobytes else -1
        session.send("Network.enable")
        session.send("Network.emulateNetworkConditions", {"offline": False, "latency": 150 if kilobytes else 0, "downloadThroughput": speed, "uploadThroughput": speed})
        session.send("Emulation.setCPUThrottlingRate", {"rate": times})

    def close(self, allowed=()):
        "The page may not have complained."
        assert [c for c in self.complaints if not any(pattern.search(c) for pattern in allowed)] == []
        self.page.close()


class View:
    "The layout that stands i-th in a page, and what a hand and an eye do with it."

    def __init__(self, page, i):
        self.page, self.root = page.page, f"#view-{i}"
        self.page.wait_for_function("i => document.querySelectorAll('.widget-vbox.vireid').length > i", arg=i)
        self.page.evaluate("i => document.querySelectorAll('.widget-vbox.vireid')[i].id = `view-${i}`", i)
        self.page.wait_for_function(f"() => document.querySelector('{self.root} canvas[data-drawn]')")

    def map(self, expression, i=0):
        "A JavaScript expression about the i-th map, called m."
        find = "[...document.querySelectorAll(s + ' *')].filter(e => e.vireid)[i].vireid"
        return self.page.evaluate(f"([s, i]) => {{const m = {find}; return {expression}}}", [self.root, i])

    def drawn(self, i=0):
        "What the i-th map shows: points, chosen, lines."
        return [int(v) for v in self.page.locator(f"{self.root} canvas[data-drawn]").nth(i).get_attribute("data-drawn").split()]

    def html(self, selector):
        return self.page.eval_on_selector(f"{self.root} {selector}", "e => e.innerHTML")

    def changes(self, selector, before):
        "The HTML of an element once it differs from what it was."
        self.page.wait_for_function("([s, b]) => document.querySelector(s) && document.querySelector(s).innerHTML !== b", arg=[f"{self.root} {selector}", before])
        return self.html(selector)

    def caught(self, relation):
        "How many pictures the rows tell of, once that is in this relation to a number and the map says the same."
        total = f"[...(document.querySelector({json.dumps(f'{self.root} {PICTURES}')})?.innerText || '').matchAll(/(\\d+) (?:visible|infrared)/g)].reduce((n, m) => n + +m[1], 0)"
        self.page.wait_for_function(f"() => {total} {relation} && {total} === +document.querySelector('{self.root} canvas').dataset.drawn.split(' ')[1]")
        return self.page.evaluate(total)

    def slide(self, i, key, times=1):
        "Press an arrow key on the i-th slider."
        for _ in range(times):
            self.page.locator(f"{self.root} .noUi-handle").nth(i).focus()
            self.page.keyboard.press(key)

    def choose(self, label, words):
        "Choose from the drop-down with this label."
        self.page.locator(f"{self.root} .widget-dropdown", has=self.page.get_by_text(label, exact=True)).locator("select").select_option(label=words)

    def pick(self, place):
        "Choose a line of the list."
        self.page.locator(f"{self.root} .widget-select select").first.select_option(index=place)

    def point(self, row, i=0):
        "Where a sample lies on the screen."
        canvas = self.page.locator(f"{self.root} canvas").nth(i)
        canvas.scroll_into_view_if_needed()
        box, (x, y) = canvas.bounding_box(), self.map(f"m.place({row})", i)
        return box["x"] + x, box["y"] + y

    def lasso(self, left, top, right, bottom, key=None, i=0):
        "Drag a loop; the corners are shares of the map's width and height."
        canvas = self.page.locator(f"{self.root} canvas").nth(i)
        canvas.scroll_into_view_if_needed()
        box, mouse = canvas.bounding_box(), self.page.mouse
        at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])
        if key:
            self.page.keyboard.down(key)
        mouse.move(*at(left, top))
        mouse.down()
        for corner in ((right, top), (right, bottom), (left, bottom), (left, top + 0.01)):
            mouse.move(*at(*corner), steps=4)
        mouse.up()
        if key:
            self.page.keyboard.up(key)

    def shot(self, name):
        "Keep a picture of the view with numbers at its parts, at most 60 KB."
        if not SHOTS:
            return
        view = self.page.locator(self.root)
        view.scroll_into_view_if_needed()
        self.page.mouse.move(5, 5)
        self.page.wait_for_timeout(700)
        where = """([s, parts]) => {const v = document.querySelector(s), a = v.getBoundingClientRect();
            return parts.map(p => {const b = v.querySelector(p)?.getBoundingClientRect(); return b && b.width ? [b.left - a.left, b.top - a.top] : null})}"""
        places, picture = self.page.evaluate(where, [self.root, list(PARTS)]), Image.open(io.BytesIO(view.screenshot())).convert("RGB")
        pen = ImageDraw.Draw(picture)
        for number, place in enumerate(places, 1):
            if place:
                x, y = max(place[0] + 14, 14), max(place[1] + 14, 14)
                pen.ellipse([x - 13, y - 13, x + 13, y + 13], fill="#15181c", outline="white", width=2)
                pen.text((x, y), str(number), fill="white", font=ImageFont.load_default(18), anchor="mm")
        for width in (900, 800, 700, 620, 540, 460):  # smaller rather than with fewer colours: they mean something
            out, small = io.BytesIO(), picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
            small.quantize(96, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
            if len(out.getvalue()) <= 60 * 1024:
                break
        (Path(SHOTS) / f"view_{name}.png").write_bytes(out.getvalue())


def test_six_views_in_one_notebook(chromium, lab, run, tmp_path):
    "All drawn, by few bytes; a hand moves them; a page loaded again is alive; a notebook without a kernel shows pictures."
    setup = f"from vireid_nb.widgets import *\nRUN = {str(run.path)!r}"
    page = Page(chromium, lab, notebook(tmp_path / "six.ipynb", setup, *SIX)).run()
    n = len(run.samples())
    assert all(points == n for points, _, _ in page.maps(MAPS)) and len(page.maps(MAPS)) == MAPS
    assert page.received < 8e6
    views = dict(zip(("clusters", "matches", "queries", "compare", "gap", "tune"), (View(page, i) for i in range(6))))
    assert page.page.evaluate("[...document.querySelectorAll('.vireid-still, .jp-RenderedImage')].every(e => !e.offsetHeight)")  # hidden while the views live
    for name, view in views.items():
        view.shot(name)
    handled(views["clusters"], n)
    asked(views["matches"], views["queries"], views["tune"])
    linked(views["compare"])

    page.save()
    before, page.received = page.received, 0
    page.page.goto(page.address, wait_until="domcontentloaded")  # the kernel lives
    assert all(points == n for points, _, _ in page.maps(MAPS)) and page.received < 8e6
    again = View(page, 0)
    again.slide(0, "ArrowRight")
    again.lasso(0.01, 0.01, 0.99, 0.99)
    assert again.caught(f"=== {n}") == n
    print(f"six views: {before / 1e6:.2f} MB in a fresh kernel and a session's gestures, {page.received / 1e6:.2f} MB for the page loaded again")

    page.menu("Kernel", "Shut Down Kernel")
    page.page.get_by_text("No Kernel").first.wait_for()
    page.page.goto(page.address + "?reset", wait_until="domcontentloaded")
    page.page.wait_for_function("() => [...document.querySelectorAll('.jp-RenderedImage img')].filter(e => e.offsetHeight > 150).length === 6")
    assert page.page.evaluate("[...document.querySelectorAll('.vireid-still')].every(e => e.offsetHeight > 10)")
    page.page.wait_for_timeout(1500)
    assert page.page.evaluate("[...document.querySelectorAll('.jp-OutputArea-output')].filter(e => e.offsetHeight && /model not found/.test(e.innerText)).length") == 0
    page.close([DEAF, re.compile("model not found|Could not .*model|404|kernel", re.I)])


def handled(look, n):
    "Lasso, add, take away, list, epoch, hover, click, neighbours, keep."
    chosen, before = look.drawn()[1], look.html(HEAD)
    assert 0 < chosen < n and "<img" in look.html(PICTURES)  # useful without a click
    x = look.map("m.to[0]")
    look.slide(0, "ArrowLeft")
    assert "epoch 1" in look.changes(HEAD, before)
    look.page.wait_for_function(f"() => [...document.querySelectorAll('{look.root} *')].find(e => e.vireid).vireid.to[0] !== {x}")
    look.lasso(0.01, 0.01, 0.99, 0.99)
    assert look.caught(f"=== {n}") == n  # everybody
    look.pick(1)
    some = look.caught(f"< {n}")
    assert 0 < some < n and look.drawn()[1] == some  # after a lasso the map follows the list
    look.lasso(0.1, 0.1, 0.5, 0.9)
    left = look.caught(f"!== {some}")
    look.lasso(0.5, 0.1, 0.9, 0.9, "Shift")
    both = look.caught(f"> {left}")
    look.lasso(0.1, 0.1, 0.5, 0.9, "Alt")
    assert look.caught(f"=== {both - left}") == both - left  # added, then taken away
    tag = look.page.locator(f"{look.root} input[placeholder='of a selection or a view']")
    tag.fill("left <half>")
    tag.press("Tab")
    look.page.locator(f"{look.root} button", has_text="Tag selection").click()
    look.page.get_by_text(f"tagged {both - left} as left <half>").wait_for()
    before = look.html(CARD)
    for row in (0, 5):  # the mouse comes from elsewhere to the second point
        look.page.mouse.move(*look.point(row), steps=3)
        look.page.wait_for_timeout(300)
    assert "<img" in look.changes(CARD, before)
    look.choose("click", "shows neighbours")
    before = look.html(PICTURES)
    look.page.mouse.click(*look.point(5))
    assert re.findall(r"the (\d+) nearest (\w+) pictures in the features", look.changes(PICTURES, before)) == [("10", "visible"), ("10", "infrared")]
    look.choose("bring back", "tag: left <half>")
    assert look.caught(f"=== {both - left}")
    look.page.locator(f"{look.root} button", has_text="clear").click()
    look.page.wait_for_function(f"() => document.querySelector('{look.root} canvas').dataset.drawn.split(' ')[1] === '0'")


def asked(matches, queries, tune):
    "Lines between matches and to answers; another eps."
    assert matches.drawn()[2] > 0 and queries.drawn()[2] == 10
    clusters = lambda: int(re.search(r"(\d+) clusters", tune.html("h3 + div"))[1])
    first, before = clusters(), tune.html("h3 + div")
    tune.slide(0, "ArrowLeft", 12)
    tune.changes("h3 + div", before)
    tune.page.get_by_text("--cluster.joint-eps").first.wait_for()
    tune.page.wait_for_function(f"() => !document.querySelector('{tune.root} h3 + div').innerText.startsWith('{first} ')")
    tune.page.mouse.click(*tune.point(0))
    assert tune.caught("> 0") > 0


def linked(compare):
    "Two panes zoom as one, and ring the same sample."
    page = compare.page
    page.mouse.move(*compare.point(3))
    page.mouse.wheel(0, -300)
    page.wait_for_function(f"() => [...document.querySelectorAll('{compare.root} *')].filter(e => e.vireid).every(e => e.vireid.view.k > 1.2)")
    left, right = (compare.map("[m.view.k, m.view.x, m.view.y, m.ringed]", i) for i in (0, 1))
    assert left == right


def test_slow_line_and_processor(chromium, lab, run, tmp_path):
    "Six views at once, loaded again, on a processor twenty times slower behind a slow line; and ten maps in one notebook."
    setup = f"from vireid_nb.widgets import *\nRUN = {str(run.path)!r}"
    page, n = Page(chromium, lab, notebook(tmp_path / "slow.ipynb", setup, *SIX, "[inspect_clusters(RUN) for _ in range(3)][-1]")), len(run.samples())
    page.slow(times=6)
    page.run()
    begun = time.monotonic()
    assert all(points == n for points, _, _ in page.maps(MAPS + 1))
    first = time.monotonic() - begun
    page.slow(kilobytes=500, times=20)
    page.save()
    page.complaints.clear()
    begun = time.monotonic()
    page.page.goto(page.address, wait_until="domcontentloaded")
    assert all(points == n for points, _, _ in page.maps(MAPS + 1))
    second, late = time.monotonic() - begun, sum(bool(DEAF.search(c)) for c in page.complaints)
    page.slow(times=4)
    last = View(page, 6)
    last.lasso(0.01, 0.01, 0.99, 0.99)
    assert last.caught(f"=== {n}") == n
    last.pick(2)
    assert 0 < last.caught(f"< {n}") < n  # a map whose script came too late for anywidget hears and speaks all the same
    last.slide(0, "ArrowLeft")
    last.page.wait_for_function(f"() => /epoch 1/.test(document.querySelector('{last.root} {HEAD}').innerText)")
    print(f"slow: drawn {first:.1f} s after the last cell (6 times slower), {second:.1f} s after loading again (20 times slower, 500 KB/s); {late} scripts too late for anywidget, all maps alive")
    page.close([DEAF])


def test_the_tutorial(chromium, lab):
    "Reading a bad run, by hand: its three live cells, in the state in which 'Run All Cells' leaves them."
    page = Page(chromium, lab, ROOT / "nbs/97_tutorial_bad_run.ipynb").run()
    live = page.page.locator(".vireid-monitor")
    live.first.wait_for()
    assert [live.locator("svg").nth(i).get_attribute("aria-label") for i in range(3)] == ["losses", "clusters", "ARI"]
    assert live.locator("svg").nth(1).locator("path").count() == 3 and "nan" not in live.first.inner_html().lower()
    look, tune = View(page, 0), View(page, 1)
    assert "epoch 2" in look.html(HEAD) and look.drawn()[1] > 0
    clusters = lambda: int(re.search(r"(\d+) clusters", tune.html("h3 + div"))[1])
    first = clusters()
    tune.slide(0, "ArrowLeft", 30)
    tune.page.wait_for_function(f"() => !document.querySelector('{tune.root} h3 + div').innerText.startsWith('{first} ')")
    assert clusters() > first  # eps was too large
    page.close([DEAF])
