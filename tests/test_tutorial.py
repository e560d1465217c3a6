"""The tutorial: its cells run, and it is committed as it was written, without what one run of it gave."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = Path(__file__).parents[1] / "shared" / "tutorial.ipynb"
# Of any system, at the beginning of a word.
ABSOLUTE = re.compile(r"""(?:^|[\s"'`(=,])(?:~?/\w|~\\|[A-Za-z]:[\\/])""", re.MULTILINE)


def tutorial() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder where a notebook may be started, at small size; its temporary files go beside it."""
    for name in ("started", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("LENS_LDM_TUTORIAL", "small")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return tmp_path / "started"


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()


def test_it_is_committed_without_outputs():
    notebook = tutorial()
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        assert cell.metadata == {}
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert not ABSOLUTE.search(cell.source), cell.source


@pytest.mark.parametrize(
    ("text", "absolute"),
    [
        ('np.load("/home/me/x.npy")', True),
        ("lens_ldm('fit ~/x.npz')", True),
        ("--out=/tmp/x", True),
        ('Path(r"C:\\lenses")', True),
        ("\n/content/x", True),
        ("configs/stage1, 5 / 2, 15×15, owner/name, https://example.org", False),
        ("half // 4; r'\\n'; a: /", False),
    ],
)
def test_an_absolute_path_would_be_seen(text: str, absolute: bool):
    assert bool(ABSOLUTE.search(text)) is absolute


@pytest.mark.slow
def test_every_cell_runs_and_writes_to_a_temporary_folder_alone(started: Path):
    notebook = tutorial()
    execute(notebook, started)
    pictures = sum("image/png" in o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", []))
    assert pictures == 12
    assert not list(started.iterdir())
    assert list((started.parent / "temporary").glob("lens-ldm-*/evaluation/metrics.json"))


@pytest.mark.slow
def test_a_command_that_fails_stops_it(started: Path):
    """In IPython the exit of a command is no exception like others."""
    notebook = tutorial()
    sizes = next(cell for cell in notebook.cells if cell.id == "sizes")
    notebook.cells = [sizes, nbformat.v4.new_code_cell('lens_ldm("simulate --preset deeplens --count 2 --out data")')]
    with pytest.raises(CellExecutionError, match="did you mean 'deeplense'"):
        execute(notebook, started)
