"""Generating images: what a batch gives is what the pipeline gives, whatever is generated beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from raftune.data.images import png_of, sha256_of_png
from raftune.errors import ConfigError, DataError, OutOfMemory
from raftune.policies.diffusion.images import columns_of, latents_of
from raftune.protocols import SupportsPromptCheck
from raftune.records import Prompt, samples_table
from raftune.training.quiet import quiet
from tests.pipelines import save_tiny
from tests.unit.policies.diffusion.runs import TEXTS, chunk, pixels, policy

KINDS = ("sd", "sd-v", "sdxl", "sd3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    root = tmp_path_factory.mktemp("pipelines")

    def saved(kind: Any) -> Path:
        return root / kind if (root / kind).is_dir() else save_tiny(kind, root / kind)

    return saved


def plainly(model: Path, text: str, seed: int, **options: Any) -> Any:
    """The image that the pipeline itself gives, for one prompt and one generator."""
    with quiet():
        pipe = DiffusionPipeline.from_pretrained(model)
        pipe.set_progress_bar_config(disable=True)
        generated = pipe(text, generator=torch.Generator().manual_seed(seed), num_inference_steps=2, **options)
    return generated.images[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_one_image_at_a_time_is_the_pipeline_s_own_bit_for_bit(
    kind: str, guidance: float, folder: Callable[[Any], Path], tmp_path: Path
) -> None:
    drawer = policy(folder(kind), tmp_path, kind, guidance_scale=guidance)
    [sample] = drawer.generate(chunk(TEXTS[:1], 1, batch_size=1, first_seed=7))
    assert sample.completion == png_of(plainly(folder(kind), TEXTS[0], 7, guidance_scale=guidance))
    assert sample.payload["image_sha256"] == sha256_of_png(sample.completion)


def test_the_negative_prompt_is_what_the_pipeline_makes_of_it(folder: Callable[[Any], Path], tmp_path: Path) -> None:
    away = {"guidance_scale": 4.0, "negative_prompt": "a blue square"}
    [sample] = policy(folder("sd"), tmp_path, **away).generate(chunk(TEXTS[:1], 1))
    assert sample.completion == png_of(plainly(folder("sd"), TEXTS[0], 0, **away))
    without = plainly(folder("sd"), TEXTS[0], 0, guidance_scale=4.0)
    assert sample.completion != png_of(without)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_depend_on_what_is_generated_beside_it(
    kind: str, folder: Callable[[Any], Path], tmp_path: Path
) -> None:
    """Batches of six across three prompts, and of four: up to the rounding of batches, a level of 255."""
    drawer = policy(folder(kind), tmp_path, kind)
    one, many = (drawer.generate(chunk(batch_size=size)) for size in (1, 6))
    for alone, beside in zip(one, many, strict=True):
        assert np.abs(pixels(alone) - pixels(beside)).max() <= 1
        x0, y0 = (
            latents_of(*(s.payload[n] for n in ("latents", "latents_shape", "latents_dtype"))) for s in (alone, beside)
        )
        torch.testing.assert_close(x0, y0, atol=1e-4, rtol=1e-4)
    assert len({s.completion for s in many}) == len(many)


def test_the_same_batches_give_the_same_bytes_in_another_instance(
    folder: Callable[[Any], Path], tmp_path: Path
) -> None:
    first, second = (policy(folder("sd"), tmp_path).generate(chunk(batch_size=4)) for _ in range(2))
    assert first == second


def test_prompts_read_before_change_nothing(folder: Callable[[Any], Path], tmp_path: Path) -> None:
    """A resumed run has read other prompts when it comes to a chunk: the chunk's bytes must not tell."""
    fresh, used = policy(folder("sd"), tmp_path / "a"), policy(folder("sd"), tmp_path / "b")
    used.generate(chunk(TEXTS[1:], 1))
    assert fresh.generate(chunk()) == used.generate(chunk())


def test_latents_are_what_the_decoder_was_given(folder: Callable[[Any], Path], tmp_path: Path) -> None:
    drawer = policy(folder("sd"), tmp_path)
    sample = drawer.generate(chunk())[3]
    kept = latents_of(*(sample.payload[name] for name in ("latents", "latents_shape", "latents_dtype")))
    assert tuple(kept.shape) == drawer.blank.latent_shape(16, 16)
    with torch.no_grad():
        again = (drawer.blank.to_pixels(kept[None])[0].permute(1, 2, 0).numpy() * 255).round()
    assert np.abs(again - pixels(sample)).max() <= 1


def test_an_evaluation_keeps_no_latents(folder: Callable[[Any], Path], tmp_path: Path) -> None:
    drawer = policy(folder("sd"), tmp_path)
    learned, judged = drawer.generate(chunk(scope="0001")), drawer.generate(chunk(scope="0001e"))
    assert [s.completion for s in learned] == [s.completion for s in judged]
    assert all(s.payload["latents"] for s in learned)
    assert {s.payload[name] for s in judged for name in ("latents", "latents_shape", "latents_dtype")} == {None}


def test_what_is_generated_fits_the_declared_columns(folder: Callable[[Any], Path], tmp_path: Path) -> None:
    drawer = policy(folder("sd"), tmp_path)
    table = samples_table(drawer.generate(chunk()), drawer.payload)
    table.validate(full=True)
    assert table.column("completion")[0].as_py().startswith(b"\x89PNG")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_latents_come_back_from_their_columns_bit_for_bit(dtype: torch.dtype) -> None:
    x0 = torch.randn((4, 3, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    columns = columns_of(x0)
    back = latents_of(*(columns[name] for name in ("latents", "latents_shape", "latents_dtype")))
    assert back.dtype == dtype and torch.equal(back, x0)
    with pytest.raises(DataError, match=r"must hold 75 numbers; got 60"):
        latents_of(columns["latents"], [5, 3, 5], columns["latents_dtype"])


# -- what is nothing to learn from -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_latents_that_are_not_finite_make_the_sample_invalid(folder: Callable[[Any], Path], tmp_path: Path) -> None:
    drawer = policy(folder("sd"), tmp_path)
    decode = drawer.frozen.pipe.vae.decode

    def broken(z: torch.Tensor, **kwargs: Any) -> Any:
        [decoded] = decode(z, **kwargs)
        decoded[1] = float("nan")
        return (decoded,)

    drawer.frozen.pipe.vae.decode = broken
    good, bad = drawer.generate(chunk(TEXTS[:1]))
    assert good.payload["invalid"] is None and good.completion
    assert bad.payload["invalid"] == "not finite"
    assert bad.completion is None and bad.payload["latents"] is None and bad.payload["image_sha256"] is None


def test_an_image_that_the_safety_checker_flags_is_withheld(
    folder: Callable[[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawer = policy(folder("sd"), tmp_path)

    def flags_the_first(pipe: Any, image: Any, device: Any, dtype: Any) -> Any:
        return image, [i == 0 for i in range(len(image))]

    monkeypatch.setattr(type(drawer.sampler.pipe), "run_safety_checker", flags_the_first)
    first, second = drawer.generate(chunk(TEXTS[:1]))
    assert first.payload["invalid"] == "flagged by the safety checker" and first.completion is None
    assert second.payload["invalid"] is None


def test_a_flat_image_is_kept_to_be_seen_and_not_to_be_learned(folder: Callable[[Any], Path], tmp_path: Path) -> None:
    drawer = policy(folder("sd"), tmp_path)
    decode = drawer.frozen.pipe.vae.decode
    drawer.frozen.pipe.vae.decode = lambda z, **kwargs: (torch.zeros_like(decode(z, **kwargs)[0]),)
    [sample] = drawer.generate(chunk(TEXTS[:1], 1))
    assert sample.payload["invalid"] == "flat: every pixel is the same colour"
    assert (pixels(sample) == 128).all() and sample.payload["latents"] is None


def test_memory_that_runs_out_is_reported_with_the_batch_size(
    folder: Callable[[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawer = policy(folder("sd"), tmp_path)
    forward = drawer.sampler.denoiser.forward

    def small(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(drawer.sampler.denoiser, "forward", small)
    with pytest.raises(OutOfMemory, match=r"got 4 rows .* smaller sampling.batch_size or sampling.diffusion.height"):
        drawer.generate(chunk(batch_size=4))
    assert len(drawer.generate(chunk(batch_size=2))) == 6


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_of_a_prompt_longer_than_the_encoder_reads_the_end_is_known_that_it_does_not_see(
    folder: Callable[[Any], Path], tmp_path: Path
) -> None:
    drawer = policy(folder("sd"), tmp_path)
    assert isinstance(drawer, SupportsPromptCheck)
    assert [drawer.unread(Prompt(text, text)) for text in TEXTS] == [None] * len(TEXTS)
    end = drawer.unread(Prompt("long", "a red circle on the left " * 4 + "with a hat"))
    assert end is not None and end.endswith("hat") and not end.startswith("a red circle on the left a")


def test_each_distinct_prompt_is_read_once_for_all_images_and_rounds(
    folder: Callable[[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawer = policy(folder("sd"), tmp_path)
    read: list[Any] = []
    encode = type(drawer.blank).encode
    monkeypatch.setattr(type(drawer.blank), "encode", lambda self, asked: read.extend(asked) or encode(self, asked))
    drawer.generate(chunk((*TEXTS, TEXTS[0]), 3))
    later = type(drawer).load(drawer.config, drawer.folder, drawer.start_folder)
    later.generate(chunk(TEXTS, 2))
    assert sorted(read) == sorted(TEXTS)


def test_a_memory_of_few_bytes_forgets_what_was_asked_for_longest_ago(
    folder: Callable[[Any], Path], tmp_path: Path
) -> None:
    drawer = policy(folder("sd"), tmp_path)
    expected = drawer.generate(chunk())
    drawer.encoder.limit = 1
    assert drawer.generate(chunk()) == expected
    assert not drawer.frozen.encoded


@pytest.mark.parametrize(
    ("kind", "texts", "message"),
    [
        ("sd", ("a", 3), r"prompt p1: prompts of a StableDiffusionPipeline must be texts; got 3"),
        ("sd", ([{"role": "user", "content": "a"}],), r"prompt p0: .* must be texts"),
        ("dit", (0, 1000), r"prompt p1: prompts of a DiTPipeline must be class labels.* got 1000"),
        ("dit", ("cat",), r"prompt p0: prompts of a DiTPipeline must be class labels"),
    ],
)
def test_a_prompt_that_the_architecture_does_not_take_is_named_before_generation(
    kind: Any, texts: tuple[Any, ...], message: str, folder: Callable[[Any], Path], tmp_path: Path
) -> None:
    drawer = policy(folder(kind), tmp_path, kind)
    with pytest.raises(DataError, match=message):
        drawer.generate(chunk(texts, 1))
    assert drawer.nbytes == drawer.frozen.nbytes, "no denoiser was read in vain"


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("sd", {"height": 20}, r"sampling.diffusion.height must be a multiple of 8 .*; got 20. Write 16 or 24"),
        ("sd", {"width": 3}, r"sampling.diffusion.width must be a multiple of 8 .*; got 3"),
        ("sd", {"negative_prompt": "ugly"}, r"negative_prompt has an effect with guidance_scale above 1 only"),
        ("sd", {"pipeline_kwargs": {"guidance": 3}}, r"must be what StableDiffusionPipeline takes; got 'guidance'"),
        ("sd", {"pipeline_kwargs": {"generator": 3}}, r"must not hold 'generator': raftune sets it. Remove it"),
        ("sd", {"pipeline_kwargs": {"height": 3}}, r"raftune sets it. Use sampling.diffusion.height"),
        (
            "sd",
            {"pipeline_kwargs": {"num_images_per_prompt": 3}},
            r"'num_images_per_prompt': raftune sets it. Use sampling.num_generations",
        ),
        ("sdxl", {"pipeline_kwargs": {"original_size": [8, 8]}}, r"must not hold 'original_size': the denoiser is"),
        ("ddpm", {"guidance_scale": 2.0}, r"guidance_scale means nothing to a DDPMPipeline; got 2.0"),
        ("ddpm", {"guidance_scale": None, "negative_prompt": "x"}, r"negative_prompt means nothing to a DDPMPipeline"),
    ],
)
def test_an_option_that_this_pipeline_cannot_follow_is_refused(
    kind: Any, options: dict[str, Any], message: str, folder: Callable[[Any], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        policy(folder(kind), tmp_path, kind, **options)


def test_options_that_are_not_given_are_the_pipeline_s_defaults(folder: Callable[[Any], Path], tmp_path: Path) -> None:
    call = policy(folder("sdxl"), tmp_path, "sdxl", num_inference_steps=None, guidance_scale=None).call
    assert (call.num_inference_steps, call.guidance_scale) == (50, 5.0)
    assert (call.height, call.width) == (16, 16)


@pytest.mark.slow
def test_an_option_of_the_pipeline_takes_effect(folder: Callable[[Any], Path], tmp_path: Path) -> None:
    plain = policy(folder("sd"), tmp_path / "a").generate(chunk(TEXTS[:1], 1))
    noisy = policy(folder("sd"), tmp_path / "b", pipeline_kwargs={"eta": 1.0}).generate(chunk(TEXTS[:1], 1))
    assert plain[0].completion != noisy[0].completion
    assert noisy[0].completion == png_of(plainly(folder("sd"), TEXTS[0], 0, guidance_scale=1.0, eta=1.0))


def test_another_size_is_generated_where_it_is_configured(folder: Callable[[Any], Path], tmp_path: Path) -> None:
    [sample] = policy(folder("sd"), tmp_path, height=24, width=32).generate(chunk(TEXTS[:1], 1))
    assert pixels(sample).shape == (24, 32, 3)
    assert sample.payload["latents_shape"] == [4, 12, 16]
