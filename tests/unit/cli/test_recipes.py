"""Every recipe is a whole and valid configuration, and starts where its models and data lie at hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

from raftune.config.load import declared, load_as, load_config, merge, validate
from raftune.config.reward_model import RewardModelConfig
from raftune.config.run import RunConfig
from raftune.config.sft import SftConfig
from raftune.planning import forecast
from raftune.rewards.builtin.aesthetic import save_head
from raftune.rewards.loading import load_reward
from raftune.rewards.registry import built_in
from raftune.training.quiet import quiet
from tests import pipelines
from tests.builders import save_backbone, save_tiny

HOME = Path(__file__).parents[3] / "recipes"
KINDS: dict[str, Any] = {"sft.yaml": SftConfig, "reward.yaml": RewardModelConfig}
RECIPES = sorted(HOME.rglob("*.yaml"))
RUNS = [path for path in RECIPES if path.name not in KINDS]
BUNDLED = ("demo", "hacking", "image")  # which name nothing but the starter
PIPELINES: dict[str, Any] = {"sd15": "sd", "sdxl": "sdxl", "flux": "flux"}  # and their tiny pipelines


def title(path: Path) -> str:
    return path.relative_to(HOME).with_suffix("").as_posix()


def name_of(path: Path) -> str:
    """The file's name, or its folder's where the recipe has several steps."""
    return path.stem if path.parent == HOME else path.parent.name


def test_there_are_recipes() -> None:
    runs, steps = {title(path) for path in RUNS}, {title(path) for path in RECIPES}
    assert runs >= {"demo", "hh/run", "gpt2/run", "gsm8k/run", "math", "toxicity", "image"}
    assert runs >= {f"{name}/run" for name in PIPELINES}
    assert steps - runs == {"hh/sft", "hh/reward", "gpt2/reward"}


@pytest.mark.parametrize("path", RUNS, ids=title)
def test_a_run_is_valid_and_has_its_recipe_s_name(path: Path) -> None:
    config = load_config([path])
    assert config.name == name_of(path)
    assert validate(declared(config)) == config


@pytest.mark.parametrize("path", [path for path in RECIPES if path.name in KINDS], ids=title)
def test_a_step_before_the_rounds_is_valid_and_writes_where_the_rounds_look(path: Path) -> None:
    config = load_as(KINDS[path.name], [path], {})
    assert config.output_dir == f"runs/{path.parent.name}-{path.stem}"
    assert f"{config.output_dir}/model" in (path.parent / "run.yaml").read_text()


@pytest.mark.parametrize("path", RUNS, ids=title)
def test_the_built_in_rewards_of_a_recipe_take_its_options(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_aesthetic_head(tmp_path)
    config = load_config([path])
    for reward in (*config.rewards.reward_funcs, *config.evaluation.reward_funcs):
        if reward.spec in built_in() and not built_in()[reward.spec].has_weights:
            assert load_reward(reward).name == reward.derived_name


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in RUNS if name_of(path) not in (*BUNDLED, *PIPELINES)], ids=title)
def test_a_recipe_passes_its_plan_with_models_and_data_at_hand(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_substitutes(load_config([path]), tmp_path)
    at_hand = {"engine": {"threads": 1}, "sampling": {"max_completion_length": 8}, "policy": {"device": "cpu"}}
    at_hand["policy"]["model"] = "policy"
    recipe = yaml.safe_load(path.read_text().replace("trl-lib/DeepMath-103K", "prompts.jsonl"))
    found = forecast(validate(merge([with_local_classifiers(recipe), at_hand])))
    assert found.probe is not None
    assert found.amounts.rounds == recipe["num_rounds"]
    assert found.prompts.train > 0 < found.prompts.held_out


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in RUNS if name_of(path) in PIPELINES], ids=title)
def test_a_recipe_of_images_passes_its_plan_with_a_tiny_pipeline(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config([path])
    pipelines.save_tiny(PIPELINES[name_of(path)], tmp_path / "pipeline")
    colours = [{"spec": "colour", "options": {"measure": measure}} for measure in ("brightness", "saturation")]
    at_hand: dict[str, Any] = {
        "policy": {"model": str(tmp_path / "pipeline"), "device": "cpu", "variant": None},
        "sampling": {"diffusion": {"height": 16, "width": 16}},
        "rewards": {"reward_funcs": colours[:1]},
        "evaluation": {"reward_funcs": colours[1:], "features": None},
        "report_to": [],
    }
    found = forecast(validate(merge([declared(config), at_hand])), measured=False)
    amounts = found.amounts
    assert found.memory is not None and found.seconds is None
    assert found.work.pictures == config.num_rounds * amounts.generated + (config.num_rounds + 1) * amounts.judged
    assert found.work.forwards % found.work.pictures == 0
    assert found.prompts.train >= config.prompts_per_round and found.prompts.overlap == 0


def save_aesthetic_head(folder: Path) -> None:
    """The linear layers of an aesthetic predictor, under the name by which the recipe knows them."""
    save_head(folder / "head", [(np.zeros((1, 768)), np.zeros(1))], clip=None)
    (folder / "head/model.safetensors").rename(folder / "aesthetic.safetensors")


def with_local_classifiers(value: Any) -> Any:
    """The recipe with the tiny classifier in place of each that the hub has."""
    if isinstance(value, dict):
        return {
            k: "classifier" if k == "model" and "/" in str(v) else with_local_classifiers(v) for k, v in value.items()
        }
    return [with_local_classifiers(one) for one in value] if isinstance(value, list) else value


def save_substitutes(config: RunConfig, folder: Path) -> None:
    """Tiny models, rewards and prompts under the names by which the recipe knows them."""
    save_tiny(folder / "policy", "llama", chat=True)
    save_classifier(folder / "classifier", {0: "nothate", 1: "hate"})
    for reward in config.rewards.reward_funcs:
        if reward.spec.startswith("runs/"):
            save_classifier(folder / reward.spec, {0: "score"})
    chat = name_of_prompts(config) == "gsm8k"
    for source in {config.data.prompts, config.evaluation.prompts, "prompts.jsonl"} - {None, "trl-lib/DeepMath-103K"}:
        assert source is not None
        lines = [json.dumps(line(f"{Path(source).stem} {number}", number, chat)) for number in range(40)]
        (folder / source).parent.mkdir(parents=True, exist_ok=True)
        (folder / source).write_text("\n".join(lines))


def name_of_prompts(config: RunConfig) -> str:
    return Path(config.data.prompts or "").parent.name


def line(prompt: str, number: int, chat: bool) -> dict[str, Any]:
    """A prompt with every column that a recipe reads."""
    if chat:
        return script().row(prompt, f"so it is\n#### {number}")  # type: ignore[no-any-return]
    return {"prompt": prompt, "reference": "fine", "solution": f"\\boxed{{{number}}}"}


def script() -> Any:
    """The module that writes GSM8K as prompts."""
    spec = importlib.util.spec_from_file_location("gsm8k_prompts", HOME / "gsm8k" / "prompts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_classifier(folder: Path, labels: dict[int, str]) -> None:
    """A sequence classifier of tiny random weights with these labels."""
    save_backbone(folder, "distilbert")
    with quiet():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels), id2label=labels)
        model.save_pretrained(folder)


def test_gsm8k_becomes_a_message_and_a_solution_that_the_reward_reads() -> None:
    found = script().row(" How many? ", "3 + 4 = 7\n#### 7")
    assert found["prompt"][0]["content"].startswith("How many?\n\nReason step by step.")
    [reward] = load_config([HOME / "gsm8k" / "run.yaml"]).rewards.reward_funcs
    score = load_reward(reward)
    right, wrong = "It is \\boxed{7}.", "It is 7."
    assert score(prompts=["", ""], completions=[right, wrong], answer=[found["answer"]] * 2) == [1.0, 0.0]


def test_gsm8k_is_written_of_a_local_file_too(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script().write(tmp_path / "out", tmp_path / "rows.jsonl")
    lines = [(tmp_path / f"out/{name}.jsonl").read_text().splitlines() for name in ("train", "test")]
    assert [len(part) for part in lines] == [18, 2]
    assert json.loads(lines[1][0])["answer"] == "#### 9"
