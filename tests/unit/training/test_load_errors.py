"""What does not load is refused with its cause and what to do, never as a bug."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import PhimoeConfig, PhimoeForCausalLM

from raftune.errors import ModelError, RewardError
from raftune.policies.causal_lm import CausalLM
from raftune.rewards.builtin.classifier import ClassifierReward
from raftune.training.quiet import quiet
from tests.builders import VOCABULARY, chunk_of, parts, save_tiny, tiny_llama, tiny_tokenizer, write_rows
from tests.unit.policies.causal_lm.fits import some_rows, trained


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "model")


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'x'\ntR.")


def quantized(**settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, r"model\.safetensors \(5000 bytes\) is cut short or damaged .* Copy or download it again"),
        (pointer, r"model\.safetensors is a git-lfs pointer and not the weights\. Run `git lfs pull` in "),
        (pickled, r"its weights \(pytorch_model.bin\) are pickled.* save_pretrained writes safetensors"),
        (quantized(quant_method="gptq", bits=4), "needs the package optimum.* Install optimum"),
        (quantized(quant_method="awq", bits=4), "Install gptqmodel"),
    ],
)
def test_a_model_that_does_not_load_is_refused_with_the_fix(
    base: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    model = shutil.copytree(base, tmp_path / "model")
    damage(model)
    with pytest.raises(ModelError, match=rf"policy\.model must be a causal language model; .* did not load: .*{said}"):
        CausalLM.start(parts(model), tmp_path / "start")


def test_an_attention_whose_package_is_missing_names_the_field(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Install flash-attn, or set policy\.attn_implementation: sdpa"):
        CausalLM.start(parts(base, attn_implementation="flash_attention_2"), tmp_path / "start")


def saved_adapter(folder: Path, config: Any, base: Path | None, **changes: Any) -> Path:
    model = get_peft_model(tiny_llama(**changes), config)
    model.peft_config["default"].base_model_name_or_path = None if base is None else str(base)
    with quiet():
        model.save_pretrained(folder)
    return folder


def test_an_adapter_that_cannot_be_a_start_is_refused_with_the_fix(base: Path, tmp_path: Path) -> None:
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    resized = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    cases = {
        "PROMPT_TUNING, which adds to the prompt": saved_adapter(tmp_path / "prompt", prompt, base),
        "names none. Write the base's folder": saved_adapter(tmp_path / "none", lora, None),
        f"is \\[{VOCABULARY + 8}, 32\\] in the files and \\[{VOCABULARY}, 32\\] in the model.*resized": saved_adapter(
            tmp_path / "resized", resized, base, vocab_size=VOCABULARY + 8
        ),
    }
    for number, (said, adapter) in enumerate(cases.items()):
        with pytest.raises(ModelError, match=rf"policy\.model .*{said}"):
            CausalLM.start(parts(adapter), tmp_path / f"start-{number}")


@pytest.mark.slow
def test_lora_on_all_linear_layers_leaves_out_routers_that_return_tuples(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 64}
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with quiet():
        PhimoeForCausalLM(PhimoeConfig(**sizes, **more, **ids)).save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = parts(tmp_path / "model", lora=True)
    out, _ = trained(config, tmp_path, write_rows(tmp_path / "rows.parquet", some_rows(4)))
    assert any("router" in name for name in json.loads((out / "adapter_config.json").read_text())["exclude_modules"])
    policy = CausalLM.load(config, out, tmp_path / "round-0000" / "model")
    assert len(policy.generate(chunk_of(("so",)))) == 4


def test_a_lora_reward_model_is_refused_with_how_to_merge_it(base: Path, tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path / "reward", LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]), base)
    with pytest.raises(RewardError, match=r"is an adapter alone\. Merge it into its base: AutoPeftModelForSequence"):
        ClassifierReward(model=str(adapter)).load()
