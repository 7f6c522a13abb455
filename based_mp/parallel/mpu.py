"""The one adapter between DeepSpeed and megatron-core: DeepSpeed's names on megatron-core's process groups."""

from __future__ import annotations

from megatron.core import parallel_state as ps


class MPU:
    """What DeepSpeed asks of `mpu`. Model parallel is tensor parallel here; nothing else cuts the model."""

    @staticmethod
    def get_model_parallel_group():
        return ps.get_model_parallel_group()

    @staticmethod
    def get_model_parallel_world_size() -> int:
        return ps.get_model_parallel_group().size()

    @staticmethod
    def get_model_parallel_rank() -> int:
        return ps.get_model_parallel_group().rank()

    @staticmethod
    def get_data_parallel_group():
        return ps.get_data_parallel_group(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_world_size() -> int:
        return ps.get_data_parallel_world_size(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_rank() -> int:
        return ps.get_data_parallel_rank(with_context_parallel=True)

    get_tensor_model_parallel_group = staticmethod(ps.get_tensor_model_parallel_group)
    get_tensor_model_parallel_world_size = staticmethod(ps.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_rank = staticmethod(ps.get_tensor_model_parallel_rank)
    get_pipeline_model_parallel_group = staticmethod(ps.get_pipeline_model_parallel_group)
    get_pipeline_model_parallel_world_size = staticmethod(ps.get_pipeline_model_parallel_world_size)
    get_pipeline_model_parallel_rank = staticmethod(ps.get_pipeline_model_parallel_rank)
