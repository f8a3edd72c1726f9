"""A model that needs code of its own, by its name on the hub, trains where that code is trusted and is refused else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders import save_tiny

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "raftune-test-own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
# The hub's cache is looked for when huggingface_hub is imported: so this runs in a process of its own.
PROGRAM = """
import sys
from pathlib import Path
from datasets import Dataset
from raftune import RaftConfig, RaftTrainer
from raftune.errors import ModelError
from raftune.policies.causal_lm import CausalLM
from tests.builders import parts, chunk_of, write_rows
from tests.unit.policies.causal_lm.fits import some_rows, trained

root = Path(sys.argv[1])
config = parts("somebody/own", trust_remote_code=True)
out, report = trained(config, root / "run", write_rows(root / "rows.parquet", some_rows(4)))
policy = CausalLM.load(config, out, root / "run" / "round-0000" / "model")
print(type(policy.model).__name__, report.steps, len(policy.generate(chunk_of(("so",)))))
print((root / "run" / "round-0000" / "model" / "reference.json").read_text())
untrusted = lambda: CausalLM.start(parts("somebody/own"), root / "untrusted")
trainer = lambda: RaftTrainer(
    "somebody/own",
    reward_funcs=lambda completions, **columns: [0.0] * len(completions),
    args=RaftConfig(output_dir=str(root / "trainer")),
    train_dataset=Dataset.from_list([{"prompt": "so"}]),
)
for build in (untrusted, trainer):
    try:
        build()
    except ModelError as error:
        print("refused:", error)
"""


@pytest.mark.slow
def test_code_of_a_hub_model_runs_where_it_is_trusted_and_is_refused_else_also_by_the_trainer(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--somebody--own"
    model = save_tiny(repository / "snapshots" / commit)
    (model / "own.py").write_text(CODE)
    config = json.loads((model / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "raftune-test-own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (model / "config.json").write_text(json.dumps(config))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    here = Path(__file__).parents[4]
    result = subprocess.run(
        command, cwd=here, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("OwnForCausalLM") and lines[0].endswith(" 4")
    assert f'"revision": "{commit}"' in result.stdout
    refused = [line for line in lines if line.startswith("refused:")]
    assert len(refused) == 2
    assert all("needs Python code that comes with it" in line and "trust_remote_code: true" in line for line in refused)
