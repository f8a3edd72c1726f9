"""The notebook of the documentation, run as a reader runs it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = Path(__file__).parents[2] / "docs" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each cell of code printed."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as environment, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the notebook's machinery
        environment.setenv("HF_HUB_OFFLINE", "1")
        environment.setenv("OMP_NUM_THREADS", "1")
        nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    assert (folder / "runs" / "quickstart-model" / "README.md").is_file()
    return [printed(cell) for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    return "".join(out["text"] for out in cell.outputs if out.get("name") == "stdout")


def test_the_reward_of_the_quickstart_rises_and_so_does_that_of_its_judge(executed: list[str]) -> None:
    rounds = next(text for text in executed if "after round" in text)
    rewards = [float(number) for number in re.findall(r"reward +(-?[\d.]+)", rounds)]
    judged = [float(number) for number in re.findall(r"judge (-?[\d.]+)", rounds)]
    assert len(rewards) == len(judged) == 4
    assert rewards[-1] > rewards[0] + 0.2
    assert judged[-1] > judged[0]


def test_the_same_cell_again_gives_the_same_best_round(executed: list[str]) -> None:
    assert executed[-2].strip() == "True"


def test_the_saved_model_is_one_of_plain_transformers(executed: list[str]) -> None:
    assert executed[-1].strip() == "LlamaForCausalLM"
