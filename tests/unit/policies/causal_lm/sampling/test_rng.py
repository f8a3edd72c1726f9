"""Noise is Philox4x32-10, uniform, and a function of seed and step alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raftune.policies.causal_lm.sampling.token_choice import philox4x32, uniforms, uniforms_on

# The generator's published known answers: counter, key, output.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[np.ndarray]:
    return [np.array([int(word, 16)], dtype=np.uint64) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_philox_gives_its_published_answers(counter: str, key: str, output: str) -> None:
    found = philox4x32(words(counter), words(key))
    assert [f"{int(word[0]):08x}" for word in found] == output.split()


def test_the_seed_is_the_key_and_the_step_the_counter() -> None:
    seed, step = 0x299F31D0_A4093822, 0x85A308D3_243F6A88
    zero = np.zeros(1, dtype=np.uint64)
    counter, key = words("243f6a88 85a308d3"), words("a4093822 299f31d0")
    first, second, _, _ = philox4x32([*counter, zero, zero], key)
    bits = (int(first[0]) << 21) ^ (int(second[0]) >> 11)
    assert uniforms([seed], [step])[0] == bits / 2**53


def test_a_number_does_not_depend_on_what_is_computed_beside_it() -> None:
    seeds, steps = np.arange(2**62, 2**62 + 50), np.arange(40)
    table = uniforms(seeds[:, None], steps[None])
    assert table[17, 31] == uniforms([seeds[17]], [31])[0]
    order = np.random.default_rng(0).permutation(50)
    assert np.array_equal(uniforms(seeds[order][:, None], steps[None]), table[order])


def test_numbers_are_uniform_over_seeds_and_over_steps() -> None:
    for table in (uniforms(np.arange(200_000), 3), uniforms(5, np.arange(200_000))):
        assert table.min() >= 0
        assert table.max() < 1
        share = np.histogram(table, bins=20, range=(0, 1))[0] / len(table)
        # Hoeffding over 20 bins and both tables: a false alarm in 1e-6 of the seeds.
        assert np.abs(share - 1 / 20).max() < np.sqrt(np.log(2 * 40 / 1e-6) / (2 * len(table)))


def test_neighbouring_seeds_and_steps_are_uncorrelated() -> None:
    table = uniforms(np.arange(1000)[:, None], np.arange(200)[None]) - 0.5
    for one, other in ((table[1:], table[:-1]), (table[:, 1:], table[:, :-1])):
        # Products lie in [-1/4, 1/4]; Hoeffding at 1e-6 over both directions.
        assert abs((one * other).mean()) < 0.5 * np.sqrt(np.log(4 / 1e-6) / (2 * one.size))


def test_seeds_that_differ_in_the_high_bits_only_differ_in_their_noise() -> None:
    assert uniforms([1], [0])[0] != uniforms([1 + 2**40], [0])[0]


def test_numbers_computed_in_tensors_have_the_bits_of_those_computed_in_arrays() -> None:
    rng = np.random.default_rng(4)
    seeds = rng.integers(0, 2**64, size=(500, 1), dtype=np.uint64)
    seeds[:3, 0] = 0, 2**63, 2**64 - 1
    steps = np.concatenate([np.arange(40), rng.integers(0, 2**40, size=40)])
    tensor = uniforms_on(torch.device("cpu"), seeds, steps)
    assert tensor.dtype == torch.float64
    assert np.array_equal(tensor.numpy(), uniforms(seeds, steps))
