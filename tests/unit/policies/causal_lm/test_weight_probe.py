"""The weight probe tells the model that was just trained from the one before, and from any other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from raftune.policies.causal_lm import CausalLM
from raftune.policies.causal_lm.weight_probe import CANNOT_TELL, WeightProbe, plain_log_probs, read_probe
from tests.builders import EOS, parts, save_tiny, tiny_llama, write_rows
from tests.unit.policies.causal_lm.fits import some_rows, trained


@pytest.fixture(scope="module", params=[(False, 1e-6), (True, 1e-5)], ids=["full", "lora"])
def rounds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[WeightProbe, Any, Any]:
    """The probe of a round, the log-probs of its ids under the round's model, and under the model before."""
    root = tmp_path_factory.mktemp("rounds")
    lora, rate = request.param
    config = parts(save_tiny(root / "base"), lora=lora, learning_rate=rate, num_train_epochs=1)
    out, _ = trained(config, root, write_rows(root / "rows.parquet", some_rows()))
    start = root / "round-0000" / "model"
    probe = read_probe(out)
    assert probe is not None
    new, old = (plain_log_probs(CausalLM.load(config, at, start).model, probe.examples, 0) for at in (out, start))
    return probe, new, old


def test_a_server_of_the_trained_weights_passes_and_one_of_the_weights_before_is_named(rounds: Any) -> None:
    probe, new, old = rounds
    assert probe.check(new, "float32") == ""
    assert np.abs(np.concatenate(new) - np.concatenate(old)).mean() < probe.allowed  # too near for the distance alone
    assert "it is nearer to that" in probe.check(old, "float32")
    whole = [[-1.0] * (len(prompt) - 1) + row for prompt, row in zip(probe.prompts, new, strict=True)]
    assert probe.check(whole, "float32") == ""  # those of the prompts do not count
    assert [ids[-1] for ids in probe.ids].count(EOS) > 0 and len(probe.ids) == len(new)


def test_another_model_is_named_with_its_distance(rounds: Any) -> None:
    probe, _, _ = rounds
    other = plain_log_probs(tiny_llama(7), probe.examples, 0)
    assert "nats a token on the same tokens, and 0.001 are allowed" in probe.check(other, "float32")
    assert "0.1 are allowed" in probe.check(other, "bfloat16")
    assert "nan" in probe.check([[float("nan")] * len(row) for row in other], "float32")
    assert "a log-probability for each token" in probe.check(other[1:], "float32")


def test_where_rounding_hides_what_a_round_changed_the_check_says_that_it_cannot_tell(rounds: Any) -> None:
    probe, new, old = rounds
    random = np.random.default_rng(0)
    for served in (new, old):
        rounded = [[nats + random.normal(scale=0.05) for nats in row] for row in served]
        assert probe.check(rounded, "bfloat16").startswith(CANNOT_TELL)
    assert replace(probe, before=None).check(old, "float32") == ""  # as a probe of an older version
    from_the_start = replace(probe, before=[])  # the model before is not known: the distance alone decides
    assert from_the_start.check(new, "bfloat16").startswith(CANNOT_TELL)
    assert from_the_start.check(new, "float32") == ""
