"""Sequence-classification models as rewards: tiny random ones, real tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from raftune.config.rewards import RewardsConfig, RewardSpec
from raftune.errors import ConfigError, RewardError
from raftune.records import ScoreStatus
from raftune.rewards import RewardBatch, load_reward, load_rewards

torch.set_num_threads(1)
WORDS = ["<pad>", "<s>", "</s>", "[CLS]", "<unk>", "user", "assistant", ":", *"abcdefghijklmnopqrstuvwxyz"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
PROMPTS = ["a b", "c", "d e f g", "a"] * 5
COMPLETIONS = [" h", " i j k l m", "", " n o"] * 5


def tokenizer(*, pad: bool = True, eos: bool = True, chat: bool = False, cls: bool = False) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if cls:
        inner.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 3)])
    special = {"unk_token": "<unk>"} | ({"pad_token": "<pad>"} if pad else {}) | ({"eos_token": "</s>"} if eos else {})
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **special, **({"cls_token": "[CLS]"} if cls else {}))
    made.chat_template = TEMPLATE if chat else None
    return made


def llama(labels: int = 1, cls: type[Any] = LlamaForSequenceClassification) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(WORDS), num_labels=labels, max_position_embeddings=16, initializer_range=1.0, **sizes
    )
    return cls(config).eval()


def saved(folder: Path, model: Any, words: PreTrainedTokenizerFast) -> str:
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("one") / "rm", llama(), tokenizer(chat=True))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = llama(2)
    model.config.id2label, model.config.label2id = {0: "kind", 1: "toxic"}, {"kind": 0, "toxic": 1}
    return saved(tmp_path_factory.mktemp("two"), model, tokenizer())


def logits(model: Any, text: str) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[WORDS.index(word) for word in text.split()]])).logits[0].double()


def made(spec: str, **options: Any) -> Any:
    return load_reward(RewardSpec(spec=spec, options=options))


def test_a_reward_model_s_score_does_not_depend_on_the_rest_of_the_batch(folder: str) -> None:
    values = made(folder)(prompts=PROMPTS, completions=COMPLETIONS)
    model = llama()
    model.config.pad_token_id = 0
    alone = [float(logits(model, p + c)[0]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert values == pytest.approx(alone, abs=1e-5)
    assert len(set(values)) > 3
    assert made(folder, batch_size=3)(prompts=PROMPTS, completions=COMPLETIONS) == pytest.approx(alone, abs=1e-5)
    assert made(folder)(prompts=PROMPTS, completions=COMPLETIONS) == values


def test_messages_go_through_the_chat_template(folder: str) -> None:
    prompts = [[{"role": "user", "content": "a b"}]]
    value = made(folder)(prompts=prompts, completions=[[{"role": "assistant", "content": "c"}]])[0]
    model = llama()
    model.config.pad_token_id = 0
    assert value == pytest.approx(float(logits(model, "user : a b </s> assistant : c </s>")[0]), abs=1e-5)


def test_of_a_classifier_the_named_label_is_rewarded_by_log_odds_or_probability(two: str) -> None:
    asked = {"prompts": PROMPTS, "completions": COMPLETIONS}
    model = llama(2)
    model.config.pad_token_id = 0
    pairs = [logits(model, p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    odds = made(two, label=1)(**asked)
    assert odds == pytest.approx([float(pair[1] - pair[0]) for pair in pairs], abs=1e-5)
    assert made(two, label="toxic")(**asked) == odds
    shares = made(two, label="kind", output="probability")(**asked)
    assert shares == pytest.approx([float(torch.softmax(pair, 0)[0]) for pair in pairs], abs=1e-6)


def test_of_many_labels_the_log_odds_are_against_all_others(tmp_path: Path) -> None:
    spec = saved(tmp_path, llama(3), tokenizer())
    share = made(spec, label=2, output="probability")(prompts=["a"], completions=[" b"])[0]
    model = llama(3)
    assert share == pytest.approx(float(torch.softmax(logits(model, "a b"), 0)[2]), abs=1e-6)


def test_without_the_prompt_the_bare_text_of_the_completion_is_scored(two: str) -> None:
    reward = made(two, label=1, include_prompt=False)
    said = [[{"role": "assistant", "content": "b c"}]]
    assert reward(prompts=[[{"role": "user", "content": "a"}]], completions=said) == reward(
        prompts=["x"], completions=["b c"]
    )


def test_a_tokenizer_with_a_classification_token_puts_it_before_plain_texts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=len(WORDS), num_labels=1, max_position_embeddings=16, **sizes)
    )
    spec = saved(tmp_path, model, tokenizer(cls=True))
    asked = {"prompts": ["a"], "completions": [" b"]}
    assert made(spec)(**asked)[0] == pytest.approx(float(logits(model.eval(), "[CLS] a b")[0]), abs=1e-6)
    assert made(spec, add_special_tokens=False)(**asked)[0] == pytest.approx(float(logits(model, "a b")[0]), abs=1e-6)


def test_a_text_beyond_the_models_context_loses_its_beginning(folder: str) -> None:
    words = "a b c d e f g h i j k l m n o p q r s t"
    reward = made(folder)
    assert reward(prompts=[words], completions=[" u"]) == reward(
        prompts=[" ".join(words.split()[-15:])], completions=[" u"]
    )
    assert made(folder, max_length=2)(prompts=[words], completions=[" u"]) == reward(prompts=["t"], completions=[" u"])


def test_an_eos_token_is_appended_once_where_asked(folder: str) -> None:
    plain, ended = made(folder), made(folder, append_eos=True)
    wanted = plain(prompts=["a"], completions=[" </s>"])
    assert ended(prompts=["a", "a"], completions=[" ", " </s>"]) == pytest.approx(wanted * 2, abs=1e-6)
    assert plain(prompts=["a"], completions=[" "]) != pytest.approx(wanted)


@pytest.mark.parametrize("config_pad", [None, 0, 2, 9, -1])
@pytest.mark.parametrize("words", [{}, {"pad": False}, {"pad": False, "eos": False}])
def test_scores_are_those_of_the_pipeline_of_transformers_whatever_pads(
    tmp_path: Path, config_pad: int | None, words: dict[str, bool]
) -> None:
    """Token 2 is EOS, 9 is `b`: a head that takes it for padding reads the token before it, also in the pipeline."""
    model = llama()
    model.config.pad_token_id = config_pad
    spec = saved(tmp_path / "rm", model, tokenizer(**words))
    prompts, completions = ["a b", "c", "d e f g", "a"], [" h </s>", " i j k l m </s>", " </s>", " n b"]
    pipe = pipeline("text-classification", spec, function_to_apply="none", device="cpu")
    wanted = [pipe(p + c)[0]["score"] for p, c in zip(prompts, completions, strict=True)]
    reward = made(spec, batch_size=3)
    assert reward(prompts=prompts, completions=completions) == pytest.approx(wanted, abs=1e-5)
    assert reward._model.config.pad_token_id == config_pad


def test_the_padding_that_a_model_reads_is_part_of_its_fingerprint(tmp_path: Path) -> None:
    found = set()
    for pad in (None, 0, 9):
        model = llama()
        model.config.pad_token_id = pad
        with load_rewards(RewardsConfig(), [model], tokenizers=[tokenizer()]) as rewards:
            found.add(rewards.fingerprint)
    assert len(found) == 3


def test_a_model_object_is_scored_with_a_copy_of_its_tokenizer() -> None:
    model, words = llama(), tokenizer(pad=False)
    with load_rewards(RewardsConfig(), [model], tokenizers=[words]) as rewards:
        scores = rewards.score(RewardBatch(PROMPTS, COMPLETIONS))
        assert rewards.names == ("LlamaForSequenceClassification",)
    assert [s.value for s in scores] == pytest.approx(
        [float(logits(llama(), p + c)[0]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)], abs=1e-5
    )
    assert words.pad_token is None


def test_a_model_with_nan_weights_gives_invalid_scores(tmp_path: Path) -> None:
    model = llama()
    torch.nn.init.constant_(model.score.weight, float("nan"))
    with load_rewards(RewardsConfig(reward_funcs=(saved(tmp_path, model, tokenizer()),))) as rewards:
        assert {s.status for s in rewards.score(RewardBatch(PROMPTS, COMPLETIONS))} == {ScoreStatus.INVALID}


def test_messages_for_a_model_without_a_template_are_an_error_with_the_way_out(two: str) -> None:
    config = RewardsConfig(reward_funcs=(RewardSpec(spec=two, options={"label": 1}),))
    with load_rewards(config) as rewards:
        score = rewards.score(
            RewardBatch([[{"role": "user", "content": "a"}]], [[{"role": "assistant", "content": "b"}]])
        )[0]
    assert score.status is ScoreStatus.ERROR
    assert "no chat template" in next(iter(score.parts.values())).detail


def test_what_is_no_reward_model_is_refused_before_its_weights_are_read(tmp_path: Path, two: str) -> None:
    with pytest.raises(
        RewardError, match=r"has 2 labels \(0: kind, 1: toxic\), and a reward model has one\. Name the one"
    ):
        made(two)
    with pytest.raises(RewardError, match=r"has no label 'rude'; there are: 0: kind, 1: toxic"):
        made(two, label="rude")
    with pytest.raises(RewardError, match="is a LlamaForCausalLM: it has no head that gives a number"):
        made(saved(tmp_path / "lm", llama(cls=LlamaForCausalLM), tokenizer()))
    with pytest.raises(ConfigError, match=r"no folder './nowhere'"):
        made("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RewardError, match="its model cannot be read"):
        made(str(tmp_path / "empty"))
    llama().save_pretrained(tmp_path / "bare")
    with pytest.raises(RewardError, match="its tokenizer cannot be read"):
        made(str(tmp_path / "bare"))


def test_a_model_without_the_weights_of_its_head_is_refused(tmp_path: Path) -> None:
    spec = saved(tmp_path, llama(), tokenizer())
    llama().model.save_pretrained(tmp_path / "body")
    (tmp_path / "body" / "model.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(RewardError, match=r"its files lack '.*'; its numbers would be random"):
        load_rewards(RewardsConfig(reward_funcs=(spec,))).score(RewardBatch(["a"], ["b"]))


def test_the_fingerprint_follows_weights_and_options_and_is_the_same_for_equal_ones(
    folder: str, tmp_path: Path
) -> None:
    assert made(folder).fingerprint == made(folder).fingerprint
    other = llama()
    torch.nn.init.constant_(other.score.weight, 0.5)
    assert made(saved(tmp_path / "rm", other, tokenizer(chat=True))).fingerprint != made(folder).fingerprint
    assert made(folder, max_length=4).fingerprint != made(folder).fingerprint
    words = tokenizer()
    assert load_reward(llama(), tokenizer=words).fingerprint == load_reward(llama(), tokenizer=words).fingerprint
    assert load_reward(llama(), tokenizer=words).fingerprint != load_reward(other, tokenizer=words).fingerprint


def test_released_weights_are_read_again_when_needed(folder: str) -> None:
    with load_rewards(RewardsConfig(reward_funcs=(folder,))) as rewards:
        before = rewards.score(RewardBatch(PROMPTS, COMPLETIONS))
        rewards.release()
        assert rewards.score(RewardBatch(PROMPTS, COMPLETIONS)) == before


def test_the_folder_that_reward_train_wrote_is_a_spec_of_its_model(tmp_path: Path) -> None:
    saved(tmp_path / "reward" / "model", llama(), tokenizer())
    trained, model = (load_reward(str(path)) for path in (tmp_path / "reward", tmp_path / "reward" / "model"))
    assert trained.name == "reward"
    assert trained.fingerprint == model.fingerprint
