"""A trained model's weights as inference runs them: packed prompts, or one token of every row, on states in slots.

The weights are the trained parameters themselves, by their names; but where a product follows an RMSNorm, copies that
the norm's weights are multiplied into. Tensor parallel as the training layers are: column-parallel into a mixer or MLP,
row-parallel and a sum over the ranks out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from based_mp.config import ModelConfig
from based_mp.inference.pack import AnyPack, Pack, flatten
from based_mp.inference.state import RECENT, StatePool, to_device
from based_mp.model.mixer import RowMixer
from based_mp.ops import backends
from based_mp.ops.decode_torch import Pending
from based_mp.ops.fused.rotary_attention import rope_frequency
from based_mp.ops.linear_attention import TaylorState, log_decay, taylor_linear_attention_qkv
from based_mp.ops.reference import taylor_feature_dim
from based_mp.ops.window_attention import causal_attention

# A residual stream before a norm, as the operations of `based_mp.ops.decode_torch` take it: the stream [n, d_model],
# what it has still to take in, the norm's epsilon.
Stream = tuple[Tensor, Any, float]
# What a mixer makes of it: the input of its output product, and the bias which is to be added to that.
Mixed = tuple[Tensor, Tensor | None]
# Mixers have `capturable`: whether their `prefill` of a FixedPack waits for nothing, as in a CUDA graph.


@dataclass
class Rows:
    """One new token of every row. slots: int32 [n]; rotation: fp32 [n, 2, half] of the tokens' positions."""

    pool: StatePool
    slots: Tensor
    rotation: Tensor


def _of_seen(pack: AnyPack, states: Tensor) -> Tensor:
    """States [pieces, …] out of the slots; zeros for pieces that start documents, whatever lay there."""
    return states.where(pack.seen.view(-1, *[1] * (states.dim() - 1)), 0)


class ConvMixer:
    """Gated short convolution. Its state: the last taps − 1 inputs of the convolution."""

    def __init__(self, w: dict[str, Tensor], ops: object) -> None:
        self.linear_in, self.linear_out = w["linear_in.weight"], w["linear_out.weight"]
        self.bias, self.conv, self.out_bias, self.ops = w["linear_in.bias"], w["conv_weight"], w["out_bias"], ops
        self.capturable = backends.gated_conv_backend(self.conv, self.conv, None) == "cuda"

    def buffers(self, slots: int, length: int) -> dict[str, Tensor]:
        channels, taps = self.conv.shape
        return {"carry": self.conv.new_zeros(slots, taps - 1, channels)}

    def step(self, stream: Stream, rows: Rows, carry: Tensor) -> Mixed:
        return self.ops.norm_conv_step(*stream, self.linear_in, self.bias, self.conv, self.out_bias, rows.slots, carry)

    def prefill(self, stream: Stream, pack: AnyPack, carry: Tensor) -> Mixed:
        x = self.ops.norm_linear(*stream, self.linear_in)
        before = None if pack.fresh else _of_seen(pack, carry[pack.slots])
        y, carry[pack.slots] = self.ops.conv_run(x, self.bias, self.conv, pack.bounds, before)
        return y, self.out_bias


class TaylorMixer:
    """Taylor linear attention. Its state: Σ φ(k) vᵀ and Σ φ(k) of every head over the distinct features, fp32.

    While tokens are generated, k and v of the last ones may lie in `recent` instead (see `taylor_step_`).
    """

    def __init__(self, w: dict[str, Tensor], ops: object, config: ModelConfig, tp_rank: int, tp_size: int) -> None:
        self.linear_in, self.linear_out = w["linear_in.weight"], w["linear_out.weight"]
        self.ops, self.feature_dim, self.head_dim = ops, config.feature_dim, config.head_dim
        self.heads = config.num_heads // tp_size
        self.decay = None
        if config.decay_exponent is not None:
            self.decay = torch.tensor(log_decay(config.decay_exponent, tp_rank * self.heads, self.heads),
                                      device=self.linear_in.device)
        self.capturable = self.decay is None

    def buffers(self, slots: int, length: int) -> dict[str, Tensor]:
        features = taylor_feature_dim(self.feature_dim)
        empty = {"dtype": torch.float32, "device": self.linear_in.device}
        state = {"kv": torch.zeros(slots, self.heads, features, self.head_dim, **empty),
                 "z": torch.zeros(slots, self.heads, features, **empty)}
        if self.ops.RECENT:
            state[RECENT] = self.linear_in.new_zeros(slots, self.heads, self.ops.RECENT,
                                                     self.feature_dim + self.head_dim)
        return state

    def step(self, stream: Stream, rows: Rows, kv: Tensor, z: Tensor, recent: Tensor | None = None) -> Mixed:
        return self.ops.norm_taylor_step_(*stream, self.linear_in, rows.slots, rows.pool, kv, z, recent, self.decay,
                                          self.feature_dim), None

    def prefill(self, stream: Stream, pack: AnyPack, kv: Tensor, z: Tensor, recent: Tensor | None = None) -> Mixed:
        x = self.ops.norm_linear(*stream, self.linear_in)
        f, qkv = self.feature_dim, x[None].unflatten(-1, (self.heads, -1))
        before = None
        if not pack.fresh:
            state = (kv[pack.slots], z[pack.slots]) if pack.settled else \
                self.ops.settled(pack.pool, pack.slots, kv, z, recent, self.decay, f)
            before = TaylorState(*(_of_seen(pack, x) for x in state))
        o, after = taylor_linear_attention_qkv(qkv, f, decay=self.decay, initial_state=before, return_state=True,
                                               cu_seqlens=pack.bounds)
        kv[pack.slots], z[pack.slots] = after.kv, after.z
        return o[0].flatten(1), None


class SoftmaxMixer:
    """Softmax attention with RoPE. Its state: a ring of the window's keys and values, or of all of them."""

    capturable = True

    def __init__(self, w: dict[str, Tensor], ops: object, config: ModelConfig, window: int | None,
                 tp_size: int) -> None:
        self.linear_in, self.linear_out = w["linear_in.weight"], w["linear_out.weight"]
        self.ops, self.window, self.head_dim = ops, window, config.head_dim
        self.heads, self.padded = config.num_heads // tp_size, -(-config.head_dim // 8) * 8

    def buffers(self, slots: int, length: int) -> dict[str, Tensor]:
        shape = (slots, self.heads, length if self.window is None else self.window, self.padded)
        return {"keys": self.linear_in.new_zeros(shape), "values": self.linear_in.new_zeros(shape)}

    def step(self, stream: Stream, rows: Rows, keys: Tensor, values: Tensor) -> Mixed:
        return self.ops.norm_attention_step(*stream, self.linear_in, rows.slots, rows.pool.positions, rows.rotation,
                                            keys, values, self.head_dim), None

    def prefill(self, stream: Stream, pack: AnyPack, keys: Tensor, values: Tensor) -> Mixed:
        x = self.ops.norm_linear(*stream, self.linear_in)
        q, k, v = self.ops.rope_run(x, pack.rotation, self.heads, self.head_dim, self.padded)
        if pack.fresh:
            o = causal_attention(q[None], k[None], v[None], window=self.window, cu_seqlens=pack.bounds,
                                 longest=(pack.longest, pack.longest))
        else:
            o = self._continue(q, k, v, pack, keys, values)
        tokens, slots, ring = pack.kept(keys.shape[2])
        for buffer, new in ((keys, k), (values, v)):
            buffer[slots, :, ring] = new if tokens is None else new[tokens]
        return o[0, :, :, : self.head_dim].flatten(1), None

    def _continue(self, q: Tensor, k: Tensor, v: Tensor, pack: AnyPack, keys: Tensor, values: Tensor) -> Tensor:
        """Every piece after the keys that its first token still sees."""
        context, whole = pack.context(keys.shape[2], self.window), []
        for buffer, own in ((keys, k), (values, v)):
            both = own.new_empty(len(context.before) + len(own), *own.shape[1:])
            both[context.before], both[context.own] = buffer[context.slots, :, context.places], own
            whole.append(both[None])
        return causal_attention(q[None], *whole, window=self.window, cu_seqlens=pack.bounds,
                                cu_seqlens_k=context.bounds, longest=(pack.longest, context.longest))


class ModuleMixer:
    """GLA, Mamba, H3, Hyena or RWKV: the training module itself, on rows taken out of the slots and put back."""

    capturable = False

    def __init__(self, module: RowMixer, norm: Tensor, ops: object, dtype: torch.dtype) -> None:
        self.module, self.norm, self.ops, self.dtype = module, norm, ops, dtype
        self.linear_out = module.linear_out.weight

    def _project(self, stream: Stream) -> Tensor:
        x = self.ops.add_norm(*stream) * self.norm
        return self.module.project(x[None].to(self.norm.dtype))[0]

    def buffers(self, slots: int, length: int) -> dict[str, Tensor]:
        state = self.module.init_state(slots, self.linear_out.device, self.dtype, length)
        self.kind = type(state)
        return vars(state)

    def step(self, stream: Stream, rows: Rows, **buffers: Tensor) -> Mixed:
        x = self._project(stream)
        slots = rows.slots.long()
        return self._on_rows(lambda state: self.module.run(x[None], state, None)[0], slots, buffers,
                             {name: buffer[slots] for name, buffer in buffers.items()}), None

    def prefill(self, stream: Stream, pack: Pack, **buffers: Tensor) -> Mixed:
        x = self._project(stream)
        rows = {name: _of_seen(pack, buffer[pack.slots]) for name, buffer in buffers.items()}
        return self._on_rows(lambda state: self.module.run_packed(x[:, None], state, pack.bounds)[:, 0], pack.slots,
                             buffers, rows), None

    def _on_rows(self, run: Callable[[Any], Tensor], slots: Tensor, buffers: dict[str, Tensor],
                 rows: dict[str, Tensor]) -> Tensor:
        state = self.kind(**rows)
        y = run(state)
        for name, buffer in buffers.items():
            buffer[slots] = getattr(state, name).to(buffer.dtype)
        return y


Mixer = ConvMixer | TaylorMixer | SoftmaxMixer | ModuleMixer


@dataclass
class Layer:
    """fc1, fc2: None in layers without MLP."""

    mixer: Mixer
    fc1: Tensor | None
    fc2: Tensor | None


def with_norm(norm: Tensor, weight: Tensor) -> Tensor:
    """W diag(norm): the weights of a product [columns, d_model] after an RMSNorm, with the norm's."""
    return (weight * norm).to(weight.dtype)


class InferenceModel:
    """`prefill` and `step` of one model, on the device its parameters are on, after the process groups are there."""

    def __init__(self, module: torch.nn.Module, config: ModelConfig) -> None:
        w = {name: parameter.detach() for name, parameter in module.named_parameters()}
        self.config = config
        self.tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self.tp_size = parallel_state.get_tensor_model_parallel_world_size()
        self.embedding = w["embedding.word_embeddings.weight"]
        self.head = with_norm(w["decoder.final_layernorm.weight"],
                              self.embedding if config.tie_embeddings else w["output_layer.weight"])
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        self.residual_dtype = torch.float32 if config.fp32_residual else self.dtype
        self.ops = backends.decode_ops(self.embedding, config, self.tp_size)
        self.layers = [self._layer(w, f"decoder.layers.{i}.", kind, module.decoder.layers[i].self_attention)
                       for i, kind in enumerate(config.mixers)]
        half = int(config.head_dim * config.rotary_fraction) // 2
        self.frequency = rope_frequency(half, config.rotary_base, self.device)
        self.rotate = partial(self.ops.rotations, frequency=self.frequency)
        self.capturable = all(layer.mixer.capturable for layer in self.layers)
        attention = [layer.mixer for layer in self.layers if isinstance(layer.mixer, SoftmaxMixer)]
        # A pack that is not fresh too: without a window, earlier keys have no size that is known before.
        self.continuable = self.capturable and all(mixer.window is not None for mixer in attention)

    def _layer(self, w: dict[str, Tensor], prefix: str, kind: str, module: torch.nn.Module) -> Layer:
        inner = prefix + "self_attention."
        own = {name.removeprefix(inner): weight for name, weight in w.items() if name.startswith(inner)}
        norm = w[prefix + "input_layernorm.weight"]
        fc1, fc2 = (w.get(f"{prefix}mlp.linear_fc{i}.weight") for i in (1, 2))
        if fc1 is not None:
            fc1 = with_norm(w[prefix + "pre_mlp_layernorm.weight"], fc1)
        if isinstance(module, RowMixer):
            return Layer(ModuleMixer(module, norm, self.ops, self.dtype), fc1, fc2)
        own["linear_in.weight"] = with_norm(norm, own["linear_in.weight"])
        if kind == "gated_conv":
            mixer: Mixer = ConvMixer(own, self.ops)
        elif kind == "linear_attention":
            mixer = TaylorMixer(own, self.ops, self.config, self.tp_rank, self.tp_size)
        else:
            window = self.config.window if kind == "sliding_attention" else None
            mixer = SoftmaxMixer(own, self.ops, self.config, window, self.tp_size)
        return Layer(mixer, fc1, fc2)

    def new_pool(self, slots: int, length: int) -> StatePool:
        """Empty states for `slots` sequences; `length`: most tokens of a sequence that full attention keeps."""
        return StatePool([layer.mixer.buffers(slots + 1, length) for layer in self.layers], slots, length,
                         self.config.vocab_size, self.device, on_host=self.ops.RESULTS_ON_HOST)

    @torch.no_grad()
    def step(self, pool: StatePool, slots: Tensor) -> Tensor:
        """Logits [n, padded vocab] after each slot's last token (pool.tokens); slots int32 [n]. States advance."""
        residual, rotation = self.ops.embed_step(pool, slots, self.embedding, self._first_id, self.residual_dtype,
                                                 self.frequency)
        rows = Rows(pool, slots, rotation)
        return self._run(self._sum(residual), pool,
                         lambda layer, stream, state, _: layer.mixer.step(stream, rows, **state))

    def prefill(self, pool: StatePool, tokens: list[list[int]], slots: list[int], starts: list[int], *,
                every: bool = False) -> Tensor:
        """Feed each of these slots its tokens. Returns logits after each piece [pieces, padded vocab].

        starts: tokens that each slot has seen; where it is 0, what is in the slot does not count. every: logits after
        every token [all tokens, padded vocab] instead.
        """
        pack = Pack(pool, slots, starts, [len(piece) for piece in tokens], self.rotate)
        return self.run(pack, to_device(flatten(tokens), self.device), every=every)

    @torch.no_grad()
    def run(self, pack: AnyPack, ids: Tensor, *, every: bool = False) -> Tensor:
        """`prefill` of a pack whose tokens are `ids`."""
        residual = self.ops.embed(ids, self.embedding, self._first_id).to(self.residual_dtype)
        logits = self._run(self._sum(residual), pack.pool, lambda layer, stream, state, ends:
                           layer.mixer.prefill(stream, ends or pack, **state), None if every else pack)
        pack.pool.positions[pack.slots] = pack.pool.starts[pack.slots] = pack.ends
        return logits

    @property
    def _first_id(self) -> int:
        return self.tp_rank * self.embedding.shape[0]

    def _run(self, residual: Tensor, pool: StatePool, mix: Callable[..., Tensor],
             ends: AnyPack | None = None) -> Tensor:
        """Logits of every row; of each piece's last where `ends` is given, the pack that the rows are.

        mix: (layer, stream, state, ends) → what the mixer makes.
        """
        ops, eps, pending = self.ops, self.config.norm_eps, None
        for layer, state in zip(self.layers, pool.buffers, strict=True):
            only_ends = ends is not None and layer is self.layers[-1]
            if only_ends and isinstance(layer.mixer, ConvMixer) and (tail := ends.tail(layer.mixer.conv.shape[1])):
                tokens, ends = tail                                   # the rest does not reach the ends
                residual, pending = residual[tokens], pending and pending[tokens]
            x, bias = mix(layer, (residual, pending, eps), state, ends)
            if only_ends:
                x, residual = x[ends.last], residual[ends.last]
            pending = self._out(x, layer.mixer.linear_out, bias, residual)
            if layer.fc1 is not None:
                x = ops.norm_linear(residual, pending, eps, layer.fc1, swiglu=True)
                pending = self._out(x, layer.fc2, None, residual)
        return gather_from_tensor_model_parallel_region(ops.norm_linear(residual, pending, eps, self.head))

    def _out(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Any:
        """A layer's result on its way into the residual stream: what the next norm takes as pending."""
        if self.tp_size == 1:
            return self.ops.linear_add(x, weight, bias, residual)
        return Pending(self._sum(self.ops.linear(x, weight)), bias)

    def _sum(self, x: Tensor) -> Tensor:
        return reduce_from_tensor_model_parallel_region(x) if self.tp_size > 1 else x
