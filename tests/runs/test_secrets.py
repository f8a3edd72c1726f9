"""A judge's key reaches the judge, and nothing that is written, shown or hashed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from raftune.clients.chat import ChatEndpoint, chat_url
from raftune.config import validate
from raftune.config.rewards import RewardsConfig, RewardSpec
from raftune.config.secrets import HIDDEN, plain_secrets, redacted
from raftune.errors import ConfigError
from raftune.results.model_card import publish_model
from raftune.rewards import RewardBatch, load_reward, load_rewards
from raftune.rewards.resolve import FunctionReward
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import run
from tests.runs.http_judge import judging
from tests.runs.kill import tree
from tests.runs.test_reward_signals import sentences_config

pytestmark = pytest.mark.slow

KEY, OTHER = "k3y-of-the-judge-0001", "k3y-of-the-judge-0002"
FILE = """
def judge(completions, api_key, log, **columns):
    with open(log, "a") as file:
        print(api_key, file=file)
    if any(text == "d e f g" for text in completions):
        raise ValueError(f"401 for {api_key}")
    return [float(len(text)) for text in completions]
"""


def go(root: Path, spec: Any, **changes: Any) -> None:
    config = sentences_config(root, spec).model_dump(mode="json") | {"report": True}
    config["rewards"] |= {"batch_size": 1, "max_failure_fraction": 1.0}
    prompts = pa.table({"prompt": ["a", "b", "c", "d"]})
    run(validate(config), PythonObjects(train=lambda: prompts, held_out=lambda: prompts.slice(0, 2)))


def written(root: Path) -> dict[str, str]:
    """Every text file of the run, and the details of failed scores."""
    found = {str(path): path.read_text(errors="replace") for path in root.rglob("*") if path.is_file()}
    for path in root.rglob("score/chunk-*.parquet"):
        found[f"rows of {path}"] = str(pq.read_table(path).to_pylist())
    return found


@pytest.fixture
def judge(tmp_path: Path) -> str:
    (tmp_path / "judge.py").write_text(FILE)
    return f"{tmp_path / 'judge.py'}:judge"


def test_a_key_from_the_environment_reaches_the_reward_and_no_file_and_another_key_is_the_same_run(
    tmp_path: Path, judge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    spec = {"spec": judge, "options": {"api_key": "${JUDGE_KEY}", "log": str(tmp_path / "log")}}
    go(tmp_path / "run", spec)
    assert set((tmp_path / "log").read_text().split()) == {KEY}
    files = written(tmp_path / "run")
    assert not [name for name, text in files.items() if KEY in text]
    assert "401 for ${JUDGE_KEY}" in "".join(text for name, text in files.items() if name.startswith("rows"))
    assert "${JUDGE_KEY}" in (tmp_path / "run" / "config.yaml").read_text()
    assert "${JUDGE_KEY}" in (tmp_path / "run" / "report.html").read_text()

    before = tree(tmp_path / "run")
    monkeypatch.setenv("JUDGE_KEY", OTHER)
    go(tmp_path / "run", spec)
    assert tree(tmp_path / "run") == before
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match=r"options of .* names the environment variable 'JUDGE_KEY'.*not set"):
        go(tmp_path / "run", spec)


def test_a_key_in_plain_is_reported_hidden_on_the_page_and_refused_in_a_card_until_it_is_a_variable(
    tmp_path: Path, judge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"api_key": KEY, "log": str(tmp_path / "log")}
    with load_rewards(RewardsConfig(reward_funcs=({"spec": judge, "options": options},))) as rewards:
        assert "reward_funcs.0.api_key looks like a key or password" in rewards.notes()[0]
        assert rewards.notes() == ()
    root = tmp_path / "run"
    go(root, {"spec": judge, "options": options})
    assert KEY in (root / "config.yaml").read_text()  # resume needs it
    page = (root / "report.html").read_text()
    assert KEY not in page
    assert HIDDEN in page
    with pytest.raises(ConfigError, match=r"rewards.reward_funcs.0.options.api_key looks like a key"):
        publish_model(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    monkeypatch.setenv("JUDGE_KEY", KEY)
    before = {name: sha for name, sha in tree(root).items() if name.startswith("round-")}
    go(root, {"spec": judge, "options": options | {"api_key": "${JUDGE_KEY}"}})
    assert {name: sha for name, sha in tree(root).items() if name.startswith("round-")} == before
    assert not [name for name, text in written(root).items() if KEY in text and "superseded" not in name]


def test_a_key_in_an_address_or_a_header_is_sent_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with judging() as url:
        options = {"url": f"{url}/unknown?api_key=${{JUDGE_KEY}}", "headers": {"Authorization": "Bearer ${JUDGE_KEY}"}}
        with load_rewards(RewardsConfig(reward_funcs=({"spec": "http", "options": options},))) as rewards:
            detail = rewards.score(RewardBatch(["q"], ["a"]))[0].parts["http"].detail
    assert "HTTP 401: do not know" in detail
    assert KEY not in detail
    prints = [
        load_reward(RewardSpec(spec="http", options={"url": f"http://127.0.0.1/s?api_key={key}"})).fingerprint
        for key in (KEY, OTHER, "${JUDGE_KEY}")
    ]
    assert len(set(prints)) == 1
    endpoints = [
        ChatEndpoint(chat_url(f"http://127.0.0.1/v1?api_key={key}"), "m") for key in (KEY, OTHER, "${JUDGE_KEY}")
    ]
    assert len({endpoint._request([])[0] for endpoint in endpoints}) == 1
    assert endpoints[2].url == endpoints[0].url


def test_another_key_of_a_callable_is_the_same_reward_and_any_other_value_is_not() -> None:
    class Judge:
        def __init__(self, **given: Any) -> None:
            self.__dict__.update(given)

        def __call__(self, completions: list[str], **columns: Any) -> list[float]:
            return [0.0] * len(completions)

    def prints(**given: Any) -> str:
        return FunctionReward(Judge(**given)).fingerprint

    assert prints(api_key=KEY) == prints(api_key=OTHER)
    assert prints(pad_token="</s>") != prints(pad_token="<pad>")
    assert prints(model="judge-one-large") != prints(model="judge-two-large")


def test_what_looks_like_a_secret_is_found_by_its_name_or_its_form_and_nothing_else() -> None:
    given = {
        "api_key": KEY,
        "headers": {"Authorization": f"Bearer {KEY}", "X-Api-Key": KEY, "Accept": "application/json"},
        "hf_token": "x" * 20,
        "nested": [{"password": "hunter2hunter2"}],
        "value": "sk-abcdefghijkl",
        "url": f"https://me:{KEY}@host/score?model=large&api_key={KEY}",
        "by_reference": "${JUDGE_KEY}",
        "api_key_env": "JUDGE_KEY_VARIABLE",
        "tokenizer": "org/tokenizer-of-a-model",
        "max_tokens": "1000000000",
        "eos_token": "<|endoftext|>",
        "secret": "",
        "password": "${JUDGE_KEY}",
        "pattern": "^a${2}",
    }
    shown = yaml.safe_dump(redacted(given))
    assert KEY not in shown
    assert list(plain_secrets(given)) == [
        "api_key",
        "headers.Authorization",
        "headers.X-Api-Key",
        "hf_token",
        "nested.0.password",
        "value",
        "url",
    ]
    unchanged = ("by_reference", "api_key_env", "tokenizer", "max_tokens", "eos_token", "secret", "password", "pattern")
    assert {name: redacted(given)[name] for name in unchanged} == {name: given[name] for name in unchanged}
    assert redacted(given)["url"] == f"https://me:{HIDDEN}@host/score?model=large&api_key={HIDDEN}"
