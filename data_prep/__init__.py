"""From Pile-format shards to Megatron indexed datasets. Imports neither megatron nor deepspeed nor torch."""
