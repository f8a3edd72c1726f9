"""What only a pretrained model shows. Its folder is named by RAFTUNE_REAL_MODEL; without it, this file is skipped.

The model is SmolLM2-135M-Instruct: a chat template, tied embeddings, EOS `<|im_end|>`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from raftune.config.load import validate
from raftune.policies.causal_lm import CausalLM
from raftune.records import Prompt
from raftune.results.model_card import publish_model
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import run
from raftune.training.quiet import quiet
from tests.builders import chunk_of, parts

MODEL = os.environ.get("RAFTUNE_REAL_MODEL", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MODEL, reason="RAFTUNE_REAL_MODEL names no folder")]

QUESTIONS = ["What is the capital of France?", "Name three colours.", "Why is the sky blue?", "What do bees make?"]


def messages_of(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def brevity(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [-float(len(completion[-1]["content"])) for completion in completions]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    """The model itself, in float32, greedy."""
    start = tmp_path_factory.mktemp("real") / "start"
    config = parts(MODEL, temperature=0.0, max_completion_length=24)
    CausalLM.start(config, start)
    return CausalLM.load(config, start, start)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds of LoRA in bfloat16."""
    root = tmp_path_factory.mktemp("real") / "run"
    config = {
        "output_dir": str(root),
        "num_rounds": 2,
        "prompts_per_round": 4,
        "report": False,
        "data": {"prompts": "objects"},
        "policy": {"model": MODEL, "dtype": "bfloat16", "device": "cpu", "adapter": {"r": 4}},
        "sampling": {"num_generations": 2, "max_completion_length": 10},
        "training": {"learning_rate": 1e-3, "num_train_epochs": 1, "per_device_train_batch_size": 2},
        "evaluation": {"num_prompts": 0},
        "guards": {"enabled": False},
        "engine": {"threads": 1},
    }
    prompts = pa.table({"prompt": [messages_of(question) for question in QUESTIONS]})
    run(validate(config), PythonObjects(train=lambda: prompts, rewards=[brevity]))
    return root


def test_a_chat_question_is_answered_and_the_turn_is_ended(policy: CausalLM) -> None:
    [answer] = policy.generate(chunk_of([messages_of(QUESTIONS[0])], k=1))
    assert "Paris" in answer.completion
    assert "<|im_" not in answer.completion
    assert answer.payload["finish"] == "eos"
    assert answer.payload["completion_ids"][-1] == policy.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_template_is_the_models_own_and_a_completion_is_learnt_with_its_end(policy: CausalLM) -> None:
    prompt = Prompt("p", messages_of(QUESTIONS[0]))
    [ids] = policy.encoder.encode([prompt], for_drawing=True)
    text = policy.tokenizer.decode(ids)
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    learnt = policy.encode_completion(prompt, "Paris.", "teacher")["completion_ids"]
    assert policy.tokenizer.decode(learnt).startswith("Paris.<|im_end|>")


def test_bfloat16_generates_through_the_shared_prefix_in_every_round(half: Path) -> None:
    backend = json.loads((half / "round-0000" / "parity" / "backend.json").read_text())
    assert backend["forked"] == ""
    assert backend["way"] == "fused" and 0 < backend["distances"]["fused"] <= backend["allowed"]
    events = [json.loads(line) for line in (half / "events.jsonl").read_text().splitlines()]
    assert not [note for event in events for note in event.get("notes", []) if "generate" in note]


def test_a_round_of_lora_moves_the_model_and_leaves_its_probe(half: Path) -> None:
    for round_ in (1, 2):
        probe = json.loads((half / f"round-000{round_}" / "model" / "parity.json").read_text())
        assert probe["dtype"] == "bfloat16" and 0 < probe["noise"] < 0.2
        kept = pq.read_table(half / f"round-000{round_}" / "rows" / "rows.parquet").num_rows
        assert 0 < kept <= len(QUESTIONS)  # a prompt whose answers are equally long teaches nothing
    losses = json.loads((half / "round-0002" / "model" / "training.json").read_text())["losses"]
    assert all(0 < loss < 10 for loss in losses)


def test_the_exported_adapter_is_what_plain_peft_loads(half: Path, tmp_path: Path) -> None:
    publish_model(half, tmp_path / "out", 2)
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
        ids = torch.arange(100, 120)[None]
        with torch.no_grad():
            before = base(ids).logits
            plain = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()(ids).logits
    assert (plain - before).abs().max() > 0
    config = parts(MODEL, dtype="bfloat16", lora=True)
    ours = CausalLM.load(config, half / "round-0002" / "model", half / "round-0000" / "model")
    with torch.no_grad():
        torch.testing.assert_close(ours.model(ids).logits, plain, atol=0.5, rtol=0)
