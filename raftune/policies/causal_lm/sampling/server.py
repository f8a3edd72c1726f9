"""Generates through inference servers, and makes sure that they serve the model that is to generate.

Token ids go in and come out; each sample is a request of its own with its own seed. Before anything is recorded, a
server has to give the log-probabilities of the weight probe that training wrote beside the weights.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raftune.clients.completions import CompletionsServer, ServedCompletion, ServerLost, complete, completions_url
from raftune.config.sampling import ServerBackend, VllmBackend
from raftune.errors import ConfigError, EngineError
from raftune.policies.causal_lm import loading
from raftune.policies.causal_lm.sampling.completions import CompletionBatch
from raftune.policies.causal_lm.sampling.token_choice import SamplingParams
from raftune.policies.causal_lm.sampling.vllm import NAME, ServedModel, VllmServer, add_adapter, vllm_version
from raftune.policies.causal_lm.weight_probe import CANNOT_TELL, WeightProbe
from raftune.policies.model_files import ADAPTER
from raftune.sanitize import one_line
from raftune.store import partial
from raftune.training.checkpoints import holds_no_code
from raftune.training.devices import choose_device

RESTARTS = 2  # of a server that died, for one chunk
# A hot trial after ids at random, of which no model is sure: other seeds give other tokens.
TRIAL_SEEDS, TRIAL_PROMPT, TRIAL_TOKENS, TRIAL_TEMPERATURE = range(11, 19), 8, 8, 2.0
UPDATE_SECONDS = 1800.0  # for the command of sampling.backend.update
SHORTEST = 320  # tokens that a server must read, for the weight probe
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the sizes that vLLM reserves
PLANNING = "generates in the run, and is not started to plan: times are of raftune's own generation"
NAME_PYTHON = (
    "Install it there, or name the Python of an environment that has it: "
    "sampling.backend: {kind: vllm, python: /path/to/environment/bin/python}."
)
IN_4_BITS = "with policy.load_in_4bit the policy is trained on a base in 4 bits, which a server does not have"
LOOK_SECONDS = 10.0  # for an answer about the server itself


class Servers:
    """The servers that a run generates through: one vLLM that raftune starts (`own`), or running ones.

    `vocabulary`, `context`: ids of the model, and tokens that it reads at most (None: no limit). `dtype`: of its
    weights. `against`: why `auto` cannot take them. `restarts`: how often a server of raftune's own died and was
    started again. Where `planning` is set, no server is used: what is timed is raftune's own generation.
    """

    def __init__(
        self,
        kind: str,
        options: ServerBackend,
        own: VllmServer | None,
        *,
        vocabulary: int,
        context: int | None,
        dtype: str,
        against: str = "",
    ) -> None:
        self.kind, self.options, self.own = kind, options, own
        self.vocabulary, self.context, self.dtype = vocabulary, context, dtype
        self.against, self.planning = against, False
        self.restarts = 0
        self._running: list[CompletionsServer] = []
        self._names: list[str] = []  # of the model at each running server, in requests
        self._version = ""  # of the model that they serve
        self._tried = self._identified = False
        if own is None:
            limits = (options.timeout, options.retries, options.concurrency)
            urls = [completions_url(url, "sampling.backend.url") for url in options.url]
            self._running = [CompletionsServer(url, key_of(options), *limits) for url in urls]
            self._names = [""] * len(urls)

    @property
    def clients(self) -> list[CompletionsServer]:
        return self._running if self.own is None else [self.own.client]

    @property
    def names(self) -> list[str]:
        return self._names if self.own is None else [self.own.name]

    def chosen(self) -> tuple[bool, str]:
        """Whether a run generates through the servers, and with `auto` why, in words."""
        if self.kind != "auto":
            return not self.planning, f"{self.kind} {PLANNING}" if self.planning else ""
        assert self.own is not None
        if self.against:
            return False, f"not vLLM: {self.against}"
        version, missing = vllm_version(self.own.options.python)
        if missing:
            return False, f"not vLLM: {missing}"
        why = f"vLLM {version} is installed and a GPU is there"
        return not self.planning, f"vLLM {PLANNING}: {why}" if self.planning else why

    def begin(self, model: ServedModel, probe: WeightProbe) -> dict[str, Any]:
        """Starts the servers with a run's initial model, or finds it there, and tries them; returns their record."""
        self._tried = True
        self.serve(model, probe)
        independent, options = self.trial(probe), self.options
        own = self.own
        exact = own is not None and not own.cuda and own.threads == 1 and self.dtype == "float32"
        if options.reproducible and not independent:
            raise ConfigError(
                "sampling.backend.reproducible must be false for servers whose completions depend on the batch; got "
                "true, and a trial gave a seed other bytes in another batch. Leave it out."
            )
        reproducible = independent and (exact or options.reproducible)
        return {**self.identity(), "reproducible": reproducible, "probe": asdict(probe)}

    def check_identity(self, record: Mapping[str, Any]) -> None:
        """Raises ConfigError where the servers are not those of the record. Asks once."""
        if self._identified:
            return
        now = self.identity()
        for name, value in now.items():
            if record.get(name) != value:
                raise ConfigError(
                    f"sampling.backend: the run was started with a server of {name} {record.get(name)!r}, and now it "
                    f"is {value!r}. Put it back, or generate all anew with --from 0/parity."
                )
        self._identified = True

    def identity(self) -> dict[str, Any]:
        """What shapes the samples besides model and parameters."""
        if self.own is not None:
            device = {"device": "cuda"} if self.own.cuda else {"device": "cpu", "threads": self.own.threads}
            version, missing = vllm_version(self.own.options.python)
            if missing:
                raise ConfigError(f"sampling.backend: {missing}. {NAME_PYTHON}")
            return {"kind": "vllm", "version": version, "dtype": self.dtype, **device, "flags": self.own.flags}
        versions = sorted({version_of(server) for server in self._running})
        if len(versions) > 1:
            raise ConfigError(f"sampling.backend.url must name servers of one version; got {', '.join(versions)}.")
        return {"kind": self.kind, "version": versions[0], "dtype": self.dtype}

    # -- the right model -----------------------------------------------------------------------------------------------

    def serve(self, model: ServedModel, probe: WeightProbe) -> None:
        """Makes every server serve the model and checks that it does. Raises EngineError, ConfigError."""
        if self.own is None:
            for place in range(len(self._running)):
                self._serve_at(place, model, probe)
        elif self._version != model.version or not self.own.runs():
            for fresh in (False, True):
                self._version = ""
                self.own.load(model, fresh)
                fault = self.fault_of(0, probe)
                sure = fresh or self.own.just_loaded
                if not fault or (sure and fault.startswith(CANNOT_TELL)):
                    break
            else:
                raise EngineError(wrong_model("vLLM", fault, "It was started anew in vain: report the architecture."))
        if not self._tried:
            self.trial(probe)
        self._version = model.version

    def _serve_at(self, place: int, model: ServedModel, probe: WeightProbe) -> None:
        """The same for one running server: its weights are checked, and changed if they are not the model's."""
        server, names = self._running[place], model_names(self._running[place])
        updated = False
        if model.adapter is not None and self.kind == "vllm":
            name = f"{NAME}-{model.version}"
            self._names[place] = name if name in names else add_adapter(server, model, self._adapter(names))
            updated = True
        else:
            self._names[place] = self.name_at(server, names, model.version)
        fault = self.fault_of(place, probe)
        if fault and self._update(place, model):
            fault, updated = self.fault_of(place, probe), True
        if fault and not (updated and fault.startswith(CANNOT_TELL)):
            fix = "sampling.backend.update may name a command that loads {folder} there."
            raise EngineError(wrong_model(server.shown, fault, f"Load {model.adapter or model.source} there. {fix}"))

    def _adapter(self, names: Sequence[str]) -> str:
        """The name of an adapter that this run added before."""
        return next((name for name in names if name.startswith(f"{NAME}-")), "")

    def name_at(self, server: CompletionsServer, names: Sequence[str], version: str) -> str:
        """The model's name in requests to a running server. Raises ConfigError where the server does not have it."""
        names = [name for name in names if not name.startswith(f"{NAME}-")]  # adapters that a run added
        wanted = (self.options.model or "").replace("{name}", version)
        if wanted in names or "{name}" in (self.options.model or ""):
            return wanted
        if wanted or len(names) != 1:
            given = f"got {wanted!r}" if wanted else "none is configured"
            raise ConfigError(
                f"sampling.backend.model must be a model that {server.shown} serves ({', '.join(names) or 'none'}); "
                f"{given}. Name one of these."
            )
        return names[0]

    def _update(self, place: int, model: ServedModel) -> bool:
        """Gives a running server the model's weights, where there is a way; returns whether there was one."""
        server = self._running[place]
        if self.options.update:
            folder = str(model.adapter or model.source)
            words = {"{folder}": folder, "{name}": model.version, "{url}": server.url}
            command = list(self.options.update)
            for word, value in words.items():
                command = [part.replace(word, value) for part in command]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=UPDATE_SECONDS)
                failure = f"ended with code {done.returncode}: {one_line(done.stderr or done.stdout, 200)}"
            except (OSError, subprocess.SubprocessError) as error:
                failure = one_line(str(error), 200)
                raise EngineError(
                    f"sampling.backend.update: {command[0]} failed: {failure}. Fix it and resume."
                ) from None
            if done.returncode:
                raise EngineError(f"sampling.backend.update: {command[0]} {failure}. Fix it and resume.")
            return True
        if self.kind != "vllm" or model.adapter is not None:
            return False
        reload = {"method": "reload_weights", "kwargs": {"weights_path": model.source}}
        server.post("../collective_rpc", reload)
        server.post("../reset_prefix_cache", {})
        return True

    def fault_of(self, place: int, probe: WeightProbe) -> str:
        """Why a server does not serve the probe's model; empty where it does."""
        probe = shortened(probe, self.context)
        return probe.check([self._echo(place, row).echoed for row in probe.ids], self.dtype)

    def _echo(self, place: int, ids: Sequence[int]) -> ServedCompletion:
        """The log-probabilities that a server gives to these ids, and a token after them. One row at a time: with
        adapters, vLLM 0.32 dies on the CPU of several."""
        body = {**self.parameters(SamplingParams(temperature=0.0)), "model": self.names[place], "prompt": list(ids)}
        body |= {"echo": True, "max_tokens": 1, "seed": 0}
        return dict(complete([self.clients[place]], {0: (0, body)}))[0]

    def trial(self, probe: WeightProbe) -> bool:
        """Whether completions did not depend on their batch in a small trial of each server; `probe` is of its model.

        Raises EngineError for a server that ignores the seed, or whose log-probabilities are not the model's own.
        """
        independent, self._tried = True, True
        prompt = np.random.default_rng(0).integers(self.vocabulary, size=TRIAL_PROMPT).tolist()
        for place, (server, name) in enumerate(zip(self.clients, self.names, strict=True)):
            hot = {**self.parameters(SamplingParams(temperature=TRIAL_TEMPERATURE)), "model": name, "prompt": prompt}
            bodies = [{**hot, "seed": seed, "max_tokens": TRIAL_TOKENS} for seed in TRIAL_SEEDS]
            first, again = (dict(complete([server], {i: (0, b) for i, b in enumerate(bodies)})) for _ in range(2))
            same = sum(first[i].ids[0] == again[i].ids[0] for i in first)
            if same * 2 < len(first) or len({tuple(reply.ids) for reply in first.values()}) == 1:
                what = "other completions for equal seeds" if same * 2 < len(first) else "one completion for all seeds"
                raise EngineError(
                    f"{server.shown} must use the `seed` of a request; it gives {what}. SGLang does with "
                    "--enable-deterministic-inference; or use another server."
                )
            alone = dict(complete([server], {0: (0, bodies[0])}))[0]
            independent &= alone == first[0] == again[0]
            raw = np.array(self._echo(place, [*prompt, *alone.ids]).echoed[-len(alone.ids) :])
            if (distance := float(np.abs(raw - alone.log_probs).mean())) > probe.allowed:
                raise EngineError(
                    f"{server.shown} must give log-probabilities of the model itself, before temperature; its differ "
                    f"by {distance:.2g} nats a token. vLLM does with --logprobs-mode raw_logprobs."
                )
        return independent

    # -- generating ----------------------------------------------------------------------------------------------------

    def fill(self, batch: CompletionBatch, model: ServedModel, probe: WeightProbe) -> None:
        """Generates every completion of the batch; an own server that dies is started again, RESTARTS times.

        Running servers are checked once more before anything is kept: somebody may have changed them meanwhile. Raises
        EngineError.
        """
        # What a running server gave is kept once it was checked at the end: no sooner.
        work = partial.PartialWork() if self.own is None else partial.current("served")
        with work.work() as part:
            if (path := part.find()) is not None and holds_no_code(path):
                batch.restore(torch.load(path, weights_only=True))
            restarts = 0
            while batch.unfinished:
                try:
                    self.serve(model, probe)
                    for row, completion in complete(self.clients, self._requests(batch, model)):
                        self._take(batch, row, completion)
                        done = (batch.ended, batch.rows, "samples")
                        part.step(lambda path: torch.save(batch.state(), path), done=done)
                except ServerLost:
                    restarts += 1
                    if self.own is None or restarts > RESTARTS:
                        raise
                    self.restarts += 1
                    self.own.end()
                    self._version = ""
        if self.own is None:
            for place, server in enumerate(self._running):
                fault = self.fault_of(place, probe)
                if fault and not fault.startswith(CANNOT_TELL):
                    raise EngineError(wrong_model(server.shown, fault, "It was changed while it generated: resume."))

    def _requests(self, batch: CompletionBatch, model: ServedModel) -> dict[int, tuple[int, dict[str, Any]]]:
        """The requests for what is not complete, by row; all samples of a prompt go to one server, which caches it."""
        common = self.parameters(batch.settings)
        requests = {}
        for row in batch.unfinished:
            prompt = int(batch.prompt_of[row])
            place = prompt % len(self.clients)
            body = {**common, "model": self.names[place], "prompt": batch.prompts[prompt], "seed": batch.seed(row)}
            # The salt keeps prefixes of other weights out, whatever the server has in its cache.
            requests[row] = (place, {**body, "max_tokens": int(batch.limits[row]), "cache_salt": model.version})
        return requests

    def parameters(self, settings: SamplingParams) -> dict[str, Any]:
        """The parameters of every request: all explicit, or a server would take its model's defaults."""
        return {
            "n": 1,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k or -1,
            "min_p": settings.min_p,
            "repetition_penalty": settings.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": list(settings.stop_strings),
            "stop_token_ids": list(settings.eos_ids),
            "ignore_eos": True,  # the ids above are all that end a completion
            "min_tokens": 0,
            "skip_special_tokens": False,  # stop strings may hold some
            "spaces_between_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
            "echo": False,
            "stream": False,
        }

    def _take(self, batch: CompletionBatch, row: int, completion: ServedCompletion) -> None:
        """Records a completion. Raises EngineError where it holds an unknown id, or does not end by our rules."""
        place = int(batch.prompt_of[row]) % len(self.clients)
        if not all(0 <= token < self.vocabulary for token in completion.ids):
            raise EngineError(
                f"{self.clients[place].shown} must give ids of the model's {self.vocabulary} tokens; got "
                f"{max(completion.ids)}. It serves another model, or has another tokenizer."
            )
        batch.record(row, completion.ids, completion.log_probs)
        if batch.is_cut(row):
            raise EngineError(
                f"{self.clients[place].shown} must go on to an end of text, a stop string or max_tokens = "
                f"{batch.limits[row]}; it ended after {len(completion.ids)} tokens ({completion.finish}). Raise its "
                "limit of tokens (vLLM: --max-model-len), or lower sampling.max_completion_length."
            )

    # -- the end -------------------------------------------------------------------------------------------------------

    @property
    def stay(self) -> bool:
        """Whether no memory has to be freed for the servers, or by them."""
        return self.own is None or self.own.stays

    def release(self) -> None:
        """Ends an own server whose memory others need."""
        if not self.stay:
            self.close()

    def close(self) -> None:
        """Ends an own server."""
        if self.own is not None:
            self.own.end()
            self._version = ""


def servers_of(config: Any, start: Path, tmp: Path) -> Servers | None:
    """The servers that `sampling.backend` names or, with auto, may choose; nothing is started or asked yet.

    `config` is a RunConfig, `start` the folder of the initial model. Raises ConfigError for options that they cannot
    follow.
    """
    sampling, policy = config.sampling, config.policy
    options = sampling.server
    if options is None:
        return None
    cuda = choose_device(policy.device).type == "cuda"
    against = "" if cuda else "no GPU is used"
    against = SamplingParams(generation_kwargs=sampling.generation_kwargs).needs_generate or against
    if policy.load_in_4bit:
        against = IN_4_BITS
    model = loading.model_config(policy, start)
    context, text = loading.context(model), model.get_text_config(decoder=True)
    dtype = policy.dtype if policy.dtype != "auto" else str(text.dtype or "float32").removeprefix("torch.")
    own = None
    if not options.url:
        assert isinstance(options, VllmBackend)
        rank = policy.adapter.r if policy.adapter is not None else 0
        if (start / ADAPTER).is_file():
            rank = max(rank, json.loads((start / ADAPTER).read_text())["r"])
        length = None if cuda else context
        if sampling.max_prompt_length is not None:
            length = max(sampling.max_prompt_length + sampling.max_completion_length, SHORTEST)
            length = min(length, context or length)
        own = VllmServer(
            options,
            tmp,
            cuda=cuda,
            dtype=dtype,
            threads=config.engine.threads,
            lora_rank=next((size for size in LORA_RANKS if size >= rank), rank) if rank else 0,
            length=length,
            trust=policy.trust_remote_code,
        )
    sizes: dict[str, Any] = {"vocabulary": text.vocab_size, "context": context, "dtype": dtype}
    return Servers(sampling.backend, options, own, against=against, **sizes)


def check_servers(config: Any) -> None:
    """Raises ConfigError or EngineError where the servers that `sampling.backend` names cannot be used: vLLM is missing
    or too old, nothing answers at an address, or it has another model. `config` is a RunConfig."""
    sampling = config.sampling
    options = sampling.server
    if options is None or sampling.backend == "auto":
        return
    if config.policy.load_in_4bit:
        raise ConfigError(f"sampling.backend must be auto here: {IN_4_BITS}; got {sampling.backend}.")
    if not options.url:
        _, missing = vllm_version(options.python)
        if missing:
            raise ConfigError(f"sampling.backend: {missing}. {NAME_PYTHON}")
        return
    servers = Servers(sampling.backend, options, None, vocabulary=0, context=None, dtype="")
    for server in servers.clients:
        try:
            servers.name_at(server, model_names(server), "")
        except ServerLost as error:
            raise EngineError(f"sampling.backend.url: {error}. Start the server, or correct its address.") from None


def key_of(options: ServerBackend) -> str | None:
    """The key in the environment variable that the options name. Raises ConfigError where it is not set."""
    if options.key_env is None:
        return None
    if not (key := os.environ.get(options.key_env)):
        raise ConfigError(f"sampling.backend.key_env names {options.key_env!r}, which is not set. Set it.")
    return key


def model_names(server: CompletionsServer) -> list[str]:
    """The models that a server has. Raises EngineError where it cannot be reached or does not say."""
    reply = server.get("/models", LOOK_SECONDS)
    models = reply.get("data") if isinstance(reply, Mapping) else None
    if not isinstance(models, list):
        raise EngineError(f"{server.shown} must list its models at /v1/models; it does not. Is it another service?")
    return [str(model.get("id")) for model in models if isinstance(model, Mapping)]


def version_of(server: CompletionsServer) -> str:
    """The version that the server tells; unknown where it tells none."""
    try:
        reply = server.get("../version", LOOK_SECONDS)
    except EngineError:
        reply = None
    return str(reply["version"]) if isinstance(reply, Mapping) and "version" in reply else "unknown"


def wrong_model(server: str, fault: str, fix: str) -> str:
    """The error for a server with other weights."""
    return f"{server} must serve the model of this round; {fault}. Nothing of it was recorded. {fix}"


def shortened(probe: WeightProbe, context: int | None) -> WeightProbe:
    """The probe with completions cut so that each row leaves room for one more token in the context."""
    if context is None or max(map(len, probe.ids)) < context:
        return probe
    ends = [max(1, context - 1 - len(prompt)) for prompt in probe.prompts]

    def cut(rows: Sequence[list[Any]]) -> list[list[Any]]:
        return [row[:end] for row, end in zip(rows, ends, strict=True)]

    before = None if probe.before is None else cut(probe.before)
    return replace(probe, completions=cut(probe.completions), log_probs=cut(probe.log_probs), before=before)
