"How a notebook reads and what a module may import; everything here only reads files. Each failure says where, and what to do."
import ast
import base64
import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(p for p in (ROOT / "vireid_nb").glob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
FUNCTION_LINES, CLASS_LINES, HIDDEN_SHARE = 40, 100, 0.20
NOTEBOOK_BYTES, OUTPUT_BYTES, PNG_BYTES = 300_000, 200_000, 60 * 1024
UNFINISHED = "|".join(["TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error"])
MACHINE_PATH = "|".join(rf"(?<![\w.]){start}" for start in ("/work/", "/root/", "/home/", "/tmp/", "/Users/", r"[A-Z]:\\\\Users"))
# names that exported code must not use, and why
FORBIDDEN = {
    r"(pickle|joblib)\.(load|dump|Unpickler|Pickler).*": "nothing is pickled: use safetensors or json",
    r"((np|numpy)\.)?random\.seed": "no global randomness: use records.seeded",
    r"torch\.manual_seed": "no global randomness: use records.seeded_torch",
    r"(?!torch\.).+\.cuda": "take or infer a device",
    r"patch": "write a class or a function",
}
DEV_ONLY = {"nbdev", "fastcore", "execnb", "matplotlib", "IPython", "pytest", "hypothesis"}


@cache
def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def code_cells(path):
    return [(i, source(c)) for i, c in enumerate(load(path)["cells"]) if c["cell_type"] == "code"]


def has(src, directive):
    return re.search(rf"^#\|\s*{directive}\b", src, re.M) is not None


def exported(path):
    return [(i, s) for i, s in code_cells(path) if has(s, "export[si]?")]


def statements(src):
    "The cell's statements; lines of IPython's own syntax are left out."
    return ast.parse(re.sub(r"^\s*[%!].*$", "", src, flags=re.M)).body


def is_import(node):
    return isinstance(node, (ast.Import, ast.ImportFrom))


def dotted(node):
    "`a.b.c` of an attribute access or a name, else ''."
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imported(tree):
    "Full names of all modules imported anywhere in `tree`; a relative import counts as from vireid_nb."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(p for p in ("vireid_nb" if node.level else "", node.module or "") if p)
            yield from ([f"{base}.{a.name}" for a in node.names] if base == "vireid_nb" else [base])


def module_of(path):
    found = [m[1] for _, s in code_cells(path) if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", s, re.M))]
    return found[0] if found else None


def public_names(path):
    lists = [n.value for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.Assign) and dotted(n.targets[0]) == "__all__"]
    return set(ast.literal_eval(lists[0]))


def texts(path):
    "What a person wrote or reads in the notebook: sources and textual results, without the pictures."
    for i, cell in enumerate(load(path)["cells"]):
        yield i, source(cell)
        for output in cell.get("outputs", ()):
            shown = [v for k, v in output.get("data", {}).items() if k.startswith("text")] + [output.get("text", "")]
            yield from ((i, "".join(v)) for v in shown)


def none_of(problems):
    problems = list(problems)
    assert not problems, "\n" + "\n".join(problems)


def own_lines(node):
    return node.end_lineno - min([node.lineno, *(d.lineno for d in node.decorator_list)]) + 1


def too_long(src):
    "Functions and classes of a cell beyond their lengths, and cells of several that ought to be several cells."
    defined = [n for n in ast.walk(ast.parse(src)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    for node in defined:
        most = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
        if own_lines(node) > most:
            yield f"{node.name} has {own_lines(node)} lines, {most} at most; what is the second idea in it?"
    most = CLASS_LINES if any(isinstance(n, ast.ClassDef) for n in defined) else FUNCTION_LINES
    if defined and len(src.splitlines()) > most + 2:  # the directive and a line of air
        yield f"{len(src.splitlines())} exported lines, {most} at most; split the cell"


NUMBER = {module_of(p): p.name[:2] for p in NOTEBOOKS if module_of(p)}
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
exporting_notebook = pytest.mark.parametrize("path", [p for p in NOTEBOOKS if module_of(p)], ids=lambda p: p.stem)
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)


def test_each_notebook_has_its_module_and_each_module_its_notebook():
    assert {m: f"{n}_{m.lstrip('_')}" for m, n in NUMBER.items()} == {module_of(p): p.stem for p in NOTEBOOKS if module_of(p)}, "name the notebook NN_module; a module of inner workings is _module"
    assert set(NUMBER) == {p.stem for p in MODULES}, "run 'make prepare', or delete the module that has no notebook"
    assert len(set(NUMBER.values())) == len(NUMBER), "two notebooks carry one number"


@every_module
def test_module_is_generated(path):
    header = f"# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/{NUMBER[path.stem]}_{path.stem.lstrip('_')}.ipynb."
    assert header in path.read_text(encoding="utf-8"), "run 'make prepare'"


@every_module
def test_module_imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set(imported(tree))
    allowed = ({"IPython"} if "ipywidgets" in names else set()) | ({"matplotlib"} if path.stem == "show" else set())  # ipywidgets brings IPython; show draws for notebooks and is imported by them alone
    none_of(f"{path.name} imports {n}: that is a development tool, keep it to lessons" for n in names if n.split(".")[0] in DEV_ONLY - allowed)
    at_import = set(imported(ast.Module([n for n in tree.body if is_import(n)], [])))
    none_of(f"{path.name} imports {n} before it is needed" for n in at_import if n.split(".")[0] in DEV_ONLY - {"IPython"})
    none_of(f"{path.name} imports show: that is for notebooks" for n in names if n == "vireid_nb.show")
    none_of(f"{path.name} imports accelerate: only engine does" for n in names if n.split(".")[0] == "accelerate" and path.stem != "engine")
    none_of(f"{path.name}: import explicit names, not *" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*")


@every_module
def test_module_uses_nothing_forbidden(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = dotted(node)
        reason = next((why for pattern, why in FORBIDDEN.items() if re.fullmatch(pattern, name)), None)
        assert not reason, f"{path.name}:{node.lineno}: {name}: {reason}"
        if isinstance(node, ast.Call) and dotted(node.func) == "torch.load":
            safe = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
            assert safe, f"{path.name}:{node.lineno}: torch.load unpickles anything without weights_only=True"


@every_module
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
    none_of(f"{path.name}:{n.lineno}: {n.name} has no docstring" for n in public if not ast.get_docstring(n))


@every_notebook
def test_imports_point_to_lower_numbers(path):
    own = module_of(path)
    for i, src in code_cells(path):
        body = statements(src)
        for name in imported(ast.Module(body, [])):
            top, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if top != "vireid_nb" or not other or other == own:
                continue
            assert other in NUMBER, f"{path.name} cell {i}: vireid_nb.{other} is made by no notebook"
            lower = path.name[:2] > NUMBER[other] or path.stem == "index"
            assert lower, f"{path.name} cell {i}: imports {other} ({NUMBER[other]}); imports point to lower numbers only"


@every_notebook
def test_import_only_cells(path):
    for i, src in code_cells(path):
        kinds = {is_import(n) for n in statements(src)}
        assert len(kinds) < 2 or "nbdev_export()" in src, f"{path.name} cell {i}: imports and code share a cell; give the imports their own"


@exporting_notebook
def test_first_and_last_cells(path):
    cells = load(path)["cells"]
    where = path.name
    assert re.fullmatch(r"#\|\s*default_exp \w+\s*", source(cells[0])), f"{where}: the first cell is '#| default_exp name' alone"
    assert cells[1]["cell_type"] == "markdown", f"{where}: the second cell holds the title"
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+\n?", source(cells[1])), f"{where}: the second cell is '# Title', an empty line, '> one line'"
    assert has(source(cells[-1]), "hide") and "nbdev.nbdev_export()" in source(cells[-1]), f"{where}: the last cell is hidden and exports"


@exporting_notebook
def test_shape(path):
    cells, exports = load(path)["cells"], exported(path)
    none_of(f"{path.name} cell {i}: {what}" for i, s in exports for what in too_long(s))
    hidden = sum(has(s, r"(hide|include:\s*false)") for _, s in code_cells(path))
    assert hidden <= HIDDEN_SHARE * len(cells), f"{path.name}: {hidden} of {len(cells)} cells are hidden, {HIDDEN_SHARE:.0%} at most; show them"
    prose = sum(c["cell_type"] == "markdown" for c in cells)
    assert prose >= len(exports), f"{path.name}: {prose} markdown cells for {len(exports)} exported ones; say why each is there"


def test_what_is_too_long():
    lines = lambda n: "".join(f"    x = {i}\n" for i in range(n))
    assert not list(too_long("def f():\n" + lines(39))) and [x[:12] for x in too_long("def f():\n" + lines(45))] == ["f has 46 lin", "46 exported "]
    method = "class A:\n" + "".join(f"    def m{i}(self):\n        return {i}\n" for i in range(30))
    assert not list(too_long(method)) and not list(too_long("import os\n" * 60))
    assert [x[:9] for x in too_long(method + method.replace("A", "B"))] == ["122 expor"]


@exporting_notebook
def test_lessons(path):
    defining = [i for i, s in exported(path) if not all(map(is_import, statements(s)))]
    lessons = [(i, s) for i, s in code_cells(path) if not has(s, "(export[si]?|hide|default_exp)")]
    proving = [i for i, s in lessons if re.search(r"^\s*(assert\b|test_\w+\()", s, re.M)]
    enough = 2 * len(proving) >= len(defining)
    assert enough, f"{path.name}: {len(proving)} lessons assert something, for {len(defining)} exported cells; one for every two is needed"
    for i, src in lessons:
        last = statements(src)[-1:]
        shows = not last or not (isinstance(last[0], ast.Assert) or (isinstance(last[0], ast.Expr) and dotted(getattr(last[0].value, "func", None)) == "print"))
        assert shows, f"{path.name} cell {i}: a lesson ends with something worth seeing, not with an assert or a print"


@every_notebook
def test_format(path):
    nb = load(path)
    assert (nb["nbformat"], nb["nbformat_minor"]) >= (4, 5), f"{path.name}: save it as nbformat 4.5"
    ids = [c.get("id") for c in nb["cells"]]
    assert None not in ids and len(set(ids)) == len(ids), f"{path.name}: each cell needs an id of its own"
    assert "widgets" not in nb["metadata"], f"{path.name}: holds widget state; switch off saving it in JupyterLab and run 'make prepare'"


@every_notebook
def test_outputs(path):
    assert (size := path.stat().st_size) <= NOTEBOOK_BYTES, f"{path.name}: {size} bytes, {NOTEBOOK_BYTES} at most"
    for i, cell in enumerate(load(path)["cells"]):
        for output in cell.get("outputs", ()):
            where, data = f"{path.name} cell {i}", output.get("data", {})
            assert output["output_type"] != "error", f"{where}: ends in an error; run the notebook"
            assert (size := len(json.dumps(output))) <= OUTPUT_BYTES, f"{where}: an output of {size} bytes, {OUTPUT_BYTES} at most"
            assert not any("widget" in mime for mime in data), f"{where}: a live widget; show a static picture of it"
            png = len(base64.b64decode("".join(data.get("image/png", ""))))
            assert png <= PNG_BYTES, f"{where}: a PNG of {png} bytes, {PNG_BYTES} at most; smaller figsize or dpi"
            text = "".join(output.get("text", ""))
            assert not re.search(r"\r|\d+%\|", text), f"{where}: a progress bar was saved; run it with TQDM_DISABLE=1"


@every_notebook
def test_notebook_is_finished_and_tells_nothing_of_the_machine(path):
    none_of(f"{path.name} cell {i}: {m[0]!r}" for i, text in texts(path) for m in re.finditer(f"{UNFINISHED}|{MACHINE_PATH}", text))


def test_other_files_are_finished_and_tell_nothing_of_the_machine():
    names = ["README.md", "data/README.md", "Makefile", "settings.ini", "setup.py", ".ci/run"]
    files = [p for n in names if (p := ROOT / n).exists()] + MODULES + sorted((ROOT / "tests").glob("*.py"))
    for path in files:
        found = re.findall(f"{UNFINISHED}|{MACHINE_PATH}", path.read_text(encoding="utf-8")) if path != Path(__file__).resolve() else []
        assert not found, f"{path.relative_to(ROOT)}: {found}"


def test_index_names_every_notebook_and_its_symbols():
    text = "\n".join(source(c) for c in load(ROOT / "nbs/index.ipynb")["cells"])
    rows = re.findall(r"^\|.*\[(\d\d_\w+)\]\(\1\.ipynb\) \|(.*)\|$", text, re.M)
    assert [stem for stem, _ in rows] == [p.stem for p in NOTEBOOKS if p.stem != "index"], "bring the table of nbs/index.ipynb up to date"
    for stem, symbols in rows:
        module = ROOT / f"vireid_nb/{stem[3:]}.py"  # tutorials export nothing
        missing = {n for n in re.findall(r"`(\w+)`", symbols)} - (public_names(module) if module.exists() else set()) - {"vireid"}
        assert not missing, f"the table of nbs/index.ipynb: {stem} exports no {missing}"


@pytest.mark.parametrize("name", ["README.md", "data/README.md"])
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [m[1] for m in re.finditer(r"\]\((?![a-z]+:|#)([^)#\s]+)", text)] + re.findall(r'src="(?![a-z]+:)([^"]+)"', text)
    none_of(f"{name}: {link} is not there" for link in links if not ((ROOT / name).parent / link).exists())
