"""The examples of docs/extending.md work as they stand there; what is wrong with one is said before anything runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raftune.config import validate
from raftune.config.extensions import module_from_file, with_options
from raftune.config.load import declared
from raftune.config.rewards import RewardSpec
from raftune.config.sampling import SamplingConfig, load_backend
from raftune.config.selection import CustomRule
from raftune.config.training import CustomTraining
from raftune.engines.registry import make_engine
from raftune.errors import ConfigError, ExtensionError
from raftune.policies.causal_lm import CausalLM
from raftune.records import Prompt
from raftune.rewards.registry import built_in
from raftune.rewards.resolve import resolve
from raftune.runtime.assembly import PythonObjects, open_runtime
from raftune.runtime.run import run
from raftune.selection import Candidates, load_rule, select
from raftune.store.parquet import read_table
from raftune.training.objectives import chosen_rows, load_objective
from tests.builders import Parts, chunk_of, parts, save_tiny, write_rows
from tests.runs import tiny
from tests.unit.policies.causal_lm.fits import some_rows

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
EXAMPLES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file of each example, where the command is given."""
    for name, text in EXAMPLES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_json(root: Path, *path: str) -> Any:
    return json.loads(root.joinpath(*path).read_text(encoding="utf-8"))


def test_there_is_an_example_of_every_part_and_none_is_long() -> None:
    assert len(EXAMPLES) == 8
    assert all(len([*filter(str.strip, text.splitlines())]) < 40 for text in EXAMPLES.values())
    for name in ("Reward", "Selection rule", "Objective", "Generation backend", "Engine", "Policy family", "Metric"):
        assert f"\n## {name}\n" in PAGE.read_text(encoding="utf-8")


def test_the_rewards_of_the_page_give_numbers(files: Path) -> None:
    reward = resolve(RewardSpec(spec="polite.py:polite", options={"word": "thanks"}))
    assert reward(prompts=["a", "a"], completions=["Thanks!", "please"]) == [1.0, 0.0]
    try:
        module_from_file(Path("shouting.py"))
        made = with_options(built_in()["shouting"], "shouting", "options", {"penalty": 2.0})
        assert made.name == "shouting"
        assert made(prompts=["", ""], completions=["AB", "ab"]) == [-2.0, 0.0]
        assert [option.name for option in built_in()["shouting"].option_list()] == ["penalty"]
    finally:
        built_in().pop("shouting", None)


def test_a_run_follows_a_rule_an_engine_and_a_metric_of_ones_own(files: Path) -> None:
    changes = {
        "selection": {"rule": "near_best.py:NearBest", "options": {"within": 0.5}, "all_equal": "keep"},
        "engine": {"kind": "threads.py:Threads", "options": {"threads": 2}, "threads": 1},
        "evaluation": {"metrics": [{"spec": "size.py:Size", "name": "size"}, "size.py:Broken"]},
    }
    (files / "size.py").write_text(
        "import numpy as np\n"
        "class Size:\n"
        "    needs = frozenset({'category'})\n"
        "    def __call__(self, samples):\n"
        "        return samples.column('completion').to_numpy()\n"
        "class Broken(Size):\n"
        "    def __call__(self, samples):\n"
        "        raise ValueError('no size')\n"
    )
    config = tiny.config(files / "mine", **changes)
    assert validate(declared(config)) == config.model_copy(update={"output_dir": None})
    run(config, tiny.objects())
    summary = read_json(files / "mine", "round-0001", "select", "summary.json")
    own = {"near the best of its prompt", "too far from the best"}
    assert own == set(summary["reasons"])
    verdicts = read_table(files / "mine" / "round-0001" / "select" / "verdicts.parquet")
    best = {row["prompt_id"]: row["score"] for row in verdicts.to_pylist() if row["rank"] == 1}
    assert all((row["weight"] > 0) == (row["score"] >= best[row["prompt_id"]] - 0.5) for row in verdicts.to_pylist())
    metrics = read_json(files / "mine", "round-0001", "evaluate", "metrics.json")
    assert metrics["metrics/size"]["mean"] == pytest.approx(metrics["reward"]["mean"])
    assert metrics["metrics/Broken"] is None
    assert metrics["metric_errors"] == {"Broken": "ValueError: no size"}
    usual = tiny.config(files / "usual", **{**changes, "engine": {"threads": 1}})
    run(usual, tiny.objects())
    for stage in ("generate", "select", "model"):
        theirs, ours = (files / name / "round-0002" / stage / "_COMMIT.json" for name in ("usual", "mine"))
        assert theirs.read_bytes() == ours.read_bytes(), "the bytes do not depend on the engine"

    assembly = open_runtime(files / "mine")
    before = assembly.stage(1, "select").fingerprints()
    (files / "near_best.py").write_text(EXAMPLES["near_best.py"] + "\n# changed\n")
    assert assembly.stage(1, "select").fingerprints() != before
    assembly.close()


def test_a_run_of_the_family_of_the_page_learns(files: Path) -> None:
    config = validate(
        {
            "output_dir": "words",
            "num_rounds": 1,
            "report": False,
            "data": {"prompts": "given as an object"},
            "policy": {"family": "words.py:Words", "options": {"words": ["yes", "no", "maybe"]}},
            "sampling": {"num_generations": 8},
            "evaluation": {"num_prompts": 4, "metrics": ["exclaims.py:Exclaims"]},
        }
    )
    prompts = pa.table({"prompt": [f"question {i}" for i in range(12)]})
    run(config, PythonObjects(lambda: prompts, lambda: prompts.slice(0, 4), [counts_yes]))
    counts = read_json(files, "words", "round-0001", "model", "counts.json")
    assert counts["yes"] > 5 > counts["no"] == 1.0
    assert read_json(files, "words", "round-0001", "evaluate", "metrics.json")["metrics/Exclaims"]["mean"] == 0.0


def counts_yes(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(text == "yes") for text in completions]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def with_sections(config: Parts, **sections: Any) -> Parts:
    return Parts(config.policy, sections.get("sampling", config.sampling), sections.get("training", config.training), 0)


def test_the_objective_of_the_page_is_what_a_causal_lm_is_trained_on(files: Path, llama: Path) -> None:
    config = parts(llama, num_train_epochs=1, per_device_train_batch_size=16)
    start = files / "start"
    CausalLM.start(config, start)
    rows = write_rows(files / "rows.parquet", some_rows(6))
    signs = pa.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    table = read_table(rows).append_column("sign", signs)
    pq.write_table(table, files / "signed.parquet")
    losses = {}
    for strength in (0.0, 5.0):
        options = {"strength": strength}
        training = CustomTraining(
            objective="unlikelihood.py:Unlikelihood", options=options, **config.training.model_dump()
        )
        policy = CausalLM.load(with_sections(config, training=training), start, start)
        work, out = files / f"work-{strength}", files / f"out-{strength}"
        losses[strength] = policy.train(files / "signed.parquet", work, out).losses
    policy = CausalLM.load(config, start, start)
    prompts = [Prompt(row["prompt_id"], row["prompt"]) for row in table.to_pylist()]
    logp = policy.log_probs(prompts, table, 8)
    tokens = np.array([len(ids) for ids in table.column("completion_ids").to_pylist()])
    assert losses[0.0] == pytest.approx([-logp[::2].sum() / tokens.sum()], rel=1e-4)
    assert losses[5.0][0] > losses[0.0][0]


def test_rows_of_an_objective_reach_training_as_it_chose_them(files: Path) -> None:
    objective = load_objective(CustomTraining(objective="unlikelihood.py:Unlikelihood"))
    samples = pa.table({"sample_id": ["a", "b"], "prompt_id": ["p", "p"]})
    verdicts = pa.table({"sample_id": ["a", "b"], "weight": [1.0, 0.0], "score": [2.0, 1.0]})
    rows = chosen_rows(objective, "unlikelihood.py:Unlikelihood", samples, verdicts)
    assert rows.column("sign").to_pylist() == [1.0, -1.0]
    assert rows.column("weight").to_pylist() == [1.0, 1.0]


def test_a_causal_lm_generates_by_the_backend_of_the_page(files: Path, llama: Path) -> None:
    config = parts(llama)
    start = files / "start"
    CausalLM.start(config, start)
    own = SamplingConfig(**{**config.sampling.model_dump(), "backend": "one_by_one.py:OneByOne"})
    policy = CausalLM.load(with_sections(config, sampling=own), start, start)
    chunk = chunk_of(["the cab", "so"], k=2)
    samples = policy.generate(chunk)
    assert [sample.seed for sample in samples] == [seed for seeds in chunk.seeds for seed in seeds]
    table = pa.Table.from_pylist([dict(sample.payload) for sample in samples])
    prompts = [prompt for prompt in chunk.prompts for _ in range(2)]
    assert policy.recorded_log_probs(table) == pytest.approx(policy.log_probs(prompts, table, 4), abs=1e-3)
    assert not [note for note in policy.notes() if "one_by_one" in note]
    assert policy.choose_backend(chunk.prompts) == {"own": "one_by_one.py:OneByOne"}


def test_a_backend_that_is_named_is_used_or_refused(llama: Path, tmp_path: Path) -> None:
    config = parts(llama)
    CausalLM.start(config, tmp_path)
    named = SamplingConfig(**{**config.sampling.model_dump(), "backend": "hf_generate"})
    policy = CausalLM.load(with_sections(config, sampling=named), tmp_path, tmp_path)
    assert policy.choose_backend(chunk_of(["so"]).prompts)["forked"] == "sampling.backend is hf_generate"
    asked = {**config.sampling.model_dump(), "backend": "shared_prefix", "generation_kwargs": {"num_beams": 2}}
    policy = CausalLM.load(with_sections(config, sampling=SamplingConfig(**asked)), tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=r"sampling\.backend: shared_prefix cannot be used here.*num_beams"):
        policy.choose_backend(chunk_of(["so"]).prompts)


WRONG = {
    "no file": ("gone.py:Rule", {}, r"selection\.rule must name what can be imported; got 'gone\.py:Rule'"),
    "no name": ("near_best.py:Near", {}, r"selection\.rule: near_best\.py has no 'Near'"),
    "a function": ("bad.py:function", {}, r"must name a class with `decide\(self, pool, seed\)`.*a function"),
    "no method": ("bad.py:Empty", {}, r"the class bad\.py:Empty lacks the method `decide\(self, pool, seed\)`"),
    "no reasons": ("bad.py:Mute", {}, r"bad\.py:Mute lacks the attribute `reasons`"),
    "signature": (
        "bad.py:Short",
        {},
        r"decide of bad\.py:Short must take .*; it takes \(self, pool\)",
    ),
    "an option": ("near_best.py:NearBest", {"withn": 1}, r"near_best\.py:NearBest .* option 'withn'.*mean 'within'"),
    "a value": ("near_best.py:NearBest", {"within": "far"}, r"selection\.options\.within of near_best.*got 'far'"),
    "an error": ("raises.py:Rule", {}, r"raises\.py, line 1 raised ZeroDivisionError"),
}
BAD = """
def function(pool, seed): ...
class Empty: ...
class Mute:
    def decide(self, pool, seed): ...
class Short:
    reasons = ("yes",)
    def decide(self, pool): ...
class Far:
    reasons = ("yes",)
    def decide(self, pool, seed): return pool.score * float("nan"), pool.k * 0
class Fails(Far):
    def decide(self, pool, seed): raise ValueError("oh")
class Index(Far):
    def decide(self, pool, seed): return pool.score * 0, pool.k * 0 + 1
"""


@pytest.mark.parametrize("case", WRONG)
def test_a_rule_that_cannot_be_used_is_refused_when_planned(files: Path, case: str) -> None:
    spec, options, message = WRONG[case]
    (files / "bad.py").write_text(BAD)
    (files / "raises.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=message):
        load_rule(CustomRule(rule=spec, options=options))


@pytest.mark.parametrize(("name", "message"), [("Far", "finite"), ("Fails", "ValueError: oh"), ("Index", "indices")])
def test_a_rule_that_breaks_its_contract_stops_with_its_name(files: Path, name: str, message: str) -> None:
    (files / "bad.py").write_text(BAD)
    one = np.zeros(1)
    table = Candidates(one.astype(np.int64), one.astype(np.int32), one, one.astype(np.int64), one.astype(np.uint64))
    with pytest.raises(ExtensionError, match=rf"bad\.py:{name}.*{message}"):
        select(table, CustomRule(rule=f"bad.py:{name}"), 0)


def test_what_is_not_whole_is_refused_by_the_preflight_of_a_run(files: Path) -> None:
    (files / "bad.py").write_text(BAD)
    for section, message in (
        ({"selection": {"rule": "bad.py:Empty"}}, "selection.rule"),
        ({"evaluation": {"metrics": ["bad.py:Empty"]}}, "evaluation.metrics"),
        ({"training": {"objective": "bad.py:Empty"}}, "training"),
        ({"engine": {"kind": "bad.py:Empty"}}, "engine.kind"),
        ({"sampling": {"backend": "bad.py:Empty"}}, "sampling.backend"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(tiny.config(files / "run", **section), tiny.objects())
    with pytest.raises(ConfigError, match=r"engine\.kind: the class bad\.py:Empty lacks the method `run"):
        make_engine(tiny.config(files / "run", engine={"kind": "bad.py:Empty"}).engine, files)
    assert load_backend(SamplingConfig()) is None
    assert not (files / "run" / "round-0001").exists()
