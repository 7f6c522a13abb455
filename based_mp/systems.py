"""Sections of the configuration: their base, and the settings of the mixers that BASED is compared with."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """Base of every section: no unknown keys, no silent type conversion, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class GLAConfig(Section):
    """The gla mixer (Yang et al. 2023)."""

    num_heads: Positive = Field(4, description="heads")
    expand_k: Annotated[float, Field(gt=0)] = Field(0.5, description="key width of all heads / d_model")
    expand_v: Annotated[float, Field(gt=0)] = Field(1.0, description="value width of all heads / d_model")
    gate_rank: Positive = Field(16, description="rank of the decay's projection")
    gate_normalizer: Annotated[float, Field(gt=0)] = Field(16.0, description="log decays are divided by this")


class MambaConfig(Section):
    """The mamba mixer (Gu & Dao 2023)."""

    d_state: Positive = Field(16, description="state values a channel")
    expand: Positive = Field(2, description="channels / d_model")
    conv_kernel: Annotated[int, Field(ge=2)] = Field(4, description="width of the short convolution")
    delta_rank: int | None = Field(None, description="rank of the step size's projection; null: d_model / 16")

    def rank(self, d_model: int) -> int:
        return self.delta_rank or -(-d_model // 16)


class H3Config(Section):
    """The h3 mixer (Fu et al. 2022)."""

    d_state: Annotated[int, Field(ge=2, multiple_of=2)] = Field(
        64, description="width of the shift SSM, and real state values a channel of the diagonal SSM")


class HyenaConfig(Section):
    """The hyena mixer of order 2 (Poli et al. 2023)."""

    filter_length: Positive = Field(2048, description="taps of the long filters: the longest sequence")
    filter_width: Positive = Field(64, description="width of the filters' MLP")
    filter_layers: Annotated[int, Field(ge=2)] = Field(4, description="linear layers of the filters' MLP, the last too")
    filter_embedding: Annotated[int, Field(ge=3)] = Field(33, description="width of the position embedding, odd")
    sine_frequency: float = Field(14.0, description="initial frequency of the MLP's sine activations")
    conv_kernel: Annotated[int, Field(ge=2)] = Field(3, description="width of the short convolution")


class RWKVConfig(Section):
    """The rwkv mixer (RWKV-5, Peng et al. 2024)."""

    head_dim: Positive = Field(64, description="width of a head")
