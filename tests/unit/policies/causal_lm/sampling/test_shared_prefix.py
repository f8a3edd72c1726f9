"""The forked cache gives what the model itself gives, for every architecture, and computes each thing once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sampling_models import (
    CONTEXT,
    VOCABULARY,
    biased_llama,
    characters,
    gpt2,
    gpt_neox,
    llama,
    mamba,
    mistral,
    path_of,
    prompts,
    qwen2,
    qwen3,
    seeds,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from raftune.policies.causal_lm.sampling.backend import generate
from raftune.policies.causal_lm.sampling.completions import CompletionBatch
from raftune.policies.causal_lm.sampling.shared_prefix import generate_shared_prefix
from raftune.policies.causal_lm.sampling.token_choice import (
    SHARED_PREFIX,
    BackendName,
    GeneratedCompletion,
    SamplingParams,
)

LENGTHS = (3, 9, 5, 12, 1, 7)
GREEDY = SamplingParams(temperature=0, max_completion_length=30, eos_ids=(2, 5, 6, 7), batch_size=8)

FORKED = {
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "llama, biases everywhere": biased_llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mistral without a window": lambda: mistral(None),
    "mistral, a window never left": lambda: mistral(42),
    "llama, one key head for each query head": lambda: llama(num_key_value_heads=4),
    "llama, one key head for all": lambda: llama(num_key_value_heads=1),
    "llama, head size of its own": lambda: llama(head_dim=20),
    "llama, eager attention": lambda: llama(attn_implementation="eager"),
}
WAYS = [("forked", name) for name in FORKED] + [("fused", name) for name in FORKED if "gpt" not in name]
FALLING_BACK = {"mistral, a window of 8": lambda: mistral(8), "mamba": mamba}


def lora(model: PreTrainedModel) -> nn.Module:
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # starts at zero, where the adapter does nothing
            nn.init.normal_(parameter, std=0.5)
    return adapted.eval()


def greedy_by_generate(model: nn.Module, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=30,
        eos_token_id=[2, 5, 6, 7],
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def assert_greedy_is_that_of_generate(
    model: nn.Module, way: BackendName, start: Sequence[int] = ()
) -> list[list[GeneratedCompletion]]:
    asked = [[*start, *prompt] for prompt in prompts(*LENGTHS)]
    generated = generate(model, None, asked, seeds(2, 1, 3, 1, 2, 1), GREEDY, way)
    for prompt, group in zip(asked, generated, strict=True):
        assert [sample.ids for sample in group] == [greedy_by_generate(model, prompt)] * len(group)
    return generated


@pytest.mark.parametrize(("way", "name"), WAYS)
def test_greedy_search_equals_generate_token_for_token(way: BackendName, name: str) -> None:
    assert_greedy_is_that_of_generate(FORKED[name](), way)


@pytest.mark.parametrize("name", FORKED)
def test_a_forward_of_ours_is_taken_where_the_model_is_of_a_known_kind(name: str) -> None:
    path, reason = path_of(FORKED[name](), GREEDY, max(LENGTHS))
    assert path == ("fused" if ("fused", name) in WAYS else "forked"), reason


@pytest.mark.parametrize("way", SHARED_PREFIX)
def test_prompts_that_begin_alike_get_what_each_would_get_alone(way: BackendName) -> None:
    assert_greedy_is_that_of_generate(llama(), way, start=[7, 11, 13] * 5)


@pytest.mark.parametrize("name", FALLING_BACK)
def test_a_model_without_shared_prefix_support_samples_through_generate(name: str) -> None:
    assert path_of(FALLING_BACK[name](), GREEDY, max(LENGTHS))[0] == "generate"
    assert_greedy_is_that_of_generate(FALLING_BACK[name](), "generate")


def test_a_lora_adapter_takes_part() -> None:
    assert path_of(lora(llama()), GREEDY, max(LENGTHS))[0] == "forked"
    generated = assert_greedy_is_that_of_generate(lora(llama()), "forked")
    assert generated != generate(llama(), None, prompts(*LENGTHS), seeds(2, 1, 3, 1, 2, 1), GREEDY)


def whole_forward(model: nn.Module, prompt: list[int], ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize(("way", "name"), WAYS)
def test_log_probabilities_are_those_of_a_forward_over_the_whole_sequence(way: BackendName, name: str) -> None:
    model = FORKED[name]()
    settings = SamplingParams(temperature=1.5, max_completion_length=30, eos_ids=(2, 5), batch_size=7)
    generated = generate(model, None, prompts(*LENGTHS), seeds(2, 1, 3, 1, 2, 1), settings, way)
    for prompt, group in zip(prompts(*LENGTHS), generated, strict=True):
        for sample in group:
            expected = whole_forward(model, prompt, sample.ids)
            assert torch.allclose(torch.tensor(sample.logprobs), expected, atol=1e-4)


def test_prompts_of_more_tokens_than_fit_at_once_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raftune.policies.causal_lm.sampling.shared_prefix.PREFILL_TOKENS", 20)
    assert_greedy_is_that_of_generate(llama(), "fused")
    assert_greedy_is_that_of_generate(gpt2(), "forked")


@pytest.mark.parametrize("way", SHARED_PREFIX)
@pytest.mark.parametrize("warp", [{}, {"top_p": 0.9, "repetition_penalty": 1.3}], ids=["plain", "with a history"])
def test_looking_at_tokens_every_few_steps_changes_no_completion(way: BackendName, warp: dict[str, float]) -> None:
    model = llama()
    settings = SamplingParams(
        max_completion_length=29, eos_ids=(2, 5, 8), batch_size=9, stop_strings=("q", "c"), **warp
    )
    generated = []
    for sync_every in (1, 3, 8, 100):
        asked = prompts(*[5] * 4, CONTEXT - 4, CONTEXT - 20), seeds(3, 2, 5, 2, 4, 3)
        batch = CompletionBatch(characters(), *asked, settings, CONTEXT)
        generate_shared_prefix(model, batch, fused=way == "fused", sync_every=sync_every)
        generated.append([completion for group in batch.completions() for completion in group])
    # Rows that are computed beyond their end belong to the batch, whose size changes the last bits.
    for others in zip(*generated, strict=True):
        assert len({(tuple(ids), finish) for ids, _, finish in others}) == 1
        assert np.ptp([logprobs for _, logprobs, _ in others], axis=0).max() < 2e-5
    finished = Counter(completion.finish for completion in generated[0])
    assert min(finished[reason] for reason in ("eos", "stop", "length")) > 1


@pytest.mark.parametrize("way", SHARED_PREFIX)
def test_looking_at_tokens_every_few_steps_gives_the_same_bits_where_rows_end_together(way: BackendName) -> None:
    batches = [
        CompletionBatch(None, prompts(5, 9), seeds(3, 4), SamplingParams(max_completion_length=29), CONTEXT)
        for _ in range(3)
    ]
    for batch, sync_every in zip(batches, (1, 8, 100), strict=True):
        generate_shared_prefix(llama(), batch, fused=way == "fused", sync_every=sync_every)
    assert batches[0].completions() == batches[1].completions() == batches[2].completions()


def test_a_device_that_runs_ahead_meets_the_host_once_every_few_tokens() -> None:
    class Counting(CompletionBatch):
        meetings = 0

        def extend(self, *args: Any) -> Any:
            self.meetings += 1
            return super().extend(*args)

    meetings = []
    for sync_every in (1, 8):
        batch = Counting(None, prompts(5, 6), seeds(4, 4), SamplingParams(max_completion_length=33), CONTEXT)
        generate_shared_prefix(llama(), batch, fused=True, sync_every=sync_every)
        meetings.append(batch.meetings)
    assert meetings == [33, 5]  # a prompt's first token, and four times eight


class Counted:
    """Counts the positions that a model's embedding is asked for: prompts (wider than one) and single steps."""

    def __init__(self, model: nn.Module) -> None:
        self.prompts = self.steps = self.most = 0
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        rows, width = inputs[0].shape
        if width > 1:
            self.prompts += rows
        else:
            self.steps += rows
            self.most = max(self.most, rows)


@pytest.mark.parametrize("way", SHARED_PREFIX)
def test_a_prompt_is_computed_once_for_all_its_completions_and_an_ended_row_never_again(way: BackendName) -> None:
    model = llama()
    counted = Counted(model)
    settings = SamplingParams(max_completion_length=40, eos_ids=(2, 5, 6, 7, 8, 9), batch_size=12)
    generated = generate(model, None, prompts(*[4, 8] * 10), seeds(*[4] * 20), settings, way)
    lengths = [len(sample.ids) for group in generated for sample in group]
    assert counted.prompts == 20
    assert counted.steps == sum(lengths) - len(
        lengths
    )  # a row's first token comes with its prompt, its last is not read
    assert counted.most <= 12


def test_a_group_larger_than_the_batch_is_generated_in_parts() -> None:
    model = llama()
    counted = Counted(model)
    settings = SamplingParams(max_completion_length=10, batch_size=4)
    small = generate(model, None, prompts(5, 6), seeds(11, 3), settings, "forked")
    assert counted.most == 4
    large = generate(model, None, prompts(5, 6), seeds(11, 3), SamplingParams(max_completion_length=10), "forked")
    assert [[sample.ids for sample in group] for group in small] == [
        [sample.ids for sample in group] for group in large
    ]


def test_half_precision_samples_what_its_own_forward_finds_likely() -> None:
    model = llama().to(torch.bfloat16)
    settings = SamplingParams(max_completion_length=20, eos_ids=(2,))
    path, reason = path_of(model, settings)
    assert path == "fused", reason
    generated = generate(model, None, prompts(*LENGTHS), seeds(2, 1, 3, 1, 2, 1), settings)
    for prompt, group in zip(prompts(*LENGTHS), generated, strict=True):
        for sample in group:
            expected = whole_forward(model, prompt, sample.ids)
            assert (torch.tensor(sample.logprobs) - expected).abs().mean() < 0.15


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def broken_at_step(model: nn.Module, step: int) -> None:
    steps = iter(range(step))

    def count(*_: object) -> None:
        if next(steps, None) is None:
            raise RuntimeError("broken on purpose")

    model.get_input_embeddings().register_forward_pre_hook(count)


@pytest.mark.parametrize("path", ["fused", "forked", "generate"])
@pytest.mark.parametrize("breaks", [False, True])
def test_a_model_is_left_as_it_was_even_by_a_generation_that_fails(path: str, breaks: bool) -> None:
    model = llama()
    model.train()
    model.model.layers[1].eval()
    if breaks:
        broken_at_step(model, 4)
    before = modes(model), model.config._attn_implementation, hooks(model), model.generation_config.to_dict()
    settings = SamplingParams(max_completion_length=8)
    if breaks:
        with pytest.raises(RuntimeError, match="on purpose"):
            generate(model, None, prompts(5, 6), seeds(2, 2), settings, path)
    else:
        generate(model, None, prompts(5, 6), seeds(2, 2), settings, path)
    after = modes(model), model.config._attn_implementation, hooks(model), model.generation_config.to_dict()
    assert after == before


def test_weights_can_still_be_trained_after_generation() -> None:
    model = llama()
    generate(model, None, prompts(5, 6), seeds(2, 2), SamplingParams(max_completion_length=8), "fused")
    model(input_ids=torch.tensor(prompts(6)), labels=torch.tensor(prompts(6))).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dropout_is_off_while_sampling() -> None:
    model: Callable[[], PreTrainedModel] = lambda: llama(attention_dropout=0.5)  # noqa: E731
    settings = SamplingParams(max_completion_length=12)
    generated = generate(model().train(), None, prompts(5, 6), seeds(2, 2), settings, "forked")
    assert generated == generate(model().eval(), None, prompts(5, 6), seeds(2, 2), settings, "forked")
    assert max(token for group in generated for sample in group for token in sample.ids) < VOCABULARY
