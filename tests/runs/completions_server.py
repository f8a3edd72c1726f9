"""A small server of /v1/completions over raftune's own generation, which can also be wrong in every way that is tested.

It speaks vLLM's dialect: token ids in and out, adapters by /v1/load_lora_adapter, weights by /collective_rpc.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from raftune.config.policy import CausalLMPolicy
from raftune.policies.causal_lm import loading
from raftune.policies.causal_lm.likelihood import TokenizedCompletion
from raftune.policies.causal_lm.sampling.backend import generate
from raftune.policies.causal_lm.sampling.token_choice import SamplingParams
from raftune.policies.causal_lm.weight_probe import plain_log_probs

CPU = torch.device("cpu")


class CompletionsService:
    """What is served. `fault` names what it does wrong, `requests` counts the requests of completions, `log` holds the
    other ones; after `dies_after` completions every connection breaks off until `dead` is unset."""

    def __init__(self, folder: Path) -> None:
        self.config = CausalLMPolicy(model=str(folder), device="cpu")
        self.start = folder
        self.tokenizer = loading.load_tokenizer(self.config, folder)
        self.models: dict[str, Any] = {"tiny": loading.load_weights(self.config, str(folder), None, CPU)}
        self.first = self.models["tiny"]
        self.fault = ""
        self.requests = 0
        self.log: list[str] = []
        self.dies_after = math.inf
        self.dead = False
        self.lock = threading.Lock()

    def load(self, name: str, path: str, adapter: bool) -> None:
        if self.fault == "stale" and not adapter:
            return
        base = loading.load_weights(self.config, str(self.start if adapter else path), None, CPU)
        if adapter:
            base = loading.merged(loading.with_adapter(base, path, None))
        self.models[name] = base

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """The status and the content of the reply to a POST; None is no content."""
        if path == "/v1/completions":
            return self.complete(body)
        self.log.append(path)
        if path == "/v1/load_lora_adapter":
            if body["lora_name"] in self.models:
                return 400, {"error": {"message": f"The lora adapter '{body['lora_name']}' has already been loaded."}}
            self.load(body["lora_name"], body["lora_path"], adapter=True)
        elif path == "/v1/unload_lora_adapter":
            self.models.pop(body["lora_name"])
        elif path == "/collective_rpc":
            self.load("tiny", body["kwargs"]["weights_path"], adapter=False)
        elif path != "/reset_prefix_cache":
            return 404, {"detail": "Not Found"}
        return 200, None

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            self.requests += 1
            self.dead = self.dead or self.requests > self.dies_after
            if self.fault == "500" or (self.fault == "500 once" and self.requests == 1):
                return 500, {"error": {"message": "EngineCore encountered an issue."}}
            if body["model"] not in self.models:
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            if self.fault == "400":
                return 400, {"error": {"message": "prompt is too long"}}
            choice = self.choice(body)
        choices = [choice] * (2 if self.fault == "ignores n" else 1)
        return 200, {"choices": choices}

    def choice(self, body: dict[str, Any]) -> dict[str, Any]:
        seed, temperature, limit = body["seed"], body["temperature"], body["max_tokens"]
        if self.fault == "ignores seed":
            seed = time.perf_counter_ns()
        if self.fault == "one for all seeds":
            seed = 0
        if self.fault == "ignores max_tokens":
            limit += 5
        if self.fault == "ends early":
            limit = max(1, limit - 6)
        model, prompt = self.models[body["model"]], body["prompt"]
        names = ("top_p", "min_p", "repetition_penalty")
        settings = SamplingParams(
            temperature,
            top_k=max(0, body["top_k"]),
            **{name: body[name] for name in names},
            max_completion_length=limit,
            stop_strings=tuple(body["stop"]),
            eos_ids=tuple(body["stop_token_ids"]),
        )
        used = self.first if self.fault == "stale prefixes" else model
        [[(ids, numbers, _)]] = generate(used, self.tokenizer, [prompt], [[seed]], settings, "forked")
        if self.fault == "log-probs after temperature":
            row = TokenizedCompletion.of(prompt, ids)
            logits = model(torch.tensor([row.ids.tolist()])).logits[0, row.start - 1 : -1] / (temperature or 1.0)
            numbers = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
        if self.fault == "unknown ids":
            ids = [*ids[:-1], 10**6]
        if body["echo"]:
            echoed = plain_log_probs(model, [TokenizedCompletion.of(prompt[:1], prompt[1:])], 0)[0]
            numbers = [None, *echoed, *numbers]
        if self.fault == "few log-probs":
            numbers = numbers[:-1]
        if self.fault == "nan":
            numbers = [*numbers[:-1], math.nan]
        choice = {"token_ids": ids, "prompt_token_ids": prompt, "logprobs": {"token_logprobs": numbers}}
        for missing, name in (("no ids", "token_ids"), ("no log-probs", "logprobs")):
            if self.fault == missing:
                del choice[name]
        return {**choice, "finish_reason": "length"}


@contextlib.contextmanager
def completions_server(folder: Path) -> Iterator[tuple[str, CompletionsService]]:
    """The address of a server of the model in this folder, under the name tiny, and what it serves."""
    service = CompletionsService(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            models = [{"id": "another"}] if service.fault == "another name" else [{"id": n} for n in service.models]
            replies = {"/v1/models": {"data": models}, "/version": {"version": "1.2.3"}}
            self.reply(200 if self.path in replies else 404, replies.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if service.fault == "hangs" and self.path == "/v1/completions":
                time.sleep(1.0)
            status, content = (0, None) if service.dead else service.answer(self.path, body)
            if service.dead:
                self.close_connection = True  # without a reply
                return
            self.reply(status, content)

        def reply(self, status: int, content: Any) -> None:
            data = b"" if content is None else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
