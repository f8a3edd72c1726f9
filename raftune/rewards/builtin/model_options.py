"""Options of rewards that are models, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from raftune.rewards.registry import builtin

Dtype = Annotated[Literal["float32", "bfloat16", "float16"], Field(description="Precision of the model's weights.")]
Revision = Annotated[str | None, Field(description="Branch, tag or commit of a hub model.")]
PictureBatch = Annotated[int, Field(description="Images in a forward pass.")]

PICK_SCORE = "yuvalkirstain/PickScore_v1"
PICK_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # what it was trained with: its own folder has none


@builtin(
    "classifier",
    media=("text", "messages"),
    example={"model": "cardiffnlp/twitter-roberta-base-sentiment-latest", "label": "positive"},
    loads="raftune.rewards.builtin.classifier:ClassifierReward",
)
@dataclass
class ClassifierOptions:
    """A sequence-classification model: a reward model's number, or the log-odds of one label of a text classifier.

    Options that are null are those of the model's training, if `raftune reward train` made it. A folder or hub name as
    the spec stands for this reward with that model.
    """

    model: Annotated[str, Field(description="Folder or hub name of the model.")] = ""
    tokenizer: Annotated[str | None, Field(description="Folder or hub name; null: the model's own.")] = None
    label: Annotated[
        int | str | None, Field(description="Index or name of the rewarded label; only for models with several.")
    ] = None
    output: Annotated[
        Literal["log_odds", "probability"],
        Field(description="log_odds: a reward model's plain number; probability: in [0, 1]."),
    ] = "log_odds"
    normalize: Annotated[
        bool,
        Field(description="Return (r - mean) / std, with the model's scores of held-out completions of its training."),
    ] = False
    include_prompt: Annotated[
        bool | None,
        Field(description="Whether the prompt is an input, too; if not, a message's content only. null: it is."),
    ] = None
    append_eos: Annotated[
        bool | None, Field(description="End plain texts with the EOS token, as TRL's RewardTrainer does. null: not.")
    ] = None
    add_special_tokens: Annotated[
        bool | None, Field(description="null: added to plain texts of tokenizers that have a [CLS] token.")
    ] = None
    max_length: Annotated[
        int | None, Field(description="Tokens; longer texts lose their beginning. null: the model's own limit.")
    ] = None
    batch_size: Annotated[int, Field(description="Texts in a forward pass, grouped by length.")] = 16
    dtype: Dtype = "float32"
    revision: Revision = None
    trust_remote_code: Annotated[bool, Field(description="Run code from the model's repository.")] = False


@builtin(
    "clip_score",
    media=("image",),
    example={"model": "openai/clip-vit-large-patch14"},
    loads="raftune.rewards.builtin.clip_score:ClipScoreReward",
    model_type="clip",
)
@dataclass
class ClipScoreOptions:
    """Similarity of image and prompt by a CLIPModel: their cosine times the model's logit scale.

    This is `logits_per_image`: in the published models from about 10 (unrelated) to 35 (Hessel et
    al. 2021, arXiv 2104.08718).
    """

    model: Annotated[str, Field(description="Folder or hub name of a CLIPModel.")] = "openai/clip-vit-large-patch14"
    processor: Annotated[
        str | None,
        Field(description="Folder or hub name of the image processor and tokenizer, if the model has none."),
    ] = None
    cosine: Annotated[bool, Field(description="The cosine in [-1, 1], without the logit scale.")] = False
    column: Annotated[str | None, Field(description="Column with the text to compare with; null: the prompt.")] = None
    batch_size: PictureBatch = 32
    dtype: Dtype = "float32"
    revision: Revision = None


@builtin("pick_score", media=("image",), example={}, loads="raftune.rewards.builtin.clip_score:ClipScoreReward")
@dataclass
class PickScoreOptions(ClipScoreOptions):
    """As clip_score, with a model trained on human choices between images (arXiv 2305.01569).

    The published model has no processor; that of its training is used.
    """

    model: Annotated[str, Field(description="Folder or hub name of a CLIPModel.")] = PICK_SCORE

    def __post_init__(self) -> None:
        if self.model == PICK_SCORE and self.processor is None:
            self.processor = PICK_PROCESSOR


@builtin(
    "aesthetic",
    media=("image",),
    example={"model": "aesthetic_head.safetensors"},
    loads="raftune.rewards.builtin.aesthetic:AestheticReward",
    model_type="aesthetic",
)
@dataclass
class AestheticOptions:
    """Aesthetic quality of an image: a small network on its CLIP vector, independent of the prompt."""

    model: Annotated[
        str,
        Field(
            description="A folder written by `save_head`, or a safetensors file of linear layers (layers.N.weight, "
            "layers.N.bias), like the published aesthetic predictor."
        ),
    ]
    clip: Annotated[
        str | None,
        Field(
            description="Folder or hub name of the CLIPModel that the head needs. null: as in the folder; for a "
            "bare file the published predictor's."
        ),
    ] = None
    batch_size: PictureBatch = 32
    dtype: Dtype = "float32"
    revision: Revision = None
