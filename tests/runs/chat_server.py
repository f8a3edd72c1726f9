"""A real local server of chat models, `transformers serve`, with two of them: the starter, and one that says A."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raftune.starters.text import policy_path
from raftune.training.quiet import quiet
from tests.builders import BOS, EOS, PAD, VOCABULARY, tiny_tokenizer

STARTS_WITHIN = 120.0  # seconds: four on a machine that is idle
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class ChatServer:
    """Where it listens, the two models it serves, and its log."""

    url: str
    starter: str
    always_a: str
    log: Path

    @property
    def answered(self) -> int:
        """How many chat completions it has served so far."""
        return self.log.read_text().count("POST /v1/chat/completions")


@contextlib.contextmanager
def chat_server(folder: Path) -> Iterator[ChatServer]:
    """The server while the block runs; it is ended by its process id."""
    starter, always_a, log = folder / "starter", folder / "always-a", folder / "serve.log"
    shutil.copytree(policy_path(), starter)
    (starter / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    save_always_a(always_a)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--device", "cpu"], stdout=out, stderr=subprocess.STDOUT, env=os.environ, cwd=folder
        )
    try:
        wait_until_it_listens(process, f"http://127.0.0.1:{port}/health", log)
        yield ChatServer(f"http://127.0.0.1:{port}", str(starter), str(always_a), log)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_it_listens(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + STARTS_WITHIN
    with httpx2.Client(trust_env=False) as client:
        while time.monotonic() < until:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(httpx2.HTTPError):
                if client.get(url).is_success:
                    return
            time.sleep(0.1)
    raise AssertionError(f"no server after {STARTS_WITHIN} s: {log.read_text()}")


def save_always_a(folder: Path) -> None:
    """A Llama whose answer to anything is the letter A, by its weights.

    Attention and the perceptron are zero, so that the last token alone decides: after A comes the end, after any other
    token comes A.
    """
    tokenizer = tiny_tokenizer(chat=True)
    letter = tokenizer.convert_tokens_to_ids("A")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 8192}
    ids = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **ids, **heads))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.embed_tokens.weight[letter] = torch.eye(8)[1]
        model.lm_head.weight[letter, 0] = 10
        model.lm_head.weight[EOS, 1] = 10
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
