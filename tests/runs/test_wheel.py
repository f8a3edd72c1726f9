"""The wheel: what is in it, and that it works where no checkout is."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MOST_MEGABYTES = 16


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "raftune", source / "raftune", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, str(out), str(source)], check=True)
    [path] = out.glob("*.whl")
    return path


def test_the_wheel_holds_code_and_weights_and_nothing_that_trained_them(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"raftune"}
    assert "raftune/starters/text/weights/policy/model.safetensors" in names
    assert {"raftune/report/assets/app.js", "raftune/cli/init.yaml", "raftune/py.typed"} <= set(names)
    assert wheel.stat().st_size < MOST_MEGABYTES * 2**20, f"{wheel.stat().st_size / 2**20:.1f} MB"


def test_in_an_environment_without_the_checkout_the_demo_runs(wheel: Path, tmp_path: Path) -> None:
    """The environment has this one's other packages, by a path file, and no raftune but the wheel's."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    [packages] = environment.glob("lib/python*/site-packages")
    [here] = [path for path in site.getsitepackages() if Path(path, "torch").is_dir()]
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "zz_others.pth").write_text(here + "\n")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = [str(environment / "bin" / "python"), "-m", "raftune", "demo", "--fresh", "--num-rounds", "1"]
    done = subprocess.run(
        run, cwd=tmp_path, env=variables | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
    where = subprocess.run(
        [run[0], "-c", "import raftune; print(raftune.__file__)"], cwd=tmp_path, env=variables, capture_output=True
    )
    assert str(packages) in where.stdout.decode()
