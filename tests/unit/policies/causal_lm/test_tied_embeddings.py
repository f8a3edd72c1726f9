"""An adapter on one of two layers that share a weight: what generates is the function that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raftune.config.policy import AdapterConfig
from raftune.policies.causal_lm import CausalLM
from raftune.policies.causal_lm.loading import fresh_adapter, merged
from raftune.training.quiet import quiet
from tests.builders import parts, save_tiny, tiny_model, tiny_tokenizer, write_rows
from tests.unit.policies.causal_lm.fits import some_rows, trained

IDS = torch.arange(3, 30)[None]
EMBEDDINGS = {"gpt2": "wte", "qwen2": "embed_tokens"}
CASES = [
    ("qwen2", ["lm_head"], []),
    ("qwen2", ["q_proj", "lm_head", "embed_tokens"], []),
    ("gpt2", ["wte"], []),
    ("gpt2", ["c_attn"], ["lm_head"]),
]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


def adapted(arch: str, targets: list[str], saved: list[str]) -> PeftModel:
    """A tied model under an adapter whose every weight is random."""
    config = AdapterConfig(r=4, alpha=8.0, target_modules=tuple(targets), modules_to_save=tuple(saved))
    model = fresh_adapter(tiny_model(arch), config, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize(("arch", "targets", "saved"), CASES)
def test_a_merged_adapter_is_the_function_of_the_adapter_also_when_saved(
    tmp_path: Path, arch: str, targets: list[str], saved: list[str]
) -> None:
    model = adapted(arch, targets, saved)
    wanted = logits(model)
    whole = merged(model)
    torch.testing.assert_close(logits(whole), wanted, atol=1e-5, rtol=0)
    with quiet():
        whole.save_pretrained(tmp_path)
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), wanted, atol=1e-5, rtol=0)


def test_a_model_without_shared_weights_stays_tied_where_no_adapter_is_on_them() -> None:
    whole = merged(adapted("qwen2", ["q_proj"], []))
    assert whole.config.tie_word_embeddings
    assert whole.lm_head.weight is whole.model.embed_tokens.weight


@pytest.mark.parametrize("form", ["name", "object"])
def test_a_start_with_an_adapter_on_tied_embeddings_is_that_adapters_function(tmp_path: Path, form: str) -> None:
    model = adapted("qwen2", ["lm_head", "embed_tokens"], [])
    wanted = logits(model)
    base, adapter, start = save_tiny(tmp_path / "base", "qwen2"), tmp_path / "adapter", tmp_path / "start"
    if form == "name":
        model.peft_config["default"].base_model_name_or_path = str(base)
        with quiet():
            model.save_pretrained(adapter, save_embedding_layers=False)
            tiny_tokenizer().save_pretrained(adapter)
        CausalLM.start(parts(adapter), start)
    else:
        CausalLM.start(parts(base), start, model, tiny_tokenizer())
    torch.testing.assert_close(logits(CausalLM.load(parts(base), start, start).model), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("arch", "targets", "saved"), CASES)
def test_what_generates_what_plain_peft_loads_and_what_was_trained_are_one_function(
    tmp_path: Path, arch: str, targets: list[str], saved: list[str]
) -> None:
    config = parts(save_tiny(tmp_path / "base", arch), lora=True, learning_rate=0.1)
    adapter = config.policy.adapter.model_copy(
        update={"target_modules": tuple(targets), "modules_to_save": tuple(saved)}
    )
    config = parts(config.policy.model, adapter=adapter, learning_rate=0.1)
    out, _ = trained(config, tmp_path, write_rows(tmp_path / "rows.parquet", some_rows()))
    policy = CausalLM.load(config, out, tmp_path / "round-0000" / "model")
    policy.export(tmp_path / "export")
    with quiet():  # peft warns of tied layers, which is what this is about
        plain = PeftModel.from_pretrained(tiny_model(arch), tmp_path / "export").eval()
    assert (logits(plain) - logits(tiny_model(arch))).abs().max() > 0.1
    torch.testing.assert_close(logits(policy.model), logits(plain), atol=1e-4, rtol=0)
    note = policy.export_merged(tmp_path / "merged")
    with quiet():
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(whole), logits(plain), atol=1e-4, rtol=0)
    assert "Embedding and output layer share a weight in the base; here each has its own." in note
