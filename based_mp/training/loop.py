"""The training loop."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from based_mp.config import Config
from based_mp.data.datasets import Datasets, batches, build_datasets, check_corpora, prepare_cache
from based_mp.evaluation.perplexity import corpus_loss
from based_mp.evaluation.slices import RecallSlices
from based_mp.model.linear_attention import LinearAttention
from based_mp.parallel.state import Ranks
from based_mp.training import checkpoint as ckpt
from based_mp.training.engine import build_engine, set_learning_rate, whole_copy
from based_mp.training.health import StopSignal, check_loss
from based_mp.training.metrics import Metrics
from based_mp.training.micro_batch import MicroBatch, use_own_stream
from based_mp.training.schedule import learning_rate


class Trainer:
    """One run: engine, data and what is written of it."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.eod = check_corpora(config)
        _, self.accumulation = config.check_world(ranks.world_size)
        prepare_cache(config, ranks)
        self.data: Datasets = build_datasets(config, ranks, self.eod)
        use_own_stream(ranks.device)
        self.engine, self.step = self._engine_at_checkpoint()
        self.micro_batch = MicroBatch(self.engine, config, ranks.device)
        self.saved_at = self.step if self.step else None
        self.metrics = Metrics(config, ranks, self.step)
        self.stop = StopSignal(ranks.device)
        self.slices = None
        if config.validation.recall_slices:
            self.slices = RecallSlices(config, parallel_state.get_data_parallel_group(), ranks.device)

    def _engine_at_checkpoint(self) -> tuple[Any, int]:
        config, ranks = self.config, self.ranks
        found = None
        if config.checkpoint.dir:
            ckpt.prepare(config.checkpoint.dir, ranks)
            if config.checkpoint.resume:
                found = ckpt.newest(config.checkpoint.dir)
            else:
                ckpt.check_unused(config.checkpoint.dir)
        if found is None:
            return build_engine(config, ranks), 0
        meta = ckpt.read_meta(found)
        ckpt.check_compatible(meta, found, config, ranks)
        if meta.get("weights_only"):
            return build_engine(config, ranks, weights=found), 0
        engine = build_engine(config, ranks, universal=meta["universal"])
        step = ckpt.load(engine, found, config, ranks)
        if ranks.rank == 0:
            print(f"resuming from {found} at step {step}", flush=True)
        return engine, step

    def run(self, stop_after: int | None = None) -> None:
        """Train to training.steps, or (as a time limit would) to step `stop_after`; validate, save and log."""
        config = self.config
        last = min(config.training.steps, stop_after or config.training.steps)
        if self.step >= last:
            self.metrics.say(f"nothing to train: {self.step} of training.steps={config.training.steps} steps are done")
        with closing(batches(self.data.train, config, self.ranks, self.eod, first_step=self.step,
                             last_step=last)) as stream:
            asked = self._train(self.metrics.timed(stream), last)
        if asked:
            self.metrics.say(f"asked to stop: saving after step {self.step}")
        self._save()
        if self.step == config.training.steps and self.data.test:
            self._evaluate("test", self.data.test)
        self.metrics.close()

    def _train(self, stream: Iterator[dict[str, Tensor]], last: int) -> bool:
        """To step `last`; True when asked to stop before."""
        losses: list[Tensor] = []
        while self.step < last:
            lr = learning_rate(self.step, self.config)
            losses.append(self._train_step(stream, lr))
            self.step += 1
            if self._due(self.config.logging.log_interval) or self.step == last:
                self._log(losses, lr)
                losses = []
            asked = self.stop.agreed()
            if losses and (asked or self._due(self.config.checkpoint.interval)):
                self._mean_loss(losses)                                  # what is no number must not be saved
            if asked or not self._periodic():
                return True
        return False

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.step % interval == 0

    def _periodic(self) -> bool:
        """Validation, sample text and checkpoint, where due; False once asked to stop."""
        config = self.config
        with self.metrics.pause():
            if self._due(config.validation.interval) and self.data.valid and not self._evaluate(
                    "valid", self.data.valid):
                return False
            if self._due(config.logging.sample_interval):
                self._sample()
            if self._due(config.checkpoint.interval):
                self._save()
        return True

    def _train_step(self, stream: Iterator[dict[str, Tensor]], lr: float) -> Tensor:
        """One optimizer step; the mean loss over the tokens that count in the global batch (this rank's part)."""
        set_learning_rate(self.engine, lr)
        micro_batches: Any = islice(stream, self.accumulation)
        if self.config.data.eod_mask_loss:                     # only then do the batches tell how many tokens count
            micro_batches = list(micro_batches)
        counted = self._tokens_in_step(micro_batches)
        total = torch.zeros((), device=self.ranks.device)
        for batch in micro_batches:
            total += self.micro_batch(batch, counted)
            if self.engine.is_gradient_accumulation_boundary():
                self.grad_norm = self._stage_zero_norm()
            self.engine.step()
        if self.grad_norm is None:
            self.grad_norm = self.engine.get_global_grad_norm()
        return total

    def _tokens_in_step(self, micro_batches: Any) -> Tensor | float:
        if not self.config.data.eod_mask_loss:
            return float(self.config.training.global_batch_size * self.config.training.seq_length)
        counted = torch.stack([batch["loss_mask"].sum() for batch in micro_batches]).sum()
        dist.all_reduce(counted, group=parallel_state.get_data_parallel_group())
        return counted.clamp(min=1)

    def _stage_zero_norm(self) -> Tensor | None:
        """Without ZeRO DeepSpeed reports no norm: replicated parameters count once, sharded ones over TP."""
        if self.config.parallel.zero_stage != 0 or self.config.training.precision != "fp32":
            return None
        squares = torch.zeros(2, device=self.ranks.device, dtype=torch.float64)
        for parameter in self.engine.module.parameters():
            if parameter.grad is not None:
                squares[int(getattr(parameter, "tensor_model_parallel", False))] += parameter.grad.double().pow(2).sum()
        dist.all_reduce(squares[1:], group=parallel_state.get_tensor_model_parallel_group())
        return squares.sum().sqrt()

    def _log(self, losses: list[Tensor], lr: float) -> None:
        self.metrics.log_step(self.step, self._mean_loss(losses), lr, float(self.grad_norm))

    def _mean_loss(self, losses: list[Tensor]) -> float:
        """Over the ranks and the steps since the last log line. Raises UserError at the first that is no number."""
        sums = torch.stack(losses)
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        values = sums.tolist()
        directory = self.config.checkpoint.dir
        saved = str(Path(directory) / ckpt.step_name(self.saved_at)) if directory and self.saved_at else None
        for step, value in enumerate(values, self.step - len(values) + 1):
            check_loss(value, step, saved)
        return sum(values) / len(values)

    def _evaluate(self, name: str, corpora: dict[str, tuple[Any, float]]) -> bool:
        """Loss of every corpus over validation.batches global batches; linear-attention health in the first of them.

        False, with nothing logged, as soon as the run is asked to stop.
        """
        self.engine.eval()
        mixers = {layer: module.self_attention for layer, module in enumerate(self.engine.module.decoder.layers)
                  if isinstance(module.self_attention, LinearAttention)}
        results: dict[str, float] = {}

        def stopped(seen: int) -> bool:
            for mixer in mixers.values():
                mixer.collect_diagnostics = not results and seen < self.accumulation
            return self.stop.agreed()

        for mixer in mixers.values():
            mixer.collect_diagnostics = True
        for corpus, (dataset, _) in corpora.items():
            found = corpus_loss(self.engine, f"{name}/{corpus}", dataset, self.config, self.ranks, self.eod,
                                slices=self.slices, stopped=stopped)
            if found is None:
                return False
            results[corpus], _ = found
            if self.slices is not None:
                self.metrics.log_slices(self.step, f"{name}_{corpus}", self.slices.result())
        weights = {corpus: weight for corpus, (_, weight) in corpora.items()}
        mean = sum(results[c] * weights[c] for c in results) / sum(weights.values())
        self.metrics.log_validation(self.step, results, mean, name)
        if self.slices is not None:
            self.metrics.log_slices(self.step, name, self.slices.total())
        self._log_health(mixers)
        self.engine.train()
        gc.collect()
        return True

    def _log_health(self, mixers: dict[int, LinearAttention]) -> None:
        """Smallest denominator and largest state norm of every linear-attention layer, over all ranks."""
        if not mixers:
            return
        own = [[mixer.diagnostics["min_denominator"], -mixer.diagnostics["state_norm"]] for mixer in mixers.values()]
        extremes = torch.tensor(own, device=self.ranks.device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MIN)
        for layer, (denominator, norm) in zip(mixers, extremes.tolist(), strict=True):
            self.metrics.scalars(self.step, {f"linear_attention/min_denominator_layer_{layer}": denominator,
                                             f"linear_attention/state_norm_layer_{layer}": -norm})
        for mixer in mixers.values():
            mixer.collect_diagnostics, mixer.diagnostics = False, {}

    def _sample(self) -> None:
        """Text from the model as it stands."""
        from based_mp.inference.generate import Generator, open_tokenizer
        from based_mp.inference.model import InferenceModel
        config = self.config
        model = whole_copy(self.engine, config)
        generator = Generator(InferenceModel(model.eval(), config.model), open_tokenizer(config.data.tokenizer))
        text = generator.generate([config.logging.sample_prompt], max_new_tokens=config.logging.sample_tokens,
                                  temperature=0.8, top_p=0.95, seed=self.step)[0].text
        self.engine.train()
        self.metrics.text(self.step, "sample", config.logging.sample_prompt + text)

    def _save(self) -> None:
        config = self.config
        if config.checkpoint.dir is None or self.saved_at == self.step:
            return
        path = ckpt.save(self.engine, config.checkpoint.dir, config, self.ranks, self.step)
        self.saved_at = self.step
        self.metrics.say(f"saved {Path(path)}")
