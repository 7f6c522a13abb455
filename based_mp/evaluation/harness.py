"""lm-evaluation-harness on our models and on local files (the optional extra `eval`).

Nothing is downloaded: every task takes its documents from the file that it is given with.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import math
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from based_mp.errors import UserError
from based_mp.evaluation import recall
from based_mp.inference.generate import Generator

if importlib.util.find_spec("lm_eval") is None:
    raise UserError("the evaluation tasks need lm-evaluation-harness: pip install '.[eval]'")
logging.getLogger("lm_eval").setLevel(logging.ERROR)

from datasets import Dataset  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.api.task import ConfigurableTask, Task  # noqa: E402
from lm_eval.evaluator import evaluate as run_tasks  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402
from tqdm import tqdm  # noqa: E402


class HarnessModel(TemplateLM):
    """A model as the harness sees it: generation on the recurrent state, scores by whole forward passes.

    module: the training model, in eval mode; max_length: most tokens of context and continuation together;
    batch_size: sequences at once. With tensor parallelism every rank makes the same calls.
    """

    def __init__(self, module: torch.nn.Module, generator: Generator, *, max_length: int, batch_size: int) -> None:
        super().__init__()
        self.module, self.generator, self.tokens = module, generator, generator.tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        self._device = module.embedding.word_embeddings.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        return self.tokens.encode(string)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations; a prompt too long for them loses its beginning."""
        out: list[str] = [""] * len(requests)
        by_options: dict[tuple, list[tuple[int, list[int]]]] = {}
        for i, request in enumerate(requests):
            context, options = request.args
            if options.get("temperature") or options.get("do_sample"):
                raise UserError("this evaluation generates greedily: the task asks for sampling")
            new = int(options.get("max_gen_toks", 256))
            until = options.get("until", [])
            ids = self.tok_encode(context)[-max(self.max_length - new, 1):]
            stop = (until,) if isinstance(until, str) else tuple(until)
            by_options.setdefault((new, stop), []).append((i, ids))
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm) as bar:
            for (new, stop), items in by_options.items():
                items.sort(key=lambda item: -len(item[1]))
                for start in range(0, len(items), self.batch_size):
                    batch = items[start : start + self.batch_size]
                    done = self.generator.generate([ids for _, ids in batch], max_new_tokens=new, stop=list(stop))
                    for (i, _), completion in zip(batch, done, strict=True):
                        out[i] = completion.text
                    bar.update(len(batch))
        return out

    def _loglikelihood_tokens(self, requests: list[tuple[tuple[str, str], list[int], list[int]]],
                              disable_tqdm: bool = False, **unused: Any) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of every continuation after its context."""
        out: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for start in tqdm(range(0, len(order), self.batch_size), desc="scoring", disable=disable_tqdm):
            chosen = order[start : start + self.batch_size]
            rows = [(requests[i][1] + requests[i][2])[-(self.max_length + 1):] for i in chosen]
            for i, result in zip(chosen, self._score(rows, [len(requests[i][2]) for i in chosen]), strict=True):
                out[i] = result
        return out

    @torch.no_grad()
    def _score(self, rows: list[list[int]], counts: list[int]) -> list[tuple[float, bool]]:
        """The last `counts` tokens of every row, given those before."""
        longest = max(len(row) for row in rows) - 1
        inputs = torch.zeros(len(rows), longest, dtype=torch.int64)
        for i, row in enumerate(rows):
            inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
        inputs = inputs.to(self.device)
        logits = self.module(inputs, torch.zeros_like(inputs), None)          # [rows, longest, padded vocab / tp]
        out = []
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            count = min(count, len(row) - 1)
            here = gather_from_tensor_model_parallel_region(logits[i, len(row) - 1 - count : len(row) - 1])
            here = here[:, : self.tokens.vocab_size].float().log_softmax(-1)
            target = torch.tensor(row[len(row) - count :], device=self.device)
            score = here.gather(1, target[:, None]).sum().item()
            out.append((score, bool((here.argmax(-1) == target).all())))
        return out

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of max_length."""
        out = []
        for request in tqdm(requests, desc="scoring texts", disable=disable_tqdm):
            windows = map(make_disjoint_window, get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.eot_token_id, self.max_length, 1))
            pieces = [(("", ""), context, continuation) for context, continuation in windows]
            out.append(sum(score for score, _ in self._loglikelihood_tokens(pieces, disable_tqdm=True)))
        return out


@functools.cache
def task_manager() -> TaskManager:
    """The harness's index of its tasks; reading it takes seconds."""
    return TaskManager()


def recall_task(name: str, path: str | Path) -> Task:
    """SWDE, FDA or SQuAD completion on a local file: zero-shot, greedy, 48 tokens, up to a newline, *contains*."""
    documents = Dataset.from_list([{"text": d["text"], "value": d["value"]}
                                   for d in recall.read_recall_documents(path)])
    return ConfigurableTask(config={
        "task": name, "custom_dataset": lambda **_: {"validation": documents}, "validation_split": "validation",
        "output_type": "generate_until", "doc_to_text": recall.prompt, "doc_to_target": lambda d: d["value"].strip(),
        "generation_kwargs": {"until": [recall.STOP], "max_gen_toks": recall.MAX_NEW_TOKENS, "do_sample": False},
        "process_results": lambda d, results: {"contains": float(recall.contains(d["value"], results[0]))},
        "metric_list": [{"metric": "contains", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0, "metadata": {"version": 1.0}})


def library_task(name: str, path: str | Path) -> Task:
    """A task of the harness on a local file, whose documents stand for all its splits; zero-shot."""
    documents = Dataset.from_list(recall.read_jsonl(path))

    class EverySplit(dict):
        def __missing__(self, split: str) -> Dataset:
            return documents

    def local(task: Task, *unused: Any, **options: Any) -> None:
        task.dataset = EverySplit()

    manager = task_manager()
    if name not in manager.all_subtasks:
        raise UserError(f"lm-evaluation-harness has no task {name}: `lm_eval ls tasks` lists them")
    try:
        with mock.patch.object(ConfigurableTask, "download", local):
            task = manager.load([name])["tasks"][name]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has not the fields of the task {name} ({error}): give that task's own documents") \
            from error
    task.set_config("num_fewshot", 0)
    return task


def interval(value: float, error: float, documents: int | None) -> list[float]:
    """95%: Wilson's for a share of `documents`, else value ± 1.96 standard errors."""
    if documents is None:
        return [value - 1.96 * error, value + 1.96 * error]
    z = 1.96
    middle = (value + z * z / (2 * documents)) / (1 + z * z / documents)
    half = z / (1 + z * z / documents) * math.sqrt(value * (1 - value) / documents + z * z / (4 * documents**2))
    return [max(middle - half, 0.0), min(middle + half, 1.0)]


def evaluate(model: HarnessModel, tasks: dict[str, str], *, limit: int | None = None) -> dict[str, Any]:
    """Run tasks, each on its file. Returns results by task (metrics with standard errors and 95% intervals, documents,
    file) and the harness's version, since scores differ between versions. Raises UserError.
    """
    built = {name: recall_task(name, path) if name in recall.TASKS else library_task(name, path)
             for name, path in tasks.items()}
    found = run_tasks(model, {"tasks": built, "groups": {}, "group_map": {}}, limit=limit, bootstrap_iters=1000,
                      verbosity="ERROR")
    out: dict[str, Any] = {"harness": f"lm-eval {importlib.metadata.version('lm_eval')}", "tasks": {}}
    for name, path in tasks.items():
        metrics: dict[str, Any] = {}
        values = found["results"][name]
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, (int, float)) or metric.endswith("_stderr") or not kind:
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            metrics[metric] = {"value": value}
            if isinstance(error, (int, float)) and math.isfinite(error):
                scores = {sample.get(metric) for sample in found["samples"][name]}
                counted = len(found["samples"][name]) if scores <= {0, 1} else None
                metrics[metric] |= {"stderr": error, "ci95": interval(value, error, counted)}
        out["tasks"][name] = {"metrics": metrics, "documents": len(found["samples"][name]), "file": str(path),
                              "version": found["versions"].get(name), "samples": found["samples"][name]}
    return out
