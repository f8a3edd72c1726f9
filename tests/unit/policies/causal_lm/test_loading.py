"""A run's start is checked before anything is generated, and what a round saves, plain transformers and peft load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2Model

from raftune.config.policy import AdapterConfig
from raftune.errors import ConfigError, ModelError
from raftune.policies.causal_lm import CausalLM
from raftune.policies.causal_lm.loading import check_model_folder, fingerprint, fresh_adapter
from raftune.records import Prompt
from raftune.training.quiet import quiet
from tests.builders import (
    EOS,
    PAD,
    VOCABULARY,
    parts,
    save_tiny,
    tiny_gpt2,
    tiny_llama,
    tiny_model,
    tiny_tokenizer,
    tree_hash,
    write_rows,
)

IDS = torch.arange(3, 30)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def start_of(root: Path) -> Path:
    return root / "round-0000" / "model"


def moved_adapter(model: Any) -> PeftModel:
    """The model with an adapter that changes what it says."""
    adapted = fresh_adapter(model, AdapterConfig(r=4, alpha=8.0), 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    return adapted.eval()


# -- the start -------------------------------------------------------------------------------------------------------


def test_a_named_model_becomes_a_reference_with_its_hash(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    facts = CausalLM.start(parts(model), start_of(tmp_path))
    assert [path.name for path in start_of(tmp_path).iterdir()] == ["reference.json"]
    reference = json.loads((start_of(tmp_path) / "reference.json").read_text())
    assert reference == {"name": str(model), "revision": None, "fingerprint": fingerprint(model)}
    assert (facts["architecture"], facts["vocabulary"], facts["context"]) == ("LlamaForCausalLM", VOCABULARY, 128)
    assert facts["parameters"] == sum(weight.numel() for weight in tiny_llama().parameters())


def test_a_start_that_changed_is_noticed(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    CausalLM.start(parts(model), start_of(tmp_path))
    CausalLM.verify(start_of(tmp_path))
    (model / ".cache").write_text("hidden files are nobody's weights")
    CausalLM.verify(start_of(tmp_path))
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(ModelError, match=r"policy\.model must not change during a run"):
        CausalLM.verify(start_of(tmp_path))
    model.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="is gone"):
        CausalLM.verify(start_of(tmp_path))


def test_a_folder_that_is_not_there_and_a_name_that_nothing_has_are_distinguished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"got '/nowhere/model', and /nowhere/model is no folder"):
        CausalLM.start(parts("/nowhere/model"), start_of(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"got 'nobody/nothing'.*HF_HUB_OFFLINE is set: unset it"):
        CausalLM.start(parts("nobody/nothing"), start_of(tmp_path))


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with quiet():
        tiny_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"policy\.tokenizer must name a tokenizer"):
        CausalLM.start(parts(tmp_path / "model"), start_of(tmp_path))
    tiny_tokenizer().save_pretrained(tmp_path / "words")
    CausalLM.start(parts(tmp_path / "model", tokenizer=str(tmp_path / "words")), start_of(tmp_path))


def test_a_folder_without_a_model_is_refused_and_the_one_in_it_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path / "sft" / "model")
    with pytest.raises(ModelError, match=r"sft has no config\.json\. Did you mean .*sft/model\?"):
        CausalLM.start(parts(tmp_path / "sft"), start_of(tmp_path))
    with pytest.raises(ModelError, match=r"has no config\.json\. Name one that save_pretrained wrote"):
        CausalLM.start(parts(start_of(tmp_path)), start_of(tmp_path))


@pytest.mark.parametrize(
    ("kind", "fix"),
    [("SequenceClassification", r"A reward model goes into rewards\.reward_funcs"), ("MaskedLM", "that generates")],
)
def test_a_model_of_another_kind_is_refused_though_no_weight_is_missing(tmp_path: Path, kind: str, fix: str) -> None:
    model = save_tiny(tmp_path / "model", "gpt2")  # tied embeddings: the body's weights are all that a head needs
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": [f"GPT2For{kind}"]}))
    with pytest.raises(
        ModelError, match=rf"policy\.model must be a causal language model; .* is a GPT2For{kind}\. .*{fix}"
    ):
        CausalLM.start(parts(model), start_of(tmp_path))


def test_a_tokenizer_of_special_tokens_alone_is_refused(tmp_path: Path) -> None:
    with quiet():  # of such a folder transformers makes a tokenizer by which every text is empty
        tiny_gpt2().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"knows no words: its files are missing\. Save one there"):
        CausalLM.start(parts(tmp_path / "model"), start_of(tmp_path))


def test_an_end_that_the_tokenizer_does_not_know_ends_nothing(tmp_path: Path) -> None:
    with quiet():
        tiny_gpt2(eos_token_id=50_256).save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert CausalLM.start(parts(tmp_path / "model"), start_of(tmp_path))["eos_ids"] == [EOS]
    with quiet():
        tiny_tokenizer(eos=False, pad=False).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"neither tokenizer nor generation config has one that the tokenizer knows"):
        CausalLM.start(parts(tmp_path / "model"), start_of(tmp_path))


def test_a_missing_pad_token_is_filled_with_eos_and_reported(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    tiny_tokenizer(pad=False).save_pretrained(model)
    config = parts(model)
    assert CausalLM.start(config, start_of(tmp_path))["notes"] == list(
        CausalLM.load(config, start_of(tmp_path), start_of(tmp_path)).notes()
    )
    policy = CausalLM.load(config, start_of(tmp_path), start_of(tmp_path))
    assert policy.tokenizer.pad_token_id == policy.tokenizer.eos_token_id
    assert "no pad token: EOS" in policy.notes()[0]


def test_a_model_without_an_end_token_is_refused(tmp_path: Path) -> None:
    with quiet():
        tiny_llama(eos_token_id=None).save_pretrained(tmp_path / "model")
    tiny_tokenizer(eos=False).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="end-of-sequence"):
        CausalLM.start(parts(tmp_path / "model"), start_of(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with quiet():
        model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has a NaN or an infinity"):
        CausalLM.start(parts(tmp_path / "model"), start_of(tmp_path))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(9)])
    tokenizer.save_pretrained(model)
    with pytest.raises(ModelError, match=rf"the tokenizer has {len(tokenizer)}, the model {VOCABULARY}"):
        CausalLM.start(parts(model), start_of(tmp_path))


def test_a_model_without_its_head_is_refused_and_not_given_a_random_one(tmp_path: Path) -> None:
    config = GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=VOCABULARY, tie_word_embeddings=False, pad_token_id=PAD
    )
    with quiet():
        GPT2Model(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"lacks 1 \(lm_head\.weight\)"):
        CausalLM.start(parts(tmp_path / "model"), start_of(tmp_path))


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"policy\.model must be a causal language model"):
        CausalLM.start(parts(tmp_path / "model"), start_of(tmp_path))


def test_an_adapter_as_the_start_is_merged_so_that_switching_ours_off_gives_it_back(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    adapted = moved_adapter(AutoModelForCausalLM.from_pretrained(base))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    config = parts(tmp_path / "adapter", lora=True)
    CausalLM.start(config, start_of(tmp_path))
    assert not (start_of(tmp_path) / "reference.json").exists()
    policy = CausalLM.load(config, start_of(tmp_path), start_of(tmp_path))
    torch.testing.assert_close(logits(policy.model), logits(adapted), atol=1e-5, rtol=0)
    assert (logits(adapted) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1


def test_an_object_is_written_with_its_tokenizer_and_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_llama().train()
    CausalLM.start(parts("an object"), start_of(tmp_path), model, tiny_tokenizer())
    assert model.training
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(start_of(tmp_path))), logits(model))
    assert AutoTokenizer.from_pretrained(start_of(tmp_path))("the cab") == tiny_tokenizer()("the cab")
    policy = CausalLM.load(parts("an object"), start_of(tmp_path), start_of(tmp_path))
    assert torch.equal(logits(policy.model), logits(model))


def test_an_adapted_object_is_written_merged_and_left_adapted(tmp_path: Path) -> None:
    model = moved_adapter(tiny_llama())
    before = logits(model)
    CausalLM.start(parts("an object"), start_of(tmp_path), model, tiny_tokenizer())
    assert isinstance(model, PeftModel)
    assert torch.equal(logits(model), before)
    merged = AutoModelForCausalLM.from_pretrained(start_of(tmp_path))
    torch.testing.assert_close(logits(merged), before, atol=1e-5, rtol=0)


def test_a_tokenizer_of_ones_own_is_kept_with_the_start(tmp_path: Path) -> None:
    """Given as an object, whose name in the configuration is nothing that could be loaded; or by a name."""
    own = tiny_tokenizer(bos=True)
    own.save_pretrained(tmp_path / "words")
    model = save_tiny(tmp_path / "model")
    for case, name, given in (("object", "object:0123", own), ("name", str(tmp_path / "words"), None)):
        config, start = parts(model, tokenizer=name), start_of(tmp_path / case)
        CausalLM.start(config, start, None, given)
        assert (start / "reference.json").exists()
        if given is None:
            shutil.rmtree(tmp_path / "words")
        assert CausalLM.load(config, start, start).tokenizer("the")["input_ids"] == own("the")["input_ids"]


def test_an_object_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="processing_class"):
        CausalLM.start(parts("an object"), start_of(tmp_path), tiny_llama())


# -- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "said"),
    [("tpu9", "auto, cpu, cuda"), ("cuda", "got 'cuda', and there is cpu"), ("mps", "got 'mps', and there is cpu")],
)
def test_a_device_that_is_not_here_is_refused(tmp_path: Path, device: str, said: str) -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(ConfigError, match=said):
        CausalLM.start(parts(save_tiny(tmp_path / "model"), device=device), start_of(tmp_path))


def test_a_second_gpu_is_refused_with_the_variable_that_makes_it_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=1"):
        CausalLM.start(parts(save_tiny(tmp_path / "model"), device="cuda:1"), start_of(tmp_path))


def test_four_bits_without_bitsandbytes_are_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = parts(save_tiny(tmp_path / "model"), lora=True, load_in_4bit=True)
    with pytest.raises(ConfigError, match=r"policy\.load_in_4bit needs the package bitsandbytes.*raftune\[qlora\]"):
        CausalLM.start(config, start_of(tmp_path))


def test_a_model_in_four_bits_counts_its_parameters_as_it_does_in_full(tmp_path: Path) -> None:
    facts = CausalLM.start(parts(save_tiny(tmp_path / "model"), lora=True, load_in_4bit=True), start_of(tmp_path))
    assert facts["parameters"] == sum(weight.numel() for weight in tiny_llama().parameters())


@pytest.mark.parametrize(
    "dtype, lora, said", [("bfloat16", False, "1/512"), ("bfloat16", True, ""), ("float32", False, "")]
)
def test_whole_weights_in_sixteen_bits_come_with_a_note_on_what_is_rounded_away(
    tmp_path: Path, dtype: str, lora: bool, said: str
) -> None:
    config = parts(save_tiny(tmp_path / "model"), lora=lora, dtype=dtype)
    CausalLM.start(config, start_of(tmp_path))
    notes = [
        note for note in CausalLM.load(config, start_of(tmp_path), start_of(tmp_path)).notes() if "rounded" in note
    ]
    assert len(notes) == bool(said) and said in "".join(notes)


def test_an_adapter_for_modules_that_are_not_there_is_refused(tmp_path: Path) -> None:
    config = parts(save_tiny(tmp_path / "model"), adapter=AdapterConfig(target_modules=("nothing",)))
    CausalLM.start(config, start_of(tmp_path))
    policy = CausalLM.load(config, start_of(tmp_path), start_of(tmp_path))
    rows = write_rows(tmp_path / "r.parquet", [{"prompt": "a", "completion_ids": [5, 2]}])
    with pytest.raises(ConfigError, match=r"policy\.adapter must fit the model"):
        policy.train(rows, tmp_path / "work", tmp_path / "out")


# -- loading ---------------------------------------------------------------------------------------------------------


def test_weights_are_read_when_they_are_needed_and_encoding_does_not_need_them(tmp_path: Path) -> None:
    config = parts(save_tiny(tmp_path / "model"))
    CausalLM.start(config, start_of(tmp_path))
    policy = CausalLM.load(config, start_of(tmp_path), start_of(tmp_path))
    (tmp_path / "model" / "model.safetensors").unlink()
    assert policy.encode_completion(Prompt("p", "x"), "the cab", "column:human")["completion"] == "the cab"
    with pytest.raises(ModelError):
        _ = policy.model


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
def test_weights_have_the_type_that_was_asked_for(tmp_path: Path, dtype: str) -> None:
    with quiet():
        tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = parts(tmp_path / "model", dtype=dtype)
    assert CausalLM.start(config, start_of(tmp_path))["dtype"] == ("bfloat16" if dtype == "auto" else dtype)
    policy = CausalLM.load(config, start_of(tmp_path), start_of(tmp_path))
    assert policy.model.dtype == (torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))


# -- what a round saves ----------------------------------------------------------------------------------------------

ROWS = [{"prompt": text, "completion_ids": [5 + i, 9, 70, 2]} for i, text in enumerate(("the", "cab", "is", "here"))]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
def test_plain_transformers_loads_a_full_model(tmp_path: Path, arch: str) -> None:
    config = parts(save_tiny(tmp_path / "model", arch))
    out = one_round(config, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert plain.config.use_cache
    assert torch.equal(logits(plain), logits(CausalLM.load(config, out, start_of(tmp_path)).model))
    assert AutoTokenizer.from_pretrained(out)("the cab") == tiny_tokenizer()("the cab")
    assert sorted(path.suffix for path in out.iterdir()) == [".json"] * 5 + [".safetensors"]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
def test_plain_peft_loads_an_adapter_onto_the_base_that_it_names(tmp_path: Path, arch: str) -> None:
    model = save_tiny(tmp_path / "model", arch)
    config = parts(model, lora=True)
    out = one_round(config, tmp_path)
    names = ["adapter_config.json", "adapter_model.safetensors", "parity.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    ours = logits(CausalLM.load(config, out, start_of(tmp_path)).model)
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(out)), ours, atol=1e-5, rtol=0)
    start = logits(AutoModelForCausalLM.from_pretrained(model))
    assert (ours - start).abs().max() > 1e-3


def test_over_the_rounds_an_adapter_stays_one_on_the_start(tmp_path: Path) -> None:
    config = parts(save_tiny(tmp_path / "model"), lora=True)
    first = one_round(config, tmp_path)
    second = tmp_path / "round-0002" / "model"
    rows = write_rows(tmp_path / "r.parquet", ROWS, 2)
    CausalLM.load(config, first, start_of(tmp_path)).train(rows, tmp_path / "work", second)
    plain = AutoPeftModelForCausalLM.from_pretrained(second)
    plain.disable_adapter_layers()
    assert torch.equal(logits(plain), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")))


@pytest.mark.parametrize("arch", ["gpt2", "qwen2"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_export_of_a_run_that_began_with_an_object_loads_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, lora: bool
) -> None:
    config, start = parts("an object", lora=lora), start_of(tmp_path / "run")
    CausalLM.start(config, start, tiny_model(arch), tiny_tokenizer())
    rows, out = write_rows(tmp_path / "r.parquet", ROWS), tmp_path / "run" / "round-0001" / "model"
    CausalLM.load(config, start, start).train(rows, tmp_path / "work", out)
    policy = CausalLM.load(config, out, start)
    policy.export(tmp_path / "published")
    monkeypatch.chdir(tmp_path)
    load = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    plain = load.from_pretrained("published")
    torch.testing.assert_close(logits(plain), logits(policy.model), atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained("published")("the cab") == tiny_tokenizer()("the cab")
    CausalLM.load(config, start, start).export(tmp_path / "beginning")
    beginning = AutoModelForCausalLM.from_pretrained("beginning")
    assert torch.equal(logits(beginning), logits(tiny_model(arch)))


def one_round(config: Any, root: Path) -> Path:
    CausalLM.start(config, start_of(root))
    rows = write_rows(root / "r.parquet", ROWS)
    out = root / "round-0001" / "model"
    CausalLM.load(config, start_of(root), start_of(root)).train(rows, root / "work", out)
    return out


PROGRAM = """
import sys
from pathlib import Path
from tests.unit.policies.causal_lm.test_loading import two_rounds
two_rounds(*map(Path, sys.argv[1:]))
"""


def two_rounds(model: Path, root: Path) -> None:
    """A round with an adapter and one without, each leaving its optimizer's state too."""
    for name in ("lora", "full"):
        one_round(parts(model, lora=name == "lora", optimizer_state="carried"), root / name)


@pytest.mark.slow
def test_equal_runs_in_other_folders_and_processes_leave_equal_bytes(tmp_path: Path) -> None:
    """The other process hashes strings otherwise, on which the order of a set depends."""
    model = save_tiny(tmp_path / "model", "qwen2")
    roots = [tmp_path / place / name for place in ("here", "there") for name in ("lora", "full")]
    for root in roots:
        root.mkdir(parents=True)
    environment = {**os.environ, "PYTHONHASHSEED": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(model), str(tmp_path / "there")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[4], env=environment)
    two_rounds(model, tmp_path / "here")
    here_lora, here_full, there_lora, there_full = (tree_hash(root / "round-0001" / "model") for root in roots)
    assert here_lora == there_lora
    assert here_full == there_full
    assert (len(here_lora), len(here_full)) == (4, 7)


def test_a_pipeline_of_diffusers_gets_an_error_that_names_its_family(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has no config\.json\. It is a pipeline .* write policy\.family: diffusion"):
        check_model_folder(tmp_path)
