"The script that makes modules and README.md from the notebooks, and tells when they are not what it would make."
import shutil

import nbformat
import pytest
import tree
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output


@pytest.fixture
def project(tmp_path):
    "Two notebooks: one exports a module, the other is the index."
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(tree.ROOT / name, tmp_path / name)
    (tmp_path / "nbs").mkdir()
    (tmp_path / "vireid_nb").mkdir()
    shown = [new_output("execute_result", {"text/plain": "   ari\nx    1", "text/html": "<b>never</b>"}, execution_count=3)]
    link = "# Name\n\n[one](00_one.ipynb), [data](../data/README.md#top), [part](#part), [away](https://example.org/a), ![picture](images/a.png)"
    cells = {
        "00_one": [new_code_cell("#| default_exp one"), new_markdown_cell("# One\n\n> A line"), new_code_cell("#| export\ndef one():\n    return 1")],
        "index": [new_markdown_cell(link), new_code_cell("#| hide\nsecret = 1"), new_code_cell("one()", outputs=shown, execution_count=3)],
    }
    for name, parts in cells.items():
        nbformat.write(new_notebook(cells=parts), tmp_path / f"nbs/{name}.ipynb")
    tree.make(tmp_path)
    return tmp_path


def test_readme(project):
    text = (project / "README.md").read_text()
    for part in ("[one](nbs/00_one.ipynb)", "[data](data/README.md#top)", "[part](#part)", "[away](https://example.org/a)", "](nbs/images/a.png)"):
        assert part in text
    assert "```python\none()\n```" in text and "    x    1" in text
    assert "secret" not in text and "never" not in text


def test_makes_the_same_again_and_names_what_differs(project):
    assert tree.differing(project) == []
    (project / "vireid_nb/one.py").write_text("def one():\n    return 2\n")
    (project / "vireid_nb/stray.py").write_text("")
    notebook = project / "nbs/00_one.ipynb"
    notebook.write_text(notebook.read_text().replace('"execution_count": null', '"execution_count": 7'))
    before = {p: p.read_bytes() for p in project.rglob("*") if p.is_file()}
    assert [line.split(":")[0] for line in tree.differing(project)] == ["vireid_nb/stray.py", "nbs/00_one.ipynb", "vireid_nb/one.py"]
    assert before == {p: p.read_bytes() for p in project.rglob("*") if p.is_file()}  # judged in a copy
