"""A small zoo of chat templates: what each writes is what is generated from, learned and stopped at, today and
tomorrow.
"""

from __future__ import annotations

import datetime as calendar
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raftune.config.load import validate_as
from raftune.config.sampling import SamplingConfig
from raftune.config.sft import SftConfig
from raftune.data.classifier_inputs import templated
from raftune.errors import DataError
from raftune.policies.causal_lm import CausalLM, encoding
from raftune.policies.causal_lm.encoding import TextEncoder, keep_date, read_date, turn_end
from raftune.records import Prompt
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import resume, run
from raftune.sft import sft
from tests.builders import BOS, EOS, Killed, tiny_model, tiny_tokenizer
from tests.runs.test_causal_lm_runs import config, dying_after, tree

BEGIN = "{{ bos_token }}{% for m in messages %}"
ASKS = "{% if add_generation_prompt %}"
ZOO = {
    "gemma": BEGIN + "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}" + ASKS + "<turn>model\n{% endif %}",
    "chatml": "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    + ASKS + "<turn>assistant\n{% endif %}",
    "instruct": BEGIN + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content | trim }} "
    "{{ eos_token }}{% endif %}{% endfor %}",
    "thinks": "{% for m in messages %}<turn>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<end_of_turn>\n{% endfor %}" + ASKS
    + "<turn>assistant\n{% endif %}",
    "without an end": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + ASKS
    + "assistant: {% endif %}",
    "rewrites": "{{ messages | length }}{% for m in messages %}{{ m.content }}<end_of_turn>{% endfor %}",
}  # fmt: skip
ANSWERS = {
    "gemma": ("ab", "<end_of_turn>"),
    "chatml": (" ab ", "<end_of_turn>"),
    "instruct": (" ab ", "</s>"),
    "thinks": ("<think>\n\n</think>\n\n ab ", "<end_of_turn>"),
    "without an end": (" ab ", "</s>"),
    "rewrites": (" ab ", "<end_of_turn>"),
}
DATED = "{{ strftime_now('%d %b %Y') }}|{% for m in messages %}{{ m.content }}</s>{% endfor %}"
TOOLS_SHOWN = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOL = {"name": "add", "parameters": {"z": "int"}}
ASKED = [{"role": "user", "content": "the cab"}]


def tokenizer_of(template: str, bos: bool = True) -> Any:
    tokenizer = tiny_tokenizer(bos=bos)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    tokenizer.chat_template = template
    return tokenizer


def encoder_of(template: str, date: str | None = None, **sampling: Any) -> TextEncoder:
    return TextEncoder(tokenizer_of(template), SamplingConfig(**sampling), None, EOS, date)


@pytest.mark.parametrize("name", ZOO)
def test_a_given_completion_is_what_the_template_writes_up_to_the_end_of_the_turn(name: str) -> None:
    encoder = encoder_of(ZOO[name])
    text, ids = encoder.encode_answer(Prompt("p", ASKED), " ab ")
    body, end = ANSWERS[name]
    assert (text, encoder.tokenizer.decode(ids)) == (body, body + end)
    assert ids[-1] == encoder.tokenizer.convert_tokens_to_ids(end)
    assert encoder.encode_answer(Prompt("p", ASKED), [{"role": "assistant", "content": " ab "}]) == (text, ids)


@pytest.mark.parametrize("name", [name for name in ZOO if name != "rewrites"])
def test_prompt_and_completion_together_are_the_dialogue_as_the_template_writes_it(name: str) -> None:
    encoder = encoder_of(ZOO[name])
    [prompt] = encoder.encode([Prompt("p", ASKED)], for_drawing=True)
    _, answer = encoder.encode_answer(Prompt("p", ASKED), " ab ")
    whole = encoder.tokenizer.apply_chat_template([*ASKED, {"role": "assistant", "content": " ab "}], tokenize=False)
    written = encoder.tokenizer.decode(prompt + answer)
    assert (written.removesuffix("</s>") if name == "without an end" else written) == whole.rstrip("\n")
    assert prompt.count(BOS) <= 1  # the template writes it, and the tokenizer, which would, does not


def test_a_completion_to_a_text_ends_with_eos_whatever_the_template_ends_turns_with() -> None:
    assert encoder_of(ZOO["gemma"]).encode_answer(Prompt("p", "the cab"), "ab")[1][-1] == EOS


def test_how_a_turn_ends_is_not_known_of_a_template_that_cannot_be_asked() -> None:
    for template in ("{{ raise_exception('no') }}", "{{ messages[0].content }}", ZOO["without an end"]):
        assert turn_end(tokenizer_of(template), None, {}) is None
    found = turn_end(tokenizer_of(ZOO["instruct"]), None, {})
    assert found is not None and (found.token_id, found.before, found.tail) == (EOS, " ", " </s>")


def test_the_end_of_a_turn_stops_what_is_generated_and_is_what_fine_tuning_teaches(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", ZOO["gemma"])
    rows = [{"prompt": [{"role": "user", "content": word}], "completion": "ab"} for word in "abcdefgh"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "output_dir": str(tmp_path / "sft"),
        "data": {"path": str(tmp_path / "rows.jsonl"), "held_out_fraction": 0},
        "policy": {"model": str(folder)},
        "training": {"learning_rate": 0.05, "num_train_epochs": 20, "per_device_train_batch_size": 8},
        "threads": 1,
    }
    learned = sft(validate_as(SftConfig, settings))
    asked = pa.table({"prompt": [row["prompt"] for row in rows]})
    seen: list[str] = []

    def reward(completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        seen.extend(completion[0]["content"] for completion in completions)
        return [float(ids[-1] == 262) for ids in completion_ids]

    run(
        config(
            tmp_path / "run",
            learned.root / "model",
            num_rounds=0,
            sampling={"num_generations": 1, "temperature": 0.0},
            data={"prompts": None},
            evaluation={"num_prompts": 8, "num_generations": 1, "prompts": "given as an object"},
        ),
        PythonObjects(held_out=lambda: asked, rewards=[reward]),
    )
    assert seen == ["ab"] * 8  # nothing follows the end of the turn, which is not EOS
    metrics = json.loads(next((tmp_path / "run").rglob("metrics.json")).read_text())
    assert metrics["reward"]["mean"] == 1.0


# -- the date --------------------------------------------------------------------------------------------------------


def saved(folder: Path, template: str) -> Path:
    tiny_model("llama").save_pretrained(folder)
    tokenizer_of(template).save_pretrained(folder)
    return folder


class Tomorrow(calendar.datetime):
    """A clock that is a day ahead."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return calendar.datetime.now(tz) + calendar.timedelta(days=1)


def test_a_template_that_writes_the_date_writes_that_of_the_run_also_when_it_is_resumed_tomorrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import chat_template_utils

    model = saved(tmp_path / "model", DATED)
    asked = pa.table({"prompt": [[{"role": "user", "content": word}] for word in "abcdefgh"]})
    objects = PythonObjects(train=lambda: asked, rewards=[length])
    settings: dict[str, Any] = {"num_rounds": 1, "evaluation": {"num_prompts": 0}}
    notes: list[str] = []
    run(
        config(tmp_path / "whole", model, **settings),
        objects,
        observe=lambda kind, facts: notes.extend(facts.get("notes", [])),
    )
    today = calendar.datetime.now().date().isoformat()
    assert read_date(tmp_path / "whole/round-0000/model") == today
    assert f"the chat template writes the date: in this run it is always {today}" in notes
    with pytest.raises(Killed):
        run(config(tmp_path / "cut", model, **settings), objects, observe=dying_after(12))
    monkeypatch.setattr(encoding, "datetime", Tomorrow)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    fresh = encoder_of(DATED)
    assert today not in fresh.tokenizer.decode(fresh.encode([Prompt("p", ASKED)], for_drawing=True)[0])
    resume(tmp_path / "cut", objects)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    rendered = encoder_of(DATED, today).encode([Prompt("p", ASKED)], for_drawing=True)[0]
    assert fresh.tokenizer.decode(rendered).startswith(f"{calendar.date.fromisoformat(today):%d %b %Y}|")
    start = tmp_path / "whole/round-0000/model"
    section = CausalLM.section_at({"model": str(model)}, tmp_path / "whole/round-0001/model", start)
    (tmp_path / "next").mkdir()
    keep_date(tmp_path / "next", section["tokenizer"], section["model"])
    assert read_date(tmp_path / "next") == today  # an evaluation of the run is asked as the run was


def length(completions: Any, **columns: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


def test_the_date_can_be_given_from_outside_and_is_kept_where_it_is_asked_for_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    keep_date(tmp_path)
    assert read_date(tmp_path) == "1970-01-02"
    assert read_date(tmp_path / "nowhere") is None


@pytest.mark.parametrize("form", ["%d %b %Y", "on %A, %-d. %B %y (100 %%d)", "%Y-%m-%d", "", "today"])
def test_every_form_of_a_date_is_that_of_the_given_day(form: str) -> None:
    template = f"\n  {{{{ strftime_now('{form}') }}}}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}"
    tokenizer = tokenizer_of(template)
    monday = calendar.datetime(2024, 1, 1)
    assert encoding.render(tokenizer, ASKED, "2024-01-01") == f"\n  {monday.strftime(form)}the cab"
    today = encoding.render(tokenizer, ASKED, calendar.date.today().isoformat())
    assert today == encoding.render(tokenizer, ASKED, None)


def test_a_reward_s_template_always_gets_the_same_date() -> None:
    assert templated(tokenizer_of(DATED), ASKED) == "26 Jul 2024|the cab</s>"


# -- tools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_the_tools_of_a_prompt_reach_the_template(tools: Any) -> None:
    encoder = encoder_of(TOOLS_SHOWN)
    for for_drawing in (True, False):
        [ids] = encoder.encode([Prompt("p", ASKED, {"tools": tools})], for_drawing=for_drawing)
        assert encoder.tokenizer.decode(ids) == f"{json.dumps([TOOL])}<user>the cab</s><assistant>"
    [ids] = encoder.encode([Prompt("p", ASKED, {"tools": None})], for_drawing=True)
    assert encoder.tokenizer.decode(ids) == "<user>the cab</s><assistant>"


@pytest.mark.parametrize("tools", ["a hammer", 7, ["a hammer"]])
def test_invalid_tools_are_refused_with_messages_and_passed_on_with_texts(tools: Any) -> None:
    with pytest.raises(DataError, match="column 'tools' must hold a list of JSON schemas"):
        encoder_of(TOOLS_SHOWN).encode([Prompt("p", ASKED, {"tools": tools})], for_drawing=True)
    assert encoder_of(TOOLS_SHOWN).encode([Prompt("p", "the cab", {"tools": tools})], for_drawing=True)


def test_a_call_of_a_tool_is_learned_as_the_template_writes_it() -> None:
    encoder = encoder_of(TOOLS_SHOWN)
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    _, ids = encoder.encode_answer(Prompt("p", ASKED), [call])
    assert encoder.tokenizer.decode(ids) == '[{"name": "add"}]</s>'


def test_tools_reach_the_template_in_every_stage_and_in_fine_tuning(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", TOOLS_SHOWN)
    rows = [{"prompt": [{"role": "user", "content": w}], "tools": [TOOL], "completion": w} for w in "abcdefgh"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told: list[str] = []
    encode = TextEncoder.encode

    def listening(self: TextEncoder, prompts: Any, *, for_drawing: bool) -> Any:
        found = encode(self, prompts, for_drawing=for_drawing)
        told.extend(self.tokenizer.decode(ids) for ids in found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "encode", listening)
        settings: dict[str, Any] = {
            "num_rounds": 1,
            "data": {"prompts": str(tmp_path / "rows.jsonl")},
            "selection": {"beta": 0.1},
            "sampling": {"max_completion_length": 4},
        }
        run(config(tmp_path / "run", model, **settings), PythonObjects(rewards=[length]))
        generated = len(told)
        sections = {"data": {"path": str(tmp_path / "rows.jsonl")}, "policy": {"model": str(model)}}
        learned = sft(validate_as(SftConfig, {"output_dir": str(tmp_path / "sft"), "threads": 1, **sections}))
    assert generated > 8 and len(told) > generated + 8
    assert all(text.startswith(json.dumps([TOOL])) for text in told)
    assert json.loads((learned.root / "prompts.jsonl").read_text().splitlines()[0])["tools"] == [TOOL]


def test_what_a_user_may_not_expect_of_a_chat_model_is_reported_once(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", ZOO["chatml"])
    (model / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "top_k": 0, "eos_token_id": [2]}')
    notes: list[str] = []
    run(
        config(tmp_path / "run", model, num_rounds=1, evaluation={"num_prompts": 0}),
        PythonObjects(
            train=lambda: pa.table({"prompt": ["a", "b"]}), rewards=[lambda completions, **_: [1.0, 0.0, 0.0] * 2]
        ),
        observe=lambda kind, facts: notes.extend(facts.get("notes", [])),
    )
    told = " ".join(notes)
    assert "it says temperature 0.6, top_p 0.9; sampling says temperature 1, top_p 1" in told
    assert "prompts given as text go in without it" in told
