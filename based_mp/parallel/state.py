"""Rendezvous and process groups: the only code that knows how the processes were started.

Understands the environments of torchrun and the deepspeed launcher (RANK, WORLD_SIZE, LOCAL_RANK), OpenMPI
(OMPI_COMM_WORLD_*), other MPIs (PMI_*) and slurm's srun (SLURM_*); with none of them it is a single process.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import socket
import subprocess
import time
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist

from based_mp.errors import UserError
from based_mp.parallel import exchange

# (rank, world size, local rank) in each launcher's environment; the first that is complete is used.
_LAUNCHERS = [
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
]

_store: dist.Store | None = None          # where the processes met, for `tells`


class _OwnError(UserError):
    """An error of this process alone, found before it met the others."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands."""

    rank: int
    world_size: int
    local_rank: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    device: torch.device


def launcher_env() -> tuple[int, int, int]:
    """(rank, world size, local rank) from the launcher's environment; (0, 1, 0) when started directly."""
    for names in _LAUNCHERS:
        if all(name in os.environ for name in names[:2]):
            # srun sets SLURM_* inside an interactive allocation too: without a task layout it is one process.
            if names[0].startswith("SLURM") and "SLURM_STEP_ID" not in os.environ:
                continue
            rank, world = (int(os.environ[name]) for name in names[:2])
            return rank, world, int(os.environ.get(names[2], 0))
    return 0, 1, 0


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """"auto" takes CUDA when a GPU is there. Raises UserError for an unusable GPU."""
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if wanted == "cuda":
            raise UserError("the device is cuda but torch sees no GPU: install a CUDA build of torch and check the "
                            "driver, or choose cpu (training.device=cpu; generate: --device cpu)")
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        kind = _OwnError if local_rank == count else UserError
        raise kind(f"local rank {local_rank} has no GPU of its own ({count} visible): start {count} processes "
                   "on this node, or choose cpu (training.device=cpu; generate: --device cpu)")
    return torch.device("cuda", local_rank)


def quiet_imports() -> None:
    """Ignore warnings of megatron-core and DeepSpeed, which announce optional packages that are not used here."""
    for module in ("megatron", "deepspeed", "torch.distributed"):
        warnings.filterwarnings("ignore", module=module.replace(".", r"\.") + r"\b.*")


def initialize(tensor_parallel_size: int = 1, *, device: str = "auto", seed: int = 1234,
               timeout_minutes: float = 30) -> Ranks:
    """Join the other processes and build megatron-core's process groups.

    device: "auto", "cpu" or "cuda". seed: of the weights' initialisation, the same on every rank; tensor-parallel
    ranks get distinct streams where megatron-core's tracker needs them.
    """
    rank, world, local_rank = launcher_env()
    if tensor_parallel_size < 1 or world % tensor_parallel_size:
        raise UserError(f"{world} processes cannot be split into tensor-parallel groups of {tensor_parallel_size}: "
                        "start a multiple of it (torchrun --nproc_per_node …), or change the tensor-parallel size")
    where = choose_device(device, local_rank)
    _set_environment(rank, world, local_rank, where)
    quiet_imports()
    from megatron.core import parallel_state, tensor_parallel
    if where.type == "cpu":
        from based_mp.parallel import cpu_shim
        cpu_shim.enable()
    else:
        torch.cuda.set_device(where)
    if not dist.is_initialized():
        # No device_id: NCCL would connect each of megatron-core's groups at once, at hundreds of MB of GPU memory each.
        dist.init_process_group("gloo" if where.type == "cpu" else "nccl", rank=rank, world_size=world,
                                timeout=datetime.timedelta(minutes=timeout_minutes))
    global _store
    _store = dist.distributed_c10d._get_default_store()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel_size)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Ranks(rank, world, local_rank, parallel_state.get_tensor_model_parallel_rank(), tensor_parallel_size,
                 parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size(), where)


def destroy() -> None:
    """Leave the process groups; safe to call twice."""
    exchange.forget()
    from megatron.core import parallel_state
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    _restore_environment()


def tells(error: UserError) -> bool:
    """Whether this process is the one that prints `error`.

    The first that failed with this sentence is; before the processes have met, the first of every node.
    """
    rank, world, local_rank = launcher_env()
    if _store is None:
        return local_rank == 0 or isinstance(error, _OwnError)
    key = f"error {error}"
    try:
        first = _store.add(key, 1) == 1
        end = time.monotonic() + 2                    # the others ask rank 0's store
        while rank == 0 and _store.add(key, 0) < world and time.monotonic() < end:
            time.sleep(0.02)
    except dist.DistError:
        return True
    return first


_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR", "MASTER_ADDR", "MASTER_PORT")
_environment: dict[str, str | None] = {}             # what they were before `initialize`


def _restore_environment() -> None:
    """Processes that are started later make groups of their own."""
    for name, value in _environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _environment.clear()


def _set_environment(rank: int, world: int, local_rank: int, device: torch.device) -> None:
    """Give torch.distributed and DeepSpeed the variables they read, whoever started the process."""
    _environment.update({name: os.environ.get(name) for name in _VARIABLES if name not in _environment})
    started_by_mpi = "RANK" not in os.environ and ("OMPI_COMM_WORLD_RANK" in os.environ or "PMI_RANK" in os.environ)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank))
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return
    if world == 1:
        address, port = "127.0.0.1", _free_port()
    elif started_by_mpi:
        address, port = _agree_through_mpi()
    else:                                            # slurm: every task derives the same pair from the job's id
        address, port = _first_slurm_host(), 20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 10000
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ.setdefault("MASTER_PORT", str(port))


def _agree_through_mpi() -> tuple[str, int]:
    """Rank 0 picks its host and a free port and tells the others."""
    if importlib.util.find_spec("mpi4py") is None:
        raise UserError("started by mpirun without mpi4py: pip install mpi4py, or pass the address yourself with "
                        "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=PORT")
    from mpi4py import MPI
    comm = MPI.COMM_WORLD
    one_node = comm.Split_type(MPI.COMM_TYPE_SHARED).size == comm.size
    host = "127.0.0.1" if one_node else socket.gethostbyname(socket.gethostname())
    return comm.bcast((host, _free_port()) if comm.rank == 0 else None)


def _first_slurm_host() -> str:
    """The first host of a slurm allocation; this machine otherwise."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes or int(os.environ.get("SLURM_NNODES", "1")) == 1:
        return "127.0.0.1"
    try:
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError("scontrol does not tell the hosts of this slurm job: export MASTER_ADDR (the first host) and "
                        "MASTER_PORT before srun, as launch/slurm.sbatch does") from error
    return hosts.stdout.split()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
