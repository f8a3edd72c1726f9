"""Builds all objects of a run from its configuration. The only module that knows every implementation."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.config.policy import CustomPolicy
from raftune.config.run import RunConfig, held_out_names
from raftune.config.sampling import backend_code
from raftune.engines.local import InProcessEngine, make_engine
from raftune.evaluation.alarms import RoundMonitor
from raftune.evaluation.images import looked_at
from raftune.evaluation.metrics import METRICS, load_metrics, measured, metric_code
from raftune.policies.registry import (
    Family,
    code_of,
    family_of,
    load_policy,
    start_policy,
    start_teacher,
    teacher_config,
)
from raftune.protocols import (
    ChunkedStage,
    Policy,
    Stage,
    SupportsBackends,
    SupportsLogProbs,
    SupportsPromptCheck,
    SupportsSharedParts,
)
from raftune.records import LATENTS
from raftune.rewards.combining import with_counts
from raftune.rewards.panel import SampleScorer
from raftune.stages.data import DataStage
from raftune.stages.evaluate import EvaluateStage
from raftune.stages.features import FeaturesStage
from raftune.stages.gather import GatherStage
from raftune.stages.generate import GenerateStage, TeacherStage
from raftune.stages.guard import GuardStage
from raftune.stages.log_probs import LogProbsStage
from raftune.stages.parity import ParityStage, read_backend
from raftune.stages.plan import EvaluationPlanStage, PlanStage
from raftune.stages.prompt_check import PromptCheckStage
from raftune.stages.reference import ReferenceStage
from raftune.stages.score import ScoreStage
from raftune.stages.select import SelectStage
from raftune.stages.start import StartStage
from raftune.stages.train import TrainStage
from raftune.starters.resolve import resolve_starters, starter_prompts
from raftune.store.commit import DroppedFiles
from raftune.store.job import Engine, StageJob, make_job
from raftune.store.parquet import drop_columns
from raftune.store.run import RunFolder


@dataclass(frozen=True)
class PythonObjects:
    """What was given as Python objects, not as configuration; a worker process cannot have them."""

    train: Callable[[], pa.Table] | None = None
    held_out: Callable[[], pa.Table] | None = None
    rewards: Sequence[Any] = ()
    reward_weights: Sequence[float] | None = None
    reward_tokenizers: Sequence[Any] | None = None
    model: Any = None
    tokenizer: Any = None


LATENTS_GONE = "keep_latents: selected; rows/ holds those of what was kept"
TEXTS = ("text", "messages")
CONDENSE = {"image": looked_at}  # by medium: what alarms and metrics read in place of a completion
SMALL = 256 * 2**20  # bytes: models that together stay below this may lie in memory side by side


class PolicyCache:
    """Hands out policies of one run: one large model at a time, or a few that are small together."""

    def __init__(
        self, config: RunConfig, family: Family, run: RunFolder, others_rest: Callable[[], None] = lambda: None
    ) -> None:
        self.config, self.family, self.run, self.others_rest = config, family, run, others_rest
        self._held: dict[Path, Policy] = {}
        self._encoder: tuple[Path, Policy] | None = None
        self._shared: dict[Path, Any] = {}

    def at(self, folder: Path) -> Policy:
        policy = self._held.pop(folder, None)
        if policy is None:
            self.evict()
            policy = self._load(folder)
        self._held[folder] = policy  # the latest stands last
        return policy

    def fresh(self, folder: Path) -> Policy:
        self.evict()
        return self._load(folder)

    def encoder(self, folder: Path) -> Policy:
        if self._encoder is None or self._encoder[0] != folder:
            self._encoder = (folder, self._load(folder))
        return self._encoder[1]

    def release(self) -> None:
        """Lets go of every model that is held."""
        held = sum(policy.nbytes for policy in self._held.values())
        self._held.clear()
        if held >= SMALL:
            gc.collect()  # models hang in cycles; for small ones, the wait costs more than the memory
            empty_device_cache()

    def evict(self) -> None:
        """Drops models, the longest unused first, until one more as large as the largest would still be small."""
        sizes = {folder: policy.nbytes for folder, policy in self._held.items()}
        if max(sizes.values(), default=0) * 2 > SMALL:
            self.release()
            return
        while sizes and sum(sizes.values()) + max(sizes.values()) > SMALL:
            oldest = next(iter(sizes))
            del sizes[oldest], self._held[oldest]
        while len(self._held) > 2:
            del self._held[next(iter(self._held))]

    def _load(self, folder: Path) -> Policy:
        self.others_rest()
        config, start = self.config, self.run.folder(0, "model")
        if folder.name == "teacher":
            config, start = teacher_config(config), folder
        policy = load_policy(self.family, config, folder, start)
        if folder.name != "teacher" and isinstance(policy, SupportsBackends):
            record = read_backend(self.run.folder(0, ParityStage.writes))
            if record is not None:
                policy.use_backend(record)
        if isinstance(policy, SupportsSharedParts):
            self._share(start, policy.shared)
        return policy

    def _share(self, start: Path, parts: Any) -> None:
        """Holds what all rounds of a start have in common, so that the next one finds it read.

        Of another start (a teacher's) only what is small stays beside it.
        """
        small = {place: one for place, one in self._shared.items() if one.nbytes * 2 <= SMALL}
        self._shared = small | {start: parts}


def empty_device_cache() -> None:
    """Gives the freed memory of a GPU back, where torch is in use at all."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


class Runtime:
    """Everything a run needs, made from its configuration: the table of stages by round, and the engine."""

    def __init__(self, run: RunFolder, config: RunConfig, objects: PythonObjects | None = None) -> None:
        self.plain = run.in_own_terms(config)  # enters the keys: as written, with no path of this machine
        config = resolve_starters(config)
        self.run, self.config, self.objects = run, config, with_starter_prompts(config, objects or PythonObjects())
        self.family = family_of(config)
        self.engine: Engine = make_engine(config.engine, run.root)
        self._panels: dict[str, SampleScorer] = {}
        self._extractor: Any = None
        self.policies = PolicyCache(config, self.family, run, self._rest_panels)
        limit_threads(config)

    # -- the table of stages ----------------------------------------------------------------------------------------

    def stages(self, round_: int) -> list[Stage]:
        """The stages of a round in their order; round 0 is the start."""
        if not round_:
            return [*self._beginning(), *self._judging(0)]
        return [*self._training(round_), *self._judging(round_), *self._guarding(round_)]

    def stage(self, round_: int, name: str) -> Stage:
        return next(stage for stage in self.stages(round_) if stage.name == name)

    def job(self, stage: Stage, round_: int) -> StageJob:
        return make_job(self.run, stage, round_, self.plain)

    def _beginning(self) -> list[Stage]:
        config, objects = self.config, self.objects
        data = DataStage(config, objects.train, objects.held_out)
        stages: list[Stage] = [
            data,
            StartStage(
                lambda out: start_policy(self.family, config, out, objects.model, objects.tokenizer),
                code=code_of(config),
            ),
        ]
        if config.sampling.teacher is not None:
            stages.append(StartStage(lambda out: start_teacher(self.family, config, out), name="teacher"))
        if isinstance(self.family, SupportsPromptCheck):
            text, sampling = self.family.media == "text", config.sampling
            teacher = text and sampling.teacher is not None
            columns = sampling.candidate_columns if text else ()
            stages.append(
                PromptCheckStage(
                    self.policies, data, drop=self.drops, teacher=teacher, columns=columns, starter=self.starter
                )
            )
        if isinstance(self.family, SupportsBackends):
            here = isinstance(self.engine, InProcessEngine)
            stages.append(ParityStage(self.policies, (lambda: None) if here else self.policies.release, self.drops))
        return stages

    def _training(self, round_: int) -> list[Stage]:
        config, sampling = self.config, self.config.sampling
        shards = ("generate", "teach") if sampling.teacher else ("generate",)
        stages: list[Stage] = [
            PlanStage(config, round_, self.drops),
            GenerateStage(self.policies, columns=sampling.candidate_columns, code=backend_code(sampling)),
        ]
        if sampling.teacher is not None:
            stages.append(TeacherStage(self.policies, sampling.teacher.num_generations))
        earlier, local = self.run.earlier_scores, bool(self.objects.rewards)
        stages.append(ScoreStage(self.panel, reads=shards, local=local, earlier=earlier(round_, "score")))
        if config.selection.beta > 0:
            stages.append(LogProbsStage(self.policies, model="model@-1", writes="logp", shards=shards))
            stages.append(LogProbsStage(self.policies, model="model@0", writes="logp-start", shards=shards))
        limit = config.rewards.max_failure_fraction
        stages.append(SelectStage(config.selection, seed=config.seed, round_=round_, shards=shards, max_failures=limit))
        stages.append(GatherStage(self.policies, config.training, seed=config.seed, round_=round_, shards=shards))
        stages.append(TrainStage(self.policies, config.training, self.run.folder(round_, "train")))
        return stages

    def _judging(self, round_: int) -> list[Stage]:
        if not self.config.evaluation.num_prompts:
            return []
        evaluation = self.config.evaluation
        prefix = "evaluate/"
        plan, drawn = prefix + "plan", prefix + "generate"
        stages: list[Stage] = [
            EvaluationPlanStage(self.config, round_, self.drops),
            GenerateStage(
                self.policies, model="model", plan=plan, writes=drawn, code=backend_code(self.config.sampling)
            ),
            ScoreStage(
                self.eval_rewards,
                plan=plan,
                reads=(drawn,),
                writes=prefix + "score",
                local=bool(self.objects.rewards),
                earlier=self.run.earlier_scores(round_, prefix + "score"),
            ),
        ]
        shards = ["generate", "score"]
        if evaluation.reward_funcs:
            writes = prefix + "judge"
            earlier = self.run.earlier_scores(round_, writes)
            stages.append(ScoreStage(self.judge, plan=plan, reads=(drawn,), writes=writes, earlier=earlier))
            shards.append("judge")
        if evaluation.kl and self.has_log_probs():
            for model, writes in (("model", "logp"), ("model@0", "logp-start")):
                stages.append(
                    LogProbsStage(self.policies, model=model, writes=prefix + writes, plan=plan, shards=(drawn,))
                )
                shards.append(writes)
        references = None
        if evaluation.reference_column is not None and self.has_log_probs():
            stages.append(ReferenceStage(self.policies, evaluation.reference_column))
            references = ReferenceStage.writes
        if evaluation.features is not None:
            stages.append(FeaturesStage(self.extractor))
            shards.append("features")
        stages.append(
            EvaluateStage(
                tuple(METRICS.values()),
                shards=tuple(shards),
                media=self.family.media,
                references=references,
                condense=CONDENSE.get(self.family.media),
                load_own=(lambda: load_metrics(evaluation)) if evaluation.metrics else None,
                own_code=metric_code(evaluation) if evaluation.metrics else None,
                measured=measured,
            )
        )
        return stages

    def _guarding(self, round_: int) -> list[Stage]:
        guards, evaluation = self.config.guards, self.config.evaluation
        if not guards.enabled:
            return []
        judges = bool(evaluation.num_prompts and evaluation.reward_funcs)
        kl = evaluation.kl and bool(evaluation.num_prompts) and self.has_log_probs()
        looks = evaluation.num_prompts and self.family.media in (*TEXTS, *CONDENSE)
        return [
            GuardStage(
                RoundMonitor(guards),
                self.factors,
                round_=round_,
                shards=("generate", "teach") if self.config.sampling.teacher else ("generate",),
                judged=(
                    *(["generate"] if looks else []),
                    *(["judge"] if judges else []),
                    *(["logp", "logp-start"] if kl else []),
                ),
                judge=judge_in_words(held_out_names(self.config)) if judges else "",
                texts=self.family.media in TEXTS,
                condense=CONDENSE.get(self.family.media),
                counts=self.counts,
            )
        ]

    # -- what the stages need -----------------------------------------------------------------------------------------

    @property
    def starter(self) -> bool:
        """Whether the policy is the bundled language model."""
        return self.family.media == "text" and self.plain["policy"].get("model") == "starter"

    @property
    def drops(self) -> bool:
        """Whether prompts that the model cannot take are left out."""
        return self.config.sampling.unusable_prompts == "drop" and isinstance(self.family, SupportsPromptCheck)

    def has_log_probs(self) -> bool:
        return isinstance(self.family, SupportsLogProbs)

    def panel(self) -> SampleScorer:
        """The rewards that the policy is trained on."""
        return self._with_room(self._train_panel())

    def eval_rewards(self) -> SampleScorer:
        """The same rewards for comparing rounds: added up in any case, for a rank compares one prompt's candidates."""
        return SampleScorer(self.panel().panel, combine="sum")

    def factors(self) -> dict[str, float]:
        """The weight in the score of each reward that the policy is trained on."""
        panel = self._train_panel().panel
        return dict(zip(panel.names, panel.weights, strict=True))

    def counts(self, samples: pa.Table) -> pa.Table:
        """The samples, with what each reward counts in their score where that is not its value."""
        panel = self._train_panel().panel
        return with_counts(samples, panel.shares, panel.combine)

    def _train_panel(self) -> SampleScorer:
        return self._panel("train", self.config.rewards, self.objects.rewards)

    def judge(self) -> SampleScorer:
        """The held-out rewards, which it is never trained on."""
        changes = {"reward_funcs": self.config.evaluation.reward_funcs, "combine": "sum"}
        held_out = self.config.rewards.model_copy(update=changes)
        return self._with_room(self._panel("held out", held_out, ()))

    def extractor(self) -> Any:
        """The model that held-out images are compared by."""
        if self._extractor is None:
            from raftune.rewards.builtin.clip import ClipModel

            device = self.config.rewards.device
            self._extractor = ClipModel(self.config.evaluation.features, device, field="evaluation.features")
        self.policies.evict()
        return self._extractor

    def _panel(self, which: str, config: Any, objects: Sequence[Any]) -> SampleScorer:
        if which not in self._panels:
            from raftune.rewards.loading import load_panel

            weights, tokenizers = self.objects.reward_weights, self.objects.reward_tokenizers
            given = {"weights": weights, "tokenizers": tokenizers} if objects else {}
            self._panels[which] = SampleScorer(load_panel(config, objects, **given))
        return self._panels[which]

    def _with_room(self, panel: SampleScorer) -> SampleScorer:
        """The panel, after policies have made way for the models in it."""
        if panel.panel.has_weights:
            self.policies.evict()
        return panel

    def _rest_panels(self) -> None:
        """Frees reward models, unless they are small, before a policy is loaded."""
        held = [panel.panel for panel in self._panels.values()]
        for models in [*held, *([self._extractor] if self._extractor is not None else [])]:
            if models.nbytes * 2 > SMALL:
                models.release()

    def engine_for(self, stage: ChunkedStage) -> Engine:
        """The configured engine, or this process for a stage whose objects only it has."""
        return InProcessEngine(self.config.engine) if stage.local else self.engine

    def prune(self, round_: int, best: int | None) -> None:
        """Lets go of what the configuration does not keep once a round is done; manifests stay, and so do all samples.

        Of rounds that `keep_models` does not keep, the weights; with `keep_latents: selected`, the latents of what was
        generated: those of what was kept lie in rows/, from which later rounds may replay them.
        """
        keep = {"all": range(round_ + 1), "best": (round_, best), "last": (round_,)}
        for number in range(1, round_):
            if number not in keep[self.config.keep_models]:
                drop_weights(self.run, number)
        if self.config.keep_latents == "selected" and round_:
            for name in ("generate", "teach") if self.config.sampling.teacher else ("generate",):
                drop_columns(self.run.folder(round_, name), self.run.tmp, (LATENTS,), LATENTS_GONE)

    def close(self) -> None:
        """Ends workers and the processes of rewards."""
        self.engine.close()
        for panel in self._panels.values():
            panel.close()
        self._panels.clear()
        self.policies.release()


def judge_in_words(names: Sequence[str]) -> str:
    return f"the held-out {names[0]}" if len(names) == 1 else "the held-out reward"


def with_starter_prompts(config: RunConfig, objects: PythonObjects) -> PythonObjects:
    """The objects, with the bundled prompts in place of a data set where the configuration says `starter`."""
    family = config.policy.family
    train = starter_prompts(config.data.prompts, "train", family) or objects.train
    held_out = starter_prompts(config.evaluation.prompts, "heldout", family) or objects.held_out
    return replace(objects, train=train, held_out=held_out)


def drop_weights(run: RunFolder, round_: int) -> None:
    """Deletes a model's files, after a marker says that this was meant."""
    folder = run.folder(round_, "model")
    if not run.is_committed(round_, "model"):
        return
    if not run.is_dropped(round_, "model"):
        DroppedFiles("keep_models does not keep this round's weights").save(folder, run.tmp)
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".bin", ".pt") or path.name == "policy.json":
            path.unlink()


def limit_threads(config: RunConfig) -> None:
    """Gives tensor arithmetic the configured number of threads: they shape the result, so they enter the keys."""
    if config.policy.family == "tabular" or (isinstance(config.policy, CustomPolicy) and "torch" not in sys.modules):
        return
    import torch

    torch.set_num_threads(config.engine.threads)


def open_runtime(root: str | Path) -> Runtime:
    """The assembly of a run directory, from its own configuration."""
    run = RunFolder(root)
    return Runtime(run, run.configuration())


__all__ = ["PolicyCache", "PythonObjects", "Runtime", "open_runtime"]
