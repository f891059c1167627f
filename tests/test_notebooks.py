"""The notebooks of docs/notebooks: every cell runs, in order, in one namespace."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs/notebooks").glob("*.ipynb"))


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["comparison", "first_look"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path, monkeypatch, tmp_path, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], f"cell {number} holds outputs; clear them"
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), namespace)
    pyplot.close("all")
    said = capsys.readouterr().out
    assert ("success after" in said) if path.stem == "first_look" else ("by AGRA alone" in said)
