"""The forward pass of Llama-like models in few operations, for prompts and for one token of each row.

It reads the weights of the model's own modules and computes what their forward computes: query, key and value
projections in one product, gate and up projections in one, residuals added inside products, rotary tables made once,
no masks for single tokens, and the last layer of a prompt for its last token only. Which model may be read is decided
here by its classes; that the result is the same is decided by the parity check (parity.py).

Legend: R rows or tokens, X model width, H query heads over C key/value heads, D head size, G prompts of P tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
LEAST_PREFIX = 8  # tokens that all prompts of a batch begin with, from which on these are computed once
# A layer's number, its queries (R, H, D), keys and values (R, C, D), and their scale become its output, (R, H*D).
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


def why_not_fused(model: Any) -> str:
    """Why the model's forward cannot be read from its modules; empty where it can."""
    name = type(model).__name__
    if name not in KINDS or not type(model).__module__.startswith("transformers.models."):
        return f"{name} is none of {', '.join(sorted(KINDS))}"
    for path, module in model.model.layers.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"layers.{path} has hooks, or a forward of its own"
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            return f"layers.{path} is a {type(module).__name__}"
    if len({weight.device for weight in model.parameters()}) > 1:
        return "its weights lie on several devices"
    return ""


class FusedForward:
    """The model's forward. Joined weights are shared with its modules, whose parameters become views of them."""

    def __init__(self, model: Any) -> None:
        self._model, self._base = model, model.model
        self._head_size = self._base.layers[0].self_attn.head_dim
        self._cos = self._sin = torch.empty(0)
        with torch.inference_mode(False), torch.no_grad():
            self._layers = [
                (
                    layer,
                    _joined(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                    _joined(layer.mlp.gate_proj, layer.mlp.up_proj),
                )
                for layer in self._base.layers
            ]

    def reserve(self, end: int) -> None:
        """Makes rotary tables for positions below `end` only: some models change their frequencies beyond."""
        if len(self._cos) < end:
            weight = self._base.embed_tokens.weight
            tables = self._base.rotary_emb(weight, torch.arange(end, device=weight.device)[None])
            self._cos, self._sin = (table[0, :, None, : self._head_size // 2] for table in tables)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits after each prompt (G, V), and the keys and values of every layer (G, C, P, D), right-padded.

        A beginning that all prompts share is computed once. `reserve` must have been called.
        """
        shared = _shared(prompts) if len(prompts) > 1 else 0
        layers: list[tuple[Tensor, Tensor]] = []
        if shared >= LEAST_PREFIX:
            self._prompts([prompts[0][:shared]], 0, layers)
        else:
            shared = 0
        states = self._prompts([prompt[shared:] for prompt in prompts], shared, layers)
        return self._logits(states), layers

    def _prompts(self, prompts: Sequence[Sequence[int]], start: int, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
        """States (G, X) of the last token of each prompt, whose first token has position `start`.

        `layers` holds keys and values (1, C, start, D) of the tokens before, and afterwards those of all tokens.
        """
        count, width, device = len(prompts), max(map(len, prompts)), self._cos.device
        ids = torch.tensor([[*prompt, *[prompt[-1]] * (width - len(prompt))] for prompt in prompts], device=device)
        last = torch.tensor([row * width + len(prompt) - 1 for row, prompt in enumerate(prompts)], device=device)
        mask = torch.ones(width, start + width, dtype=torch.bool, device=device).tril(start) if start else None

        def attend(number: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            query, key, value = (s.view(count, width, *s.shape[1:]).transpose(1, 2) for s in (query, key, value))
            if start:
                before = layers[number]
                key, value = (
                    torch.cat([b.expand(count, -1, -1, -1), s], 2) for b, s in zip(before, (key, value), strict=True)
                )
                layers[number] = key, value
            else:
                layers.append((key, value))
            out = F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
            return out.transpose(1, 2).reshape(count * width, -1)

        position = slice(start, start + width)
        cos, sin = (table[position].repeat(count, 1, 1) for table in (self._cos, self._sin))
        return self._forward(ids, cos, sin, attend, last)

    def step(self, tokens_R: Tensor, positions_R: Tensor, attend: Attend) -> Tensor:
        """Logits (R, V) after one more token of each row."""
        cos, sin = self._cos[positions_R], self._sin[positions_R]
        return self._logits(self._forward(tokens_R[:, None], cos, sin, attend))

    def _logits(self, states_RX: Tensor) -> Tensor:
        logits: Tensor = self._model.lm_head(self._base.norm(states_RX[:, None]))[:, 0]
        return logits

    def _forward(self, ids: Tensor, cos: Tensor, sin: Tensor, attend: Attend, last: Tensor | None = None) -> Tensor:
        """States (R, X) before the final norm, of all tokens or, with their indices `last`, of these alone."""
        states: Tensor = self._base.embed_tokens(ids).flatten(0, 1)
        for number, (layer, joined_qkv, joined_mlp) in enumerate(self._layers):
            attention, mlp = layer.self_attn, layer.mlp
            qkv = F.linear(_normed(states, layer.input_layernorm), *joined_qkv).view(len(states), -1, self._head_size)
            shared = attention.k_proj.out_features // self._head_size  # key/value heads
            query_key, value = qkv[:, :-shared], qkv[:, -shared:]
            if hasattr(attention, "q_norm"):
                query, key = query_key[:, :-shared], query_key[:, -shared:]
                query_key = torch.cat([_normed(query, attention.q_norm), _normed(key, attention.k_norm)], 1)
            query_key = _rotated(query_key, cos, sin)
            out = attend(number, query_key[:, :-shared], query_key[:, -shared:], value, attention.scaling)
            if last is not None and number == len(self._layers) - 1:
                states, out = states[last], out[last]
            states = _added(states, out, attention.o_proj)
            gate, up = F.linear(_normed(states, layer.post_attention_layernorm), *joined_mlp).chunk(2, -1)
            states = _added(states, mlp.act_fn(gate).mul_(up), mlp.down_proj)
        return states


def _normed(states: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(states, states.shape[-1:], norm.weight, norm.variance_epsilon)


def _added(states: Tensor, inputs: Tensor, linear: nn.Linear) -> Tensor:
    out = torch.addmm(states, inputs, linear.weight.t())
    return out if linear.bias is None else out.add_(linear.bias)


def _rotated(states_RHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: the halves (a, b) of each head become (a cos - b sin, b cos + a sin)."""
    first, second = states_RHD.chunk(2, -1)
    out = torch.empty_like(states_RHD, memory_format=torch.contiguous_format)
    left, right = out.chunk(2, -1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return out


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; each keeps one of its own."""
    first, last = min(map(list, prompts)), max(map(list, prompts))  # of sorted lists, these two differ first
    most = min(map(len, prompts)) - 1
    return next((at for at in range(most) if first[at] != last[at]), most)


def _joined(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of linear layers that read the same input, as of one layer; their own become views of these."""
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    weights = [linear.weight for linear in linears]
    whole, at = weights[0].data, weights[0].data_ptr()
    sizes = [len(weight) for weight in weights]
    for weight in weights:
        if weight.data_ptr() != at or weight.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            whole = torch.cat([weight.data for weight in weights])
            for own, part in zip(weights, torch.split(whole, sizes), strict=True):
                own.data = part
            return whole, bias
        at += weight.nbytes
    return whole.as_strided((sum(sizes), whole.shape[1]), (whole.shape[1], 1)), bias
