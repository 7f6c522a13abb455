"""What a person sees of a run: a line on the terminal and TensorBoard."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import psutil
import torch

from based_mp.config import Config
from based_mp.errors import UserError
from based_mp.estimate import flops_per_token
from based_mp.parallel.state import Ranks


class Metrics:
    """Throughput and logging. Only rank 0 writes.

    MFU = tokens/s per device × `flops_per_token` / (logging.peak_tflops × 10¹²).
    """

    def __init__(self, config: Config, ranks: Ranks, start_step: int) -> None:
        self.config, self.ranks = config, ranks
        self.flops = flops_per_token(config)
        self.step_tokens = config.training.global_batch_size * config.training.seq_length
        self.writer = self._open_writer(start_step) if ranks.rank == 0 else None
        self.last_step, self.last_time = start_step, time.perf_counter()
        self.paused = self.waited = 0.0

    def _open_writer(self, start_step: int) -> Any:
        if self.config.logging.tensorboard_dir is None:
            return None
        from torch.utils.tensorboard import SummaryWriter
        directory = self.config.logging.tensorboard_dir
        try:                                     # points after the step that is gone on from are of an abandoned run
            writer = SummaryWriter(directory, purge_step=start_step + 1)
        except OSError as error:
            raise UserError(f"cannot write to logging.tensorboard_dir={directory}: {error.strerror}") from error
        writer.add_text("config", f"```yaml\n{self.config.to_yaml()}```", start_step)
        return writer

    def pause(self) -> _Pause:
        """A block whose time does not count as training (validation, checkpoints, samples)."""
        return _Pause(self)

    def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches; the time this process waits for them is logged."""
        stream = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(stream)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield batch

    def log_step(self, step: int, loss: float, lr: float, grad_norm: float) -> None:
        """After `step` steps: one line, one TensorBoard point."""
        now = time.perf_counter()
        seconds = max(now - self.last_time - self.paused, 1e-9)
        done = step - self.last_step
        rate = done * self.step_tokens / seconds / self.ranks.world_size
        mfu = rate * self.flops / (self.config.logging.peak_tflops * 1e12)
        eta = (self.config.training.steps - step) * seconds / max(done, 1)
        memory = self.memory_gib()
        waited = self.waited / seconds
        self.last_step, self.last_time, self.paused, self.waited = step, now, 0.0, 0.0
        self.scalars(step, {
            "train/loss": loss, "train/perplexity": math.exp(min(loss, 50)), "train/lr": lr,
            "train/grad_norm": grad_norm, "speed/tokens_per_second_per_gpu": rate, "speed/mfu": mfu,
            "speed/data_wait": waited, "memory/gib": memory})
        self.say(f"step {step:>6}/{self.config.training.steps} | loss {loss:7.4f} | lr {lr:.3e} | "
                 f"grad norm {grad_norm:6.3f} | {rate:>9,.0f} tok/s/rank | MFU {mfu:6.2%} | "
                 f"mem {memory:5.2f} GiB | data wait {waited:5.2%} | ETA {_duration(eta)}")

    def log_validation(self, step: int, losses: dict[str, float], mean: float, split: str = "valid") -> None:
        """Loss and perplexity of every corpus and of all together (weighted)."""
        for name, loss in losses.items():
            self.scalars(step, {f"{split}_{name}/loss": loss, f"{split}_{name}/perplexity": math.exp(min(loss, 50))})
        self.scalars(step, {f"{split}/loss": mean, f"{split}/perplexity": math.exp(min(mean, 50))})
        parts = ", ".join(f"{name} {math.exp(min(loss, 50)):.2f}" for name, loss in losses.items())
        self.say(f"{split} at step {step}: loss {mean:.4f}, perplexity {math.exp(min(mean, 50)):.2f} ({parts})")

    def log_slices(self, step: int, corpus: str, values: dict[str, float]) -> None:
        """What `RecallSlices.result` tells of one corpus."""
        self.scalars(step, {f"{corpus}/{name}": value for name, value in values.items()})
        self.say(f"{corpus} at step {step}: " + ", ".join(
            f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items()))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, value: str) -> None:
        if self.writer is not None:
            self.writer.add_text(name, value, step)

    def say(self, line: str) -> None:
        if self.ranks.rank == 0:
            print(line, flush=True)

    def memory_gib(self) -> float:
        """Peak GPU memory of this rank; resident memory on the CPU."""
        if self.ranks.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return psutil.Process().memory_info().rss / 2**30

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class _Pause:
    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        self.metrics.paused += time.perf_counter() - self.start


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours:02}:{minutes:02}:{s:02}"
