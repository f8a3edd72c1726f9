"""The built-in rewards of images: the numbers that they must give, and what they refuse."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from raftune.config.rewards import RewardSpec
from raftune.errors import ConfigError, RewardError
from raftune.rewards import load_reward
from raftune.rewards.builtin.aesthetic import AestheticReward, load_head, save_head
from raftune.rewards.builtin.clip import ClipModel
from raftune.rewards.builtin.clip_score import PICK_PROCESSOR, PickScoreReward
from raftune.rewards.check import LONG, example_images
from raftune.training.devices import choose_device, devices
from tests.builders import clip_image_processor, clip_tokenizer, save_tiny, tiny_clip, tiny_clip_model

PICTURES = example_images(mixed_sizes=True)
TEXTS = ["red", "a red disc", "blue", "x", "", LONG, "Naive?", "two words"] * 2


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "clip")


def scores_of(reward: Any, prompts: list[Any] | None = None, **columns: Any) -> list[float]:
    found = reward(prompts=prompts or TEXTS, completions=PICTURES.completions, **columns)
    return [float(value) for value in found]


def logits_per_image(folder: Path, seed: int = 0) -> torch.Tensor:
    """The model's own, of every image and every text, with padding and all in one call."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(PICTURES.completions, return_tensors="pt")
    with torch.inference_mode():
        found: torch.Tensor = model(**words, **pixels).logits_per_image
    return found


# -- CLIP --------------------------------------------------------------------------------------------------------------


def test_the_clip_score_is_the_models_own_logit_of_each_image_and_its_prompt(clip: Path) -> None:
    expected = logits_per_image(clip).diagonal().tolist()
    assert np.std(expected) > 0.5
    for batch_size in (1, 3, 32):
        spec = RewardSpec(spec="clip_score", options={"model": str(clip), "batch_size": batch_size})
        assert scores_of(load_reward(spec)) == pytest.approx(expected, abs=1e-4)


def test_the_cosine_is_the_logit_without_its_scale(clip: Path) -> None:
    scale = float(tiny_clip_model().logit_scale.detach().exp())
    expected = (logits_per_image(clip).diagonal() / scale).tolist()
    reward = load_reward(RewardSpec(spec="clip_score", options={"model": str(clip), "cosine": True}))
    assert scores_of(reward) == pytest.approx(expected, abs=1e-5)


def test_a_folder_a_model_and_a_pick_score_of_the_same_weights_score_alike(clip: Path) -> None:
    expected = logits_per_image(clip).diagonal().tolist()
    pick = {"model": str(clip), "processor": str(clip)}
    processor = CLIPProcessor(clip_image_processor(), clip_tokenizer())
    for reward in (
        load_reward(str(clip)),
        load_reward(RewardSpec(spec="pick_score", options=pick)),
        load_reward(tiny_clip_model(), tokenizer=processor, name="mine"),
    ):
        assert scores_of(reward) == pytest.approx(expected, abs=1e-4)
        assert reward.media == {"image"}


def test_only_the_published_pick_score_takes_the_published_processor() -> None:
    assert PickScoreReward().processor == PICK_PROCESSOR
    assert PickScoreReward(processor="mine").processor == "mine"
    assert PickScoreReward(model="mine").processor is None


def test_a_model_given_as_an_object_needs_its_processor() -> None:
    with pytest.raises(RewardError, match=r"needs its processor, which has no image_processor; got NoneType"):
        load_reward(tiny_clip_model())


def test_prompts_longer_than_the_encoder_reads_are_counted_once(clip: Path) -> None:
    reward: Any = load_reward(str(clip))
    scores_of(reward)
    (note,) = reward.notes()
    assert "1 of 8 prompts are longer than the 16 tokens" in note
    assert f"the longest has {len(clip_tokenizer()(LONG)['input_ids'])}" in note
    scores_of(reward)
    assert reward.notes() == ()


def test_text_beyond_the_limit_does_not_count(clip: Path) -> None:
    reward = load_reward(str(clip))
    assert scores_of(reward, [LONG] * 16) == scores_of(reward, [LONG + " red"] * 16)


def test_the_text_can_come_from_a_column(clip: Path) -> None:
    spec = RewardSpec(spec="clip_score", options={"model": str(clip), "column": "caption"})
    assert scores_of(load_reward(spec), list(range(16)), caption=TEXTS) == scores_of(load_reward(str(clip)))
    with pytest.raises(RewardError, match=r"options\.column names 'caption', which the prompts lack"):
        scores_of(load_reward(spec))
    with pytest.raises(RewardError, match=r"compares an image with a text; got int 0\. Name a column"):
        scores_of(load_reward(str(clip)), list(range(16)))


def test_features_are_unit_vectors_and_released_weights_are_read_again(clip: Path) -> None:
    model = ClipModel(str(clip))
    assert model.nbytes == 0
    first = model.image_features(PICTURES.completions)
    assert first.shape == (16, model.width)
    assert first.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1.0, rtol=1e-6)
    assert model.nbytes > 0
    model.release()
    assert model.nbytes == 0
    np.testing.assert_array_equal(model.image_features(PICTURES.completions), first)
    assert model.image_features([]).shape == model.text_features([]).shape == (0, model.width)


def test_fingerprints_follow_weights_processor_and_options_and_not_the_path(clip: Path, tmp_path: Path) -> None:
    other, same = tiny_clip(tmp_path / "other", seed=1), tiny_clip(tmp_path / "same")
    config = json.loads((other / "preprocessor_config.json").read_text())

    def of(folder: Path, **options: Any) -> str:
        return load_reward(RewardSpec(spec="clip_score", options={"model": str(folder), **options})).fingerprint

    assert of(clip) == of(same)
    prints = [of(clip), of(other), of(clip, cosine=True), of(clip, column="caption"), of(clip, dtype="bfloat16")]
    (same / "preprocessor_config.json").write_text(json.dumps(config | {"resample": 0}))
    assert len({*prints, of(same)}) == 6


def test_what_is_no_clip_model_is_refused_with_what_it_is(clip: Path, tmp_path: Path) -> None:
    llama = save_tiny(tmp_path / "llama")
    with pytest.raises(RewardError, match="is a LlamaForCausalLM, and CLIP scores need a CLIPModel"):
        load_reward(RewardSpec(spec="clip_score", options={"model": str(llama)}))
    for missing, what in (("preprocessor_config.json", "image processor"), ("tokenizer.json", "tokenizer")):
        folder = tiny_clip(tmp_path / what)
        (folder / missing).unlink()
        with pytest.raises(RewardError, match=f"{what}.*(cannot be read|knows no words)"):
            load_reward(str(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", r"'./nowhere' must be the folder or .* CLIPModel; there is no folder /.*/nowhere\. Put it there"),
        ("nobody/nothing", r"there is no folder /.*, and the hub's cache has no configuration .*HF_HUB_OFFLINE is set"),
    ],
)
def test_a_missing_clip_model_is_reported_in_two_lines_and_not_in_the_hubs_words(name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        load_reward(RewardSpec(spec="clip_score", options={"model": name}))
    assert len(str(caught.value).replace(str(Path.cwd()), "")) < 260


# -- devices -----------------------------------------------------------------------------------------------------------


def test_a_device_that_is_not_there_is_refused_when_the_reward_is_named(clip: Path, tmp_path: Path) -> None:
    if "cuda:0" in devices():
        pytest.skip("this machine has a GPU")
    for spec in (str(clip), RewardSpec(spec="clip_score", options={"model": str(clip)})):
        with pytest.raises(ConfigError, match=r"rewards\.device must be a device of this machine; got 'cuda:3', and"):
            load_reward(spec, device="cuda:3")


def test_devices_are_read_as_torch_names_them() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert str(choose_device("auto")) == devices()[0].split(":")[0]
    with pytest.raises(ConfigError, match="must be auto, cpu, cuda, cuda:N or mps; got 'gpu'"):
        choose_device("gpu")


# -- the aesthetic head ------------------------------------------------------------------------------------------------


def layers(*sizes: int, seed: int = 0) -> list[tuple[Any, Any]]:
    random = np.random.default_rng(seed)
    pairs = itertools.pairwise(sizes)
    return [(random.normal(size=(out, into)), random.normal(size=out)) for into, out in pairs]


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_the_aesthetic_score_is_the_network_over_the_unit_vector(clip: Path, tmp_path: Path, activation: Any) -> None:
    given = layers(12, 8, 4, 1)
    save_head(tmp_path / "head", given, clip=str(clip), activation=activation)
    modules: list[torch.nn.Module] = []
    for weight, bias in given:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data, linear.bias.data = torch.tensor(weight).float(), torch.tensor(bias).float()
        modules += [linear, torch.nn.ReLU() if activation == "relu" else torch.nn.Identity()]
    vectors = torch.from_numpy(ClipModel(str(clip)).image_features(PICTURES.completions))
    expected = torch.nn.Sequential(*modules[:-1])(vectors)[:, 0].tolist()
    reward = load_reward(RewardSpec(spec="aesthetic", options={"model": str(tmp_path / "head")}))
    assert scores_of(reward) == pytest.approx(expected, abs=1e-4)


def test_a_published_layout_is_read_whatever_stood_between_its_layers(clip: Path, tmp_path: Path) -> None:
    """The published predictor numbers its dropouts too: layers 0, 2, 4, 6, 7."""
    given = layers(12, 8, 4, 3, 2, 1)
    numbers = (0, 2, 4, 6, 7)
    arrays = {}
    for number, (weight, bias) in zip(numbers, given, strict=True):
        arrays |= {f"layers.{number}.weight": weight.astype(np.float32), f"layers.{number}.bias": bias.astype("f4")}
    save_file(arrays, tmp_path / "linear.safetensors")
    save_head(tmp_path / "head", given, clip=str(clip))
    bare = RewardSpec(spec="aesthetic", options={"model": str(tmp_path / "linear.safetensors"), "clip": str(clip)})
    assert scores_of(load_reward(bare)) == scores_of(load_reward(str(tmp_path / "head")))
    assert load_head(str(tmp_path / "linear.safetensors")).sizes == (12, 8, 4, 3, 2, 1)


def test_a_head_finds_its_clip_model_beside_it_and_its_fingerprint_follows_both(clip: Path, tmp_path: Path) -> None:
    tiny_clip(tmp_path / "clip")
    save_head(tmp_path / "head", layers(12, 1), clip="../clip")
    reward = load_reward(str(tmp_path / "head"))
    assert isinstance(reward, AestheticReward)
    prints = {reward.fingerprint}
    save_head(tmp_path / "head", layers(12, 1, seed=1), clip="../clip")
    prints.add(load_reward(str(tmp_path / "head")).fingerprint)
    tiny_clip(tmp_path / "clip", seed=1)
    prints.add(load_reward(str(tmp_path / "head")).fingerprint)
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "must name a folder with model.safetensors, or a safetensors file"),
        ({"layers.0.weight": (1, 13), "layers.0.bias": (1,)}, r"reads vectors of 13 numbers, and '.*' gives 12\. Name"),
        (
            {"layers.0.weight": (4, 12), "layers.0.bias": (4,)},
            r"must give one number; got layers.0.bias \(4,\)",
        ),
        ({"layers.0.weight": (1, 12)}, "each layer of .* must read what the one before gives"),
        (
            {
                "layers.0.weight": (4, 12),
                "layers.0.bias": (4,),
                "layers.1.weight": (1, 5),
                "layers.1.bias": (1,),
            },
            "each layer of .* must read what the one before gives",
        ),
        ({"vision.weight": (1, 12)}, "holds 'vision.weight', and a head holds linear layers only"),
        ({}, "got nothing"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    clip: Path, tmp_path: Path, arrays: dict[str, tuple[int, ...]] | None, message: str
) -> None:
    path = tmp_path / "head.safetensors"
    if arrays is not None:
        save_file({name: np.zeros(shape, np.float32) for name, shape in arrays.items()}, path)
    with pytest.raises(RewardError, match=message):
        load_reward(RewardSpec(spec="aesthetic", options={"model": str(path), "clip": str(clip)}))


def test_a_heads_configuration_that_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    save_head(tmp_path, layers(12, 1), clip=None)
    (tmp_path / "config.json").write_text('{"model_type": "aesthetic", "activation": "tanh", "clip": null}')
    with pytest.raises(RewardError, match=r"activation: none or relu; got .*'tanh'"):
        load_reward(str(tmp_path))


# -- file size and colours ---------------------------------------------------------------------------------------------


def image_of(pixels: Any) -> Image.Image:
    return Image.fromarray(np.asarray(pixels, np.uint8))


def one(spec: str, image: Image.Image, **options: Any) -> float:
    (found,) = load_reward(RewardSpec(spec=spec, options=options))(prompts=["x"], completions=[image])
    assert found is not None
    return found


def test_the_file_size_is_that_of_the_file_in_thousands_of_bytes() -> None:
    noise = image_of(np.random.default_rng(0).integers(0, 256, (64, 64, 3)))
    flat = image_of(np.full((64, 64, 3), 90))
    buffer = io.BytesIO()
    noise.save(buffer, format="JPEG", quality=50)
    assert one("file_size", noise, quality=50) == len(buffer.getvalue()) / 1000
    for options in ({}, {"quality": 20}, {"format": "png"}):
        assert one("file_size", noise, **options) > 2 * one("file_size", flat, **options) > 0
    assert one("file_size", noise, format="png") > 64 * 64 * 3 / 1000
    with pytest.raises(ConfigError, match="quality must be from 1 to 100; got 0"):
        load_reward(RewardSpec(spec="file_size", options={"quality": 0}))


def rows(*colours: tuple[int, int, int]) -> Image.Image:
    """Stripes of these colours, each four rows high."""
    return image_of(np.repeat(np.array(colours)[:, None], 4, axis=0) * np.ones((1, 8, 1)))


BLACK, WHITE, GREY, RED, BLUE, YELLOW = (
    (0, 0, 0), (255, 255, 255), (51, 51, 51), (255, 0, 0), (0, 0, 255), (255, 255, 0),
)  # fmt: skip
STATISTICS = [
    ("brightness", (BLACK,), 0.0),
    ("brightness", (WHITE,), 1.0),
    ("brightness", (BLACK, WHITE, RED), (1 + 0.299) / 3),
    ("contrast", (GREY,), 0.0),
    ("contrast", (BLACK, WHITE), 0.5),
    ("saturation", (GREY, WHITE, BLACK), 0.0),
    ("saturation", (RED, GREY), 0.5),
    ("saturation", ((255, 102, 102),), 0.6),
    ("colourfulness", (GREY, WHITE), 0.0),
    ("colourfulness", (RED,), 0.3 * np.hypot(1, 0.5)),
    ("colourfulness", (YELLOW, BLUE), 1.0),
    ("warmth", (RED,), 1.0),
    ("warmth", (BLUE, BLUE, RED), -1 / 3),
]


@pytest.mark.parametrize(("measure", "colours", "expected"), STATISTICS)
def test_a_statistic_of_colours_is_as_defined(measure: str, colours: Any, expected: float) -> None:
    assert one("colour", rows(*colours), measure=measure) == pytest.approx(expected, abs=1e-9)


def test_the_distance_to_a_colour_is_the_root_mean_square() -> None:
    assert one("colour", rows(RED), measure="distance", colour=[255, 0, 0]) == 0.0
    assert one("colour", rows(BLACK), measure="distance", colour=[255, 255, 255]) == 1.0
    assert one("colour", rows(RED, BLACK), measure="distance", colour=[255, 0, 0]) == pytest.approx(np.sqrt(1 / 6))


@pytest.mark.parametrize(
    "options", [{"measure": "distance"}, {"colour": [1, 2, 3]}, {"measure": "distance", "colour": [1, 2, 300]}]
)
def test_a_colour_that_cannot_be_meant_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="colour: "):
        load_reward(RewardSpec(spec="colour", options=options))


def test_grey_and_transparent_images_are_scored_as_rgb() -> None:
    assert one("colour", Image.new("L", (4, 4), 255)) == pytest.approx(1.0)
    assert one("colour", Image.new("1", (4, 4), 0)) == 0.0
