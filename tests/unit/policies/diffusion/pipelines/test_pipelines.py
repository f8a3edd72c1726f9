"""Through a binding a pipeline draws what it samples by itself, and keeps the latents of exactly those images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from PIL import Image

from raftune.errors import ConfigError, DataError, ModelError
from raftune.policies.diffusion.pipelines import adapter_of
from raftune.policies.diffusion.pipelines.base import Conditions, PipelineAdapter, PipelineCall, SchedulerStep, watched
from raftune.training.quiet import quiet
from tests.pipelines import CELLS, KINDS, SIZE, Kind, tiny_pipeline

TEXTS = ("a red circle", "the blue square on the left", "xyz", "")
LABELS = (1, 2, 3, 999)
UNCONDITIONAL = ("ddpm", "ddim")
FIXED = ("dit", *UNCONDITIONAL)
TEXTUAL = tuple(kind for kind in KINDS if kind not in FIXED)


def prompts_of(kind: Kind) -> tuple[Any, ...]:
    return LABELS if kind == "dit" else TEXTS


def call_of(kind: Kind, guidance: float = 1.0, **kwargs: Any) -> PipelineCall:
    """Three steps; where the pipeline can, images that are not square."""
    return PipelineCall(SIZE, SIZE if kind in FIXED else 24, 3, guidance, kwargs)


def generators(seeds: range) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def encoded_prompts(binding: PipelineAdapter, prompts: Any) -> Conditions:
    with torch.no_grad(), quiet():
        return binding.encode(prompts)


def generated(binding: PipelineAdapter, kind: Kind, rows: range, guidance: float) -> Any:
    conditions = encoded_prompts(binding, [prompts_of(kind)[row] for row in rows])
    with torch.no_grad(), quiet():
        away = binding.empty() if guidance > 1 else None
        return binding.sample(conditions, away, generators(rows), call_of(kind, guidance))


def plainly(pipe: DiffusionPipeline, kind: Kind, row: int, guidance: float) -> np.ndarray[Any, Any]:
    """What the pipeline gives by itself, asked as its users ask it: one prompt, one generator."""
    given: dict[str, Any] = {"num_inference_steps": 3, "generator": torch.Generator("cpu").manual_seed(row)}
    if kind == "dit":
        given |= {"class_labels": [LABELS[row]], "guidance_scale": guidance}
    elif kind not in UNCONDITIONAL:
        given |= {"prompt": TEXTS[row], "height": SIZE, "width": 24, "guidance_scale": guidance}
    if kind == "pixart":
        given["use_resolution_binning"] = False
    with quiet():
        return np.asarray(pipe(**given).images[0])


# -- generating --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_one_image_is_bit_for_bit_what_the_pipeline_gives(kind: Kind, guidance: float) -> None:
    pipe = tiny_pipeline(kind)
    binding = adapter_of(pipe)
    for row in range(2):
        ours = generated(binding, kind, range(row, row + 1), guidance)
        assert np.array_equal(np.asarray(ours.images[0]), plainly(pipe, kind, row, guidance))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_each_prompt_its_own_image(kind: Kind, guidance: float) -> None:
    pipe = tiny_pipeline(kind)
    batch = generated(adapter_of(pipe), kind, range(4), guidance)
    levels = np.stack([np.asarray(image) for image in batch.images]).astype(int)
    alone = np.stack([plainly(pipe, kind, row, guidance) for row in range(4)]).astype(int)
    assert np.abs(levels - alone).max() <= 1  # a batch sums in another order
    assert len(np.unique(levels.reshape(4, -1), axis=0)) == 4
    assert batch.finite == [True] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_kept_latents_decode_to_the_images(kind: Kind) -> None:
    binding = adapter_of(tiny_pipeline(kind))
    batch = generated(binding, kind, range(4), 1.0)
    call = call_of(kind)
    assert tuple(batch.x0.shape) == (4, *binding.latent_shape(call.height, call.width))
    with torch.no_grad():
        decoded = binding.to_pixels(batch.x0).permute(0, 2, 3, 1).numpy() * 255
    levels = np.stack([np.asarray(image) for image in batch.images])
    assert np.abs(decoded - levels).max() <= 0.51


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNCONDITIONAL])
def test_what_a_prompt_says_moves_the_image(kind: Kind) -> None:
    binding = adapter_of(tiny_pipeline(kind))
    conditions = encoded_prompts(binding, prompts_of(kind)[:2])
    with torch.no_grad():
        two = binding.sample(conditions, None, generators(range(1)) + generators(range(1)), call_of(kind))
    assert not np.array_equal(np.asarray(two.images[0]), np.asarray(two.images[1]))


def test_an_image_of_something_not_finite_is_marked() -> None:
    pipe = tiny_pipeline("ddpm")
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    assert generated(adapter_of(pipe), "ddpm", range(2), 1.0).finite == [False, False]


def test_unconditional_images_are_generated_in_bfloat16_too() -> None:
    pipe = tiny_pipeline("ddim")
    with quiet():
        pipe.to(torch.bfloat16)
    assert generated(adapter_of(pipe), "ddim", range(2), 1.0).x0.dtype == torch.bfloat16


# -- conditions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_conditions_stack_across_prompts_as_if_they_were_read_together(kind: Kind) -> None:
    binding = adapter_of(tiny_pipeline(kind))
    together = encoded_prompts(binding, prompts_of(kind))
    joined = Conditions.joined([encoded_prompts(binding, [prompt]) for prompt in prompts_of(kind)])
    assert joined.tensors.keys() == together.tensors.keys()
    for name, tensor in joined.tensors.items():
        torch.testing.assert_close(tensor, together.tensors[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_prompt_is_one_row_that_takes_the_place_of_any(kind: Kind) -> None:
    binding = adapter_of(tiny_pipeline(kind))
    with torch.no_grad(), quiet():
        mixed = Conditions.joined([encoded_prompts(binding, prompts_of(kind)[:2]), binding.empty()])
    noise = torch.randn((3, *binding.latent_shape(SIZE, SIZE)), generator=torch.Generator().manual_seed(0))
    same = noise[:1].expand_as(noise)
    with torch.no_grad():
        said = binding.predict(same, torch.tensor([500, 500, 500]), mixed)
    assert said.shape == noise.shape  # a learned variance is cut
    assert (len(said.unique(dim=0)) == 3) == (kind not in UNCONDITIONAL)


def test_flux_is_trained_under_the_guidance_at_which_it_samples() -> None:
    pipe = tiny_pipeline("flux")
    binding, call, steps = adapter_of(pipe), call_of("flux", 3.5), []  # type: ignore[var-annotated]
    conditions = encoded_prompts(binding, TEXTS[:2])
    with torch.no_grad(), watched(pipe.scheduler, steps.append):
        binding.sample(conditions, None, generators(range(2)), call)
    first: SchedulerStep = steps[0]
    told, expected = binding.unpacked(first.model_input, call), binding.unpacked(first.output, call)
    with torch.no_grad():
        ours = binding.predict(told, first.time.expand(2), binding.guided(conditions, 3.5))
        untold = binding.predict(told, first.time.expand(2), conditions)
    assert torch.equal(ours, expected)
    assert not torch.allclose(untold, expected, atol=1e-4)


def test_dit_of_another_number_of_classes_is_guided_away_from_its_own_null_class() -> None:
    pipe = tiny_pipeline("dit")
    own = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    pipe.transformer = DiTTransformer2DModel(**{**own, "num_embeds_ada_norm": 7}).eval()
    binding, call = adapter_of(pipe), call_of("dit", 3.0)
    steps: list[SchedulerStep] = []
    with torch.no_grad(), watched(pipe.scheduler, steps.append):
        binding.sample(encoded_prompts(binding, [6]), binding.empty(), generators(range(1)), call)
        first = steps[0]
        x_t = first.model_input[:1]
        towards = binding.predict(x_t, first.time.expand(1), encoded_prompts(binding, [6]))
        away = binding.predict(x_t, first.time.expand(1), binding.empty())
    torch.testing.assert_close(first.output[:1], away + 3.0 * (towards - away), rtol=1e-4, atol=1e-5)


def test_how_much_of_a_prompt_t5_reads_is_the_users_to_say() -> None:
    for kind, usual in (("sd3", 256), ("flux", 512), ("pixart", 120)):
        pipe = tiny_pipeline(kind)  # type: ignore[arg-type]
        short = adapter_of(pipe, {"max_sequence_length": 20})
        length = encoded_prompts(short, ["red"]).tensors["prompt_embeds"].shape[1]
        assert length == encoded_prompts(adapter_of(pipe), ["red"]).tensors["prompt_embeds"].shape[1] - usual + 20
        assert 20 in short.text_limits().values()


# -- images that were not generated here -------------------------------------------------------------------------------


def noise_image(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_from_elsewhere_gets_latents_of_the_generated_ones_shape_and_scale(kind: Kind) -> None:
    binding = adapter_of(tiny_pipeline(kind))
    with torch.no_grad():
        found = binding.to_latents([noise_image(0), noise_image(1)], torch.Generator().manual_seed(0))
    assert tuple(found.shape) == (2, *binding.latent_shape(SIZE, SIZE))
    if kind in UNCONDITIONAL:
        assert np.array_equal((binding.to_pixels(found)[0] * 255).round().permute(1, 2, 0), np.asarray(noise_image(0)))


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_latents_are_the_vaes_shifted_and_scaled_as_the_denoiser_sees_them(kind: Kind) -> None:
    pipe = tiny_pipeline(kind)
    config, image = pipe.vae.config, noise_image()
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        raw = pipe.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(0))
        ours = adapter_of(pipe).to_latents([image], torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours, (raw - (config.shift_factor or 0)) * config.scaling_factor)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        (1000, r"whole numbers from 0 to 999; got 1000\. A model of classes reads no text, and knows no other class"),
        (-1, r"from 0 to 999; got -1"),
        ("a cat", r"got 'a cat'\. A model of classes reads no text"),
        ("17", r"got '17'\. Write 17 as a number, without quotes"),
        (True, r"got True"),
        (1.0, r"got 1\.0"),
        ("tench", r"got 'tench'\. Write its number, 0, as a number"),
    ],
)
def test_what_is_no_class_label_is_refused(prompt: Any, why: str) -> None:
    pipe = tiny_pipeline("dit")
    pipe.labels = {"tench": 0}
    with pytest.raises(DataError, match=why):
        adapter_of(pipe).encode([3, prompt])


@pytest.mark.parametrize("kind", TEXTUAL)
def test_a_label_is_no_text(kind: Kind) -> None:
    with pytest.raises(DataError, match=r"Pipeline must be texts; got 3\. Write what the image shows"):
        adapter_of(tiny_pipeline(kind)).encode([3])


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        *[("sd", "tokenizer"), ("sdxl", "text_encoder_2"), ("sd3", "text_encoder"), ("flux", "tokenizer_2")],
        ("pixart", "text_encoder"),
    ],
)
def test_a_pipeline_without_what_reads_prompts_says_what_it_lacks(kind: Kind, part: str) -> None:
    pipe = tiny_pipeline(kind)
    setattr(pipe, part, None)
    with pytest.raises(ModelError, match=f"Pipeline has no {part}. Load it whole"):
        adapter_of(pipe).encode(["a red circle"])


@pytest.mark.parametrize("kind", FIXED)
def test_a_negative_prompt_means_nothing_where_none_is_read(kind: Kind) -> None:
    with pytest.raises(ConfigError, match=r"negative_prompt must not be given to .*; got 'ugly'\. .* leave it out"):
        adapter_of(tiny_pipeline(kind)).empty("ugly")


@pytest.mark.parametrize("kind", FIXED)
def test_an_architecture_of_one_size_refuses_every_other(kind: Kind) -> None:
    binding = adapter_of(tiny_pipeline(kind))
    binding.check_size(SIZE, SIZE)
    with pytest.raises(
        ConfigError, match=r"must be 16 x 16, at which alone .* generates; got 16 x 32\. Leave them out"
    ):
        binding.check_size(SIZE, 32)


@pytest.mark.parametrize("kind", TEXTUAL)
def test_a_size_between_the_cells_is_refused_with_its_neighbours(kind: Kind) -> None:
    binding = adapter_of(tiny_pipeline(kind))
    wrong = binding.multiple + 1
    fix = f"Write {binding.multiple} or {2 * binding.multiple}"
    with pytest.raises(ConfigError, match=rf"height must be a multiple of {binding.multiple} .* got {wrong}\. {fix}"):
        binding.check_size(wrong, binding.multiple)


def test_flux_takes_sizes_of_whole_packs() -> None:
    binding = adapter_of(tiny_pipeline("flux"))
    assert binding.multiple == 4
    assert binding.latent_shape(SIZE, 20) == (4, CELLS, 10)


def test_cleaning_captions_needs_what_cleans_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raftune.policies.diffusion.pipelines.pixart.is_ftfy_available", lambda: False)
    pipe = tiny_pipeline("pixart")
    assert adapter_of(pipe).reading()["clean_caption"] is False
    with pytest.raises(ConfigError, match="clean_caption needs beautifulsoup4 and ftfy"):
        adapter_of(pipe, {"clean_caption": True}).encode(["a red circle"])
