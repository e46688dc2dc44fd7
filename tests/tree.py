"""Everything that is made from the notebooks: their clean form, the modules, README.md.

    python tests/tree.py            makes it (`make prepare`)
    python tests/tree.py --check    makes it in a temporary copy and names each file that differs; changes nothing
"""
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE = ("nbs/*.ipynb", "vireid_nb/*.py", "README.md", "pyproject.toml")
NOTE = "<!-- Made from nbs/index.ipynb by `make prepare`: edit that notebook, not this file. -->\n\n"


def result_alone(cell):
    "A code cell as the Markdown that it displays: what its table says, not how it was made."
    from nbformat.v4 import new_markdown_cell

    return new_markdown_cell("\n\n".join(o["data"]["text/markdown"] for o in cell.outputs if "text/markdown" in o.get("data", ())))


def readme(index: Path) -> str:
    "index.ipynb as Markdown: hidden cells left out, links that start in nbs/ made to start at the root, results as plain text."
    import nbformat
    from nbconvert import MarkdownExporter

    nb = nbformat.read(index, 4)
    nb.metadata["language_info"] = {"name": "python"}  # what code blocks are marked as; nbdev_clean strips it
    nb.cells = [c for c in nb.cells if not re.match(r"#\|\s*(hide|export|default_exp)", c.source)]
    nb.cells = [result_alone(c) if re.match(r"#\|\s*echo:\s*false", c.source) else c for c in nb.cells]
    from_root = lambda m: m[1] + posixpath.normpath(posixpath.join("nbs", m[2]))
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"(\]\(|src=\")(?![a-z]+:|#)([^)\"]+)", from_root, cell.source)
        for output in cell.get("outputs", ()):
            for mime in set(output.get("data", ())) - {"text/plain"}:
                del output["data"][mime]  # a figure would need a file of its own: show it in a markdown cell
    text, _ = MarkdownExporter().from_notebook_node(nb)
    return NOTE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def make(root: Path) -> None:
    "Clean the notebooks of `root`, export its modules, write its README.md."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # under IN_TEST nbdev_export does nothing
    for tool in ("nbdev_clean", "nbdev_export"):
        subprocess.run([Path(sys.executable).with_name(tool)], cwd=root, env=env, check=True)
    (root / "README.md").write_text(readme(root / "nbs/index.ipynb"), encoding="utf-8")


def differing(root: Path) -> list:
    "Which files of `root` are not as its notebooks make them, with the reason; judged in a copy, so edits not committed are kept."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)
        (copy / "vireid_nb").mkdir()  # starts with __init__.py alone: a module without a notebook shows
        (copy / "nbs").mkdir()
        for path in [*root.glob("nbs/*.ipynb"), root / "settings.ini", root / "pyproject.toml", root / "vireid_nb/__init__.py"]:
            shutil.copy(path, copy / path.relative_to(root))
        make(copy)
        have, made = ({p.relative_to(r).as_posix(): p.read_bytes() for g in MADE for p in r.glob(g)} for r in (root, copy))
    stray = [f"{name}: no notebook makes it; delete it" for name in sorted(have.keys() - made.keys())]
    return stray + [f"{name}: not what the notebooks make" for name in sorted(made) if have.get(name) != made[name]]


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        make(ROOT)
    elif found := differing(ROOT):
        sys.exit("\n".join([*found, "repair: make prepare"]))
