"""Builds all objects of a run from its configuration. The only module that knows every implementation."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.config.policy import CustomPolicy
from raftune.config.run import RunConfig, held_out_names
from raftune.config.sampling import backend_code, shaping
from raftune.engines.local import InProcessEngine
from raftune.engines.registry import make_engine
from raftune.engines.training import Result
from raftune.errors import ConfigError, RunDamaged
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
    GenerationServers,
    Policy,
    Stage,
    SupportsBackends,
    SupportsLogProbs,
    SupportsPromptCheck,
    SupportsServers,
    SupportsSharedParts,
)
from raftune.records import LATENTS
from raftune.rewards.combining import with_counts
from raftune.rewards.reward_set import RewardSet, lacking
from raftune.runtime.distributed import trainer_for
from raftune.stages.data import DataStage
from raftune.stages.evaluate import EvaluateStage, FeaturesStage
from raftune.stages.gather import GatherStage
from raftune.stages.generate import GenerateStage, Generation, TeacherStage
from raftune.stages.guard import GuardStage
from raftune.stages.log_probs import LogProbsStage, ReferenceStage
from raftune.stages.parity import ParityStage, read_backend
from raftune.stages.plan import EvaluationPlanStage, PlanStage
from raftune.stages.prompt_check import PromptCheckStage
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
    """Python objects in place of configuration; a worker process cannot have them."""

    train: Callable[[], pa.Table] | None = None
    held_out: Callable[[], pa.Table] | None = None
    rewards: Sequence[Any] = ()
    reward_weights: Sequence[float] | None = None
    reward_tokenizers: Sequence[Any] | None = None
    model: Any = None
    tokenizer: Any = None


TEXTS = ("text", "messages")
CONDENSE = {"image": looked_at}  # by medium: what alarms and metrics read in place of a completion
SMALL = 256 * 2**20  # bytes: models that together stay below this may be in memory side by side


class PolicyCache:
    """Loads the policies of one run: one large model at a time, or a few that are small together."""

    def __init__(self, config: RunConfig, family: Family, run: RunFolder, release_others: Callable[[], None]) -> None:
        self.config, self.family, self.run, self.release_others = config, family, run, release_others
        self._held: dict[Path, Policy] = {}  # the latest used last
        self._encoder: tuple[Path, Policy] | None = None
        self._shared: dict[Path, Any] = {}  # by start, the frozen parts that all rounds have in common
        self.servers: GenerationServers | None = None  # which generate for all policies, once one was loaded
        self.planning = False  # whether servers are left alone

    def at(self, folder: Path) -> Policy:
        policy = self._held.pop(folder, None)
        self._held[folder] = policy = self.fresh(folder) if policy is None else policy
        return policy

    def fresh(self, folder: Path) -> Policy:
        self.evict()
        return self._load(folder)

    def encoder(self, folder: Path) -> Policy:
        if self._encoder is None or self._encoder[0] != folder:
            self._encoder = (folder, self._load(folder))
        return self._encoder[1]

    def release(self) -> None:
        """Frees every model."""
        held = sum(policy.nbytes for policy in self._held.values())
        self._held.clear()
        if held >= SMALL:
            gc.collect()  # models are in reference cycles; for small ones, the wait costs more than the memory
            torch = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_available():
                torch.cuda.empty_cache()

    def evict(self) -> None:
        """Frees models, the least recently used first, until one more of the largest size would still be small."""
        sizes = {folder: policy.nbytes for folder, policy in self._held.items()}
        largest = max(sizes.values(), default=0)
        if largest * 2 > SMALL:
            self.release()
            return
        for folder in list(sizes):
            if len(sizes) <= 2 and sum(sizes.values()) + max(sizes.values()) <= SMALL:
                break
            del sizes[folder], self._held[folder]

    def make_room(self) -> None:
        """Frees what a model other than a policy needs the memory of: other models, and servers."""
        self.evict()
        if self.servers is not None:
            self.servers.release()

    def close(self) -> None:
        """Frees every model, and ends the servers."""
        self.release()
        if self.servers is not None:
            self.servers.close()

    def _load(self, folder: Path) -> Policy:
        self.release_others()
        config, start = self.config, self.run.folder(0, "model")
        if folder.name == "teacher":
            config, start = teacher_config(config), folder
        policy = load_policy(self.family, config, folder, start)
        if folder.name != "teacher" and isinstance(policy, SupportsBackends):
            record = read_backend(self.run.folder(0, ParityStage.writes))
            if record is not None:
                policy.use_backend(record)
            if isinstance(self.family, SupportsServers) and isinstance(policy, SupportsServers):
                self.servers = self.servers or self.family.servers(config, start, self.run.tmp)
                if self.servers is not None:
                    self.servers.planning = self.planning
                    policy.use_servers(self.servers)
        if isinstance(policy, SupportsSharedParts):
            # Beside the parts of this start, only small ones of another (a teacher's) stay in memory.
            small = {path: parts for path, parts in self._shared.items() if parts.nbytes * 2 <= SMALL}
            self._shared = small | {start: policy.shared}
        return policy


class Runtime:
    """All objects of a run, made from its configuration: the stages of each round, policies, rewards and the engine."""

    def __init__(self, run: RunFolder, config: RunConfig, objects: PythonObjects | None = None) -> None:
        self.plain = run.as_recorded(config)  # enters the keys: as written, with no path of this machine
        config, objects = resolve_starters(config), objects or PythonObjects()
        family = config.policy.family
        train = starter_prompts(config.data.prompts, "train", family) or objects.train
        held_out = starter_prompts(config.evaluation.prompts, "heldout", family) or objects.held_out
        self.run, self.config, self.objects = run, config, replace(objects, train=train, held_out=held_out)
        self.family = family_of(config)
        self.engine: Engine = make_engine(config.engine, run.root)
        self._reward_sets: dict[str, RewardSet] = {}
        self._extractor: Any = None
        self.policies = PolicyCache(config, self.family, run, self._release_rewards)
        limit_threads(config)

    # -- the table of stages ----------------------------------------------------------------------------------------

    def stages(self, round_: int) -> list[Stage]:
        """The stages of a round in their order; round 0 evaluates the initial model."""
        if not round_:
            return [*self._start_stages(), *self._evaluation_stages(0)]
        guard = [self._guard_stage(round_)] if self.config.guards.enabled else []
        return [*self._training_stages(round_), *self._evaluation_stages(round_), *guard]

    def stage(self, round_: int, name: str) -> Stage:
        return next(stage for stage in self.stages(round_) if stage.name == name)

    def job(self, stage: Stage, round_: int) -> StageJob:
        return make_job(self.run, stage, round_, self.plain)

    @property
    def _shards(self) -> tuple[str, ...]:
        """The stages that write a round's candidates."""
        return ("generate", "teach") if self.config.sampling.teacher is not None else ("generate",)

    def _start_stages(self) -> list[Stage]:
        config, objects, sampling = self.config, self.objects, self.config.sampling
        data = DataStage(config, objects.train, objects.held_out, self.check_columns)
        stages: list[Stage] = [
            data,
            StartStage(
                lambda out: start_policy(self.family, config, out, objects.model, objects.tokenizer),
                code=code_of(config),
            ),
        ]
        if sampling.teacher is not None:
            stages.append(StartStage(lambda out: start_teacher(self.family, config, out), name="teacher"))
        if isinstance(self.family, SupportsPromptCheck):
            text = self.family.media == "text"
            stages.append(
                PromptCheckStage(
                    self.policies,
                    data,
                    drop=self.drops,
                    teacher=text and sampling.teacher is not None,
                    columns=sampling.candidate_columns if text else (),
                    starter=self.starter,
                )
            )
        if isinstance(self.family, SupportsBackends):
            here = isinstance(self.engine, InProcessEngine)
            release = (lambda: None) if here else self.policies.release
            stages.append(ParityStage(self.policies, release, self.drops, options=shaping(sampling)))
        return stages

    def _training_stages(self, round_: int) -> list[Stage]:
        config, sampling, shards = self.config, self.config.sampling, self._shards
        stages: list[Stage] = [
            PlanStage(config, round_, self.drops),
            GenerateStage(self.policies, self.generation(), columns=sampling.candidate_columns),
        ]
        if sampling.teacher is not None:
            stages.append(TeacherStage(self.policies, sampling.teacher.num_generations, shaping(sampling)))
        stages.append(self._score_stage(round_, self.rewards, "plan", shards, "score"))
        if config.selection.beta > 0:
            stages.append(LogProbsStage(self.policies, model="model@-1", writes="logp", shards=shards))
            stages.append(LogProbsStage(self.policies, model="model@0", writes="logp-start", shards=shards))
        limit = config.rewards.max_failure_fraction
        stages.append(SelectStage(config.selection, seed=config.seed, round_=round_, shards=shards, max_failures=limit))
        stages.append(GatherStage(self.policies, config.training, seed=config.seed, round_=round_, shards=shards))
        stages.append(TrainStage(self.policies, config.training, self.run.folder(round_, "train"), self._train()))
        return stages

    def _train(self) -> Callable[[Path, Path, Path, Path], Result] | None:
        """How several processes train, after this one has made room for them; None where one does."""
        train = trainer_for(self.config, self.run.folder(0, "model"))
        if train is None:
            return None

        def with_room(folder: Path, rows: Path, work: Path, out: Path) -> Result:
            self.policies.release()
            self.policies.make_room()
            self._release_rewards()
            return train(folder, rows, work, out)

        return with_room

    def _score_stage(
        self, round_: int, scorer: Callable[[], RewardSet], plan: str, shards: tuple[str, ...], writes: str
    ) -> ScoreStage:
        local = bool(self.objects.rewards) and not writes.endswith("judge")
        earlier = self.run.earlier_scores(round_, writes)
        return ScoreStage(scorer, plan=plan, reads=shards, writes=writes, local=local, earlier=earlier)

    def _evaluation_stages(self, round_: int) -> list[Stage]:
        evaluation = self.config.evaluation
        if not evaluation.num_prompts:
            return []
        plan, samples = "evaluate/plan", "evaluate/generate"
        stages: list[Stage] = [
            EvaluationPlanStage(self.config, round_, self.drops),
            GenerateStage(self.policies, self.generation(), model="model", plan=plan, writes=samples),
            self._score_stage(round_, self.eval_rewards, plan, (samples,), "evaluate/score"),
        ]
        shards = ["generate", "score"]
        if evaluation.reward_funcs:
            stages.append(self._score_stage(round_, self.held_out_rewards, plan, (samples,), "evaluate/judge"))
            shards.append("judge")
        if evaluation.kl and self.has_log_probs():
            for model, name in (("model", "logp"), ("model@0", "logp-start")):
                writes = f"evaluate/{name}"
                stages.append(LogProbsStage(self.policies, model=model, writes=writes, plan=plan, shards=(samples,)))
                shards.append(name)
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
                own_code=metric_code(evaluation),
                measured=measured,
            )
        )
        return stages

    def _guard_stage(self, round_: int) -> GuardStage:
        evaluation, media = self.config.evaluation, self.family.media
        judged: list[str] = []
        if evaluation.num_prompts:
            judged += ["generate"] if media in (*TEXTS, *CONDENSE) else []
            judged += ["judge"] if evaluation.reward_funcs else []
            judged += ["logp", "logp-start"] if evaluation.kl and self.has_log_probs() else []
        names = held_out_names(self.config)
        judge = f"the held-out {names[0]}" if len(names) == 1 else "the held-out reward"
        return GuardStage(
            RoundMonitor(self.config.guards),
            self.factors,
            round_=round_,
            shards=self._shards,
            judged=tuple(judged),
            judge=judge if "judge" in judged else "",
            texts=media in TEXTS,
            condense=CONDENSE.get(media),
            counts=self.counts,
        )

    def generation(self) -> Generation:
        """How the policy generates, by the configuration and by the run's record."""
        sampling = self.config.sampling

        def record() -> dict[str, Any]:
            with contextlib.suppress(RunDamaged):  # reported with the other faults of the run's files
                return read_backend(self.run.folder(0, ParityStage.writes)) or {}
            return {}

        return Generation(record, backend_code(sampling), shaping(sampling))

    # -- what the stages need -----------------------------------------------------------------------------------------

    @property
    def starter(self) -> bool:
        """Whether the policy is the bundled language model."""
        return self.family.media == "text" and self.plain["policy"].get("model") == "starter"

    @property
    def drops(self) -> bool:
        """Whether unusable prompts are left out."""
        return self.config.sampling.unusable_prompts == "drop" and isinstance(self.family, SupportsPromptCheck)

    def has_log_probs(self) -> bool:
        return isinstance(self.family, SupportsLogProbs)

    def rewards(self) -> RewardSet:
        """The rewards that the policy is trained on, after policies have made room for their models."""
        return self._with_room(self._train_rewards())

    def eval_rewards(self) -> RewardSet:
        """The same rewards for comparing rounds: always summed, because a rank compares only one prompt's samples."""
        return self.rewards().by_sum()

    def held_out_rewards(self) -> RewardSet:
        """The held-out rewards, which the policy is never trained on, after policies have made room for them."""
        changes = {"reward_funcs": self.config.evaluation.reward_funcs, "combine": "sum"}
        return self._with_room(self._load_rewards("held out", self.config.rewards.model_copy(update=changes), ()))

    def check_columns(self, train: Collection[str], held_out: Collection[str]) -> None:
        """Raises ConfigError for rewards that need a column which the prompts lack: they could score no sample."""
        evaluation = self.config.evaluation
        columns, prompts = (train, "the prompts") if self.config.num_rounds else (held_out, "the held-out prompts")
        findings = [*lacking(self._train_rewards(), columns, prompts, "rewards.reward_funcs")]
        if evaluation.reward_funcs and evaluation.num_prompts:
            findings += lacking(self.held_out_rewards(), held_out, "the held-out prompts", "evaluation.reward_funcs")
        if findings:
            raise ConfigError("\n".join(findings))

    def _with_room(self, rewards: RewardSet) -> RewardSet:
        if rewards.has_weights:
            self.policies.make_room()
        return rewards

    def factors(self) -> dict[str, float]:
        """The weight in the score of each reward that the policy is trained on."""
        rewards = self._train_rewards()
        return dict(zip(rewards.names, rewards.weights, strict=True))

    def counts(self, samples: pa.Table) -> pa.Table:
        """The samples with what each reward counts in their score, where that is not its value."""
        rewards = self._train_rewards()
        return with_counts(samples, rewards.shares, rewards.combine)

    def extractor(self) -> Any:
        """The model whose features held-out images are compared by."""
        if self._extractor is None:
            from raftune.rewards.builtin.clip import ClipModel

            device = self.config.rewards.device
            self._extractor = ClipModel(self.config.evaluation.features, device, field="evaluation.features")
        self.policies.make_room()
        return self._extractor

    def _train_rewards(self) -> RewardSet:
        return self._load_rewards("train", self.config.rewards, self.objects.rewards)

    def _load_rewards(self, name: str, config: Any, objects: Sequence[Any]) -> RewardSet:
        if name not in self._reward_sets:
            from raftune.rewards.loading import load_rewards

            weights, tokenizers = self.objects.reward_weights, self.objects.reward_tokenizers
            options = {"weights": weights, "tokenizers": tokenizers} if objects else {}
            self._reward_sets[name] = load_rewards(config, objects, **options)
        return self._reward_sets[name]

    def _release_rewards(self) -> None:
        """Frees reward models, unless they are small, before a policy is loaded."""
        for model in [*self._reward_sets.values(), *([self._extractor] if self._extractor is not None else [])]:
            if model.nbytes * 2 > SMALL:
                model.release()

    def engine_for(self, stage: ChunkedStage) -> Engine:
        """The configured engine, or this process for a stage whose objects, or servers, only it has."""
        if not stage.local:
            if self.policies.servers is not None and not isinstance(self.engine, InProcessEngine):
                self.policies.servers.release()
            return self.engine
        if isinstance(stage, GenerateStage):
            self.engine.rest()  # the server that generates needs the memory
        return InProcessEngine(self.config.engine)

    def prune(self, round_: int, best: int | None) -> None:
        """Deletes what the configuration does not keep once a round is done; manifests and all samples stay.

        That is the weights of rounds that `keep_models` does not keep, after a marker says so; and with `keep_latents:
        selected` the latents of what was generated: rows/ has those of what was kept, from which later rounds replay.
        """
        run, keep = self.run, {"all": range(round_ + 1), "best": (round_, best), "last": (round_,)}
        for number in range(1, round_):
            if number in keep[self.config.keep_models] or not run.is_committed(number, "model"):
                continue
            folder = run.folder(number, "model")
            if not run.is_dropped(number, "model"):
                DroppedFiles("keep_models does not keep this round's weights").save(folder, run.tmp)
            for path in sorted(folder.rglob("*")):
                if path.suffix in (".safetensors", ".bin", ".pt") or path.name == "policy.json":
                    path.unlink()
        if self.config.keep_latents == "selected" and round_:
            why = "keep_latents: selected; rows/ holds those of what was kept"
            for name in self._shards:
                drop_columns(run.folder(round_, name), run.tmp, (LATENTS,), why)

    def close(self) -> None:
        """Ends workers and the processes of rewards."""
        self.engine.close()
        for rewards in self._reward_sets.values():
            rewards.close()
        self._reward_sets.clear()
        self.policies.close()


def limit_threads(config: RunConfig) -> None:
    """Sets torch's number of threads, which shapes results and so enters the keys."""
    if config.policy.family == "tabular" or (isinstance(config.policy, CustomPolicy) and "torch" not in sys.modules):
        return
    import torch

    torch.set_num_threads(config.engine.threads)


def open_runtime(root: str | Path) -> Runtime:
    """The runtime of a run directory, from its own configuration."""
    run = RunFolder(root)
    return Runtime(run, run.configuration())
