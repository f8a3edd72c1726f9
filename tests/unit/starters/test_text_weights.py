"""The shipped weights: plain transformers loads them, they speak, they rank, and they are small."""

import json
import subprocess
import sys
from random import Random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from raftune.starters import text
from raftune.starters.text import corpus
from raftune.starters.text.judge import judge

PROMPTS = text.prompts("heldout", 200, 11)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def rewards(prompts: list[str], completions: list[str]) -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(text.reward_path())
    model = AutoModelForSequenceClassification.from_pretrained(text.reward_path(), num_labels=1).eval()
    whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    with torch.no_grad():
        return np.asarray(model(**tokenizer(whole, return_tensors="pt", padding=True)).logits[:, 0].numpy())


def replies(kind: str, seed: int) -> list[str]:
    rng = Random(seed)
    return [corpus.reply(request, rng, [kind]).completion for request in map(corpus.read_request, PROMPTS) if request]


def test_importing_the_starter_imports_no_torch() -> None:
    code = (
        "import sys, raftune.starters.text; raise SystemExit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_both_models_together_are_under_six_megabytes() -> None:
    assert sum(f.stat().st_size for f in text.policy_path().parent.rglob("*") if f.is_file()) < 6_000_000


@pytest.mark.parametrize(
    ("auto", "folder"),
    [(AutoModelForCausalLM, text.policy_path()), (AutoModelForSequenceClassification, text.reward_path())],
)
def test_plain_transformers_loads_finite_float32_weights(auto: type, folder: object) -> None:
    model = auto.from_pretrained(folder)  # type: ignore[attr-defined]
    assert model.dtype == torch.float32
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_the_tokenizer_puts_bos_first_and_gives_back_natural_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(text.policy_path())
    ids = tokenizer(PROMPTS[0] + " Of course, let us see.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == PROMPTS[0] + " Of course, let us see."
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_the_prompts_tokens_are_the_first_tokens_of_prompt_and_reply() -> None:
    tokenizer = AutoTokenizer.from_pretrained(text.policy_path())
    for dialogue in corpus.dialogues(200, 4):
        prompt, whole = (tokenizer(t)["input_ids"] for t in (dialogue.prompt, dialogue.prompt + dialogue.completion))
        assert whole[: len(prompt)] == prompt


@pytest.mark.slow
def test_the_policy_ends_its_replies_and_leaves_headroom_that_eight_samples_can_find() -> None:
    tokenizer = AutoTokenizer.from_pretrained(text.policy_path())
    policy = AutoModelForCausalLM.from_pretrained(text.policy_path())
    prompts = PROMPTS[:24]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    ids = policy.generate(**inputs, do_sample=True, top_k=0, num_return_sequences=8, max_new_tokens=80)
    completions = ids[:, inputs["input_ids"].shape[1] :]
    assert (completions == tokenizer.eos_token_id).any(1).float().mean() > 0.95
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    scores = np.array(judge([p for p in prompts for _ in range(8)], texts), dtype=float).reshape(24, 8)
    assert (
        0.1 * 4 < scores.mean() < 0.45 * 4
    )  # a mean of 192 samples, its standard error under 0.12: this seed is not lucky
    assert scores.max(1).mean() > 0.6 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["rude", "curt", "ramble", "rude_advice", "empty_courtesy", "wrong_advice", "unfinished"]
)
def test_the_reward_model_ranks_a_good_reply_over_a_bad_one_on_heldout_prompts(kind: str) -> None:
    right = rewards(PROMPTS, replies("good", 1)) > rewards(PROMPTS, replies(kind, 2))
    assert right.mean() >= 0.85


def test_the_manifest_states_the_measured_accuracies_and_the_sizes_on_disk() -> None:
    manifest = json.loads((text.policy_path().parent / "manifest.json").read_text())
    measured = manifest["measured_on_heldout_prompts"]
    assert measured["reward_accuracy_on_policy_pairs"] >= 0.85
    assert measured["reward_correlation_with_judge"] >= 0.8
    for name, folder in (("policy", text.policy_path()), ("reward", text.reward_path())):
        assert manifest[name]["bytes"] == sum(f.stat().st_size for f in folder.iterdir())
