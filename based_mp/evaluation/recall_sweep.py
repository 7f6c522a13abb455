"""A sweep of MQAR runs: many models, sizes, learning rates and seeds, several runs at once on one device."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import queue
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from tqdm import tqdm

from based_mp.config import ModelConfig, one_sentence, read_yaml
from based_mp.errors import UserError
from based_mp.systems import Positive, Section, Seed


class TrainSetting(Section):
    """One kind of training rows."""

    length: Positive
    pairs: Positive
    weight: float = 1.0


class TestSetting(Section):
    """One kind of test rows."""

    length: Positive
    pairs: Positive


class Family(Section):
    """Models of one system: `model` changes keys of the common model; `sweep` takes every combination of its lists.

    Keys are those of `model:` in a training configuration, `mamba.d_state` for one inside a section.
    """

    model: dict[str, Any] = {}
    sweep: dict[str, list[Any]] = {}
    learning_rates: list[float] | None = None


class Sweep(Section):
    """A file such as configs/recall/cpu.yaml."""

    model: dict[str, Any]
    families: dict[str, Family]
    train: list[TrainSetting]
    test: list[TestSetting]
    learning_rates: list[float]
    seeds: list[Seed] = [0]
    steps: Positive
    warmup_steps: Positive = 100
    batch_tokens: Positive = 16384
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    test_rows: Positive = 256
    check_interval: Positive = 250
    stop_accuracy: float | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    processes: Positive = 1

    def runs(self) -> list[dict[str, Any]]:
        """Every run: its family, size (the swept keys), learning rate, seed and whole model. Raises UserError."""
        out = []
        for name, family in self.families.items():
            for values in itertools.product(*family.sweep.values()):
                size = dict(zip(family.sweep, values, strict=True))
                model = _nested(self.model, family.model, size)
                try:
                    ModelConfig.model_validate(model)
                except ValidationError as error:
                    raise UserError(f"families.{name} with {size}: model: {one_sentence(error)}") from error
                for lr, seed in itertools.product(family.learning_rates or self.learning_rates, self.seeds):
                    out.append({"family": name, "size": size, "lr": lr, "seed": seed, "model": model})
        return out


def _nested(*trees: dict[str, Any]) -> dict[str, Any]:
    """Later trees change earlier ones; a key "a.b" reaches into a section."""
    out: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            *parents, last = key.split(".")
            node = out
            for parent in parents:
                node[parent] = dict(node.get(parent, {}))
                node = node[parent]
            node[last] = value
    return out


def load_sweep(path: str | Path) -> Sweep:
    """Read and check a sweep, every model of it. Raises UserError."""
    tree = read_yaml(path, "sweep")
    try:
        sweep = Sweep.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {one_sentence(error)}") from error
    if not sweep.runs():
        raise UserError(f"{path} describes no run: give families and learning_rates")
    return sweep


def recipe_of(sweep: Sweep, run: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `mqar.Recipe`."""
    return {
        "train": [[s.length, s.pairs, s.weight] for s in sweep.train],
        "test": [[s.length, s.pairs] for s in sweep.test],
        "vocab_size": run["model"].get("vocab_size", 8192), "lr": run["lr"], "seed": run["seed"],
        **{name: getattr(sweep, name) for name in ("batch_tokens", "steps", "warmup_steps", "weight_decay", "test_rows",
                                                   "check_interval", "stop_accuracy", "precision")}}


def run_sweep(sweep: Sweep, results: Path) -> list[dict[str, Any]]:
    """Do the runs that `results` (JSON lines) has not, append each when it ends, return those of this sweep.

    A run is known by everything that determines it. Raises UserError at the end where runs failed.
    """
    wanted = _wanted(sweep)
    done = {record["key"]: record for record in finished(sweep, results)}
    todo = [key for key in wanted if key not in done]
    failures: list[str] = []
    if todo:
        results.parent.mkdir(parents=True, exist_ok=True)
        whole = not results.exists() or results.read_text(encoding="utf-8")[-1:] in ("", "\n")
        with results.open("a", encoding="utf-8") as file, \
                tqdm(total=sweep.steps * len(todo), unit="step", desc=f"{len(done)}/{len(wanted)} runs") as bar:
            file.write("" if whole else "\n")
            for key, record in _in_processes(sweep, wanted, todo, bar):
                if "error" in record:
                    failures.append(f"{title(wanted[key])}: {record['error'].strip().splitlines()[-1]}")
                    tqdm.write(record["error"])
                    continue
                done[key] = {"key": key, **wanted[key], **record}
                file.write(json.dumps(done[key]) + "\n")
                file.flush()
                bar.set_description(f"{len(done)}/{len(wanted)} runs")
                tqdm.write(f"{title(wanted[key])}: " + ", ".join(
                    f"{name} {value:.3f}" for name, value in record["accuracy"].items()))
    if failures:
        raise UserError(f"{len(failures)} of {len(todo)} runs failed, the first with {failures[0]}; what is finished "
                        f"stays in {results}, and the same command tries the rest again")
    return [done[key] for key in wanted if key in done]


def _wanted(sweep: Sweep) -> dict[str, dict[str, Any]]:
    return {json.dumps([run, recipe_of(sweep, run)], sort_keys=True): run for run in sweep.runs()}


def finished(sweep: Sweep, results: Path) -> list[dict[str, Any]]:
    """The runs of this sweep that `results` has, in the sweep's order."""
    found = {record["key"]: record for record in read_results(results)}
    return [found[key] for key in _wanted(sweep) if key in found]


def read_results(path: Path) -> list[dict[str, Any]]:
    """Finished runs; a last line that a killed sweep left incomplete is dropped."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def title(run: dict[str, Any]) -> str:
    size = " ".join(f"{key}={value}" for key, value in run["size"].items())
    return f"{run['family']} {size} lr={run['lr']:g} seed={run['seed']}"


def _in_processes(sweep: Sweep, wanted: dict[str, dict], todo: list[str], bar: tqdm) -> Any:
    """(key, record) of every run as it ends; `sweep.processes` at once, each process with one model after another."""
    context = multiprocessing.get_context("spawn")
    tasks, answers = context.Queue(), context.Queue()
    for key in todo:
        tasks.put((key, wanted[key]["model"], recipe_of(sweep, wanted[key])))
    count = min(sweep.processes, len(todo))
    for _ in range(count):
        tasks.put(None)
    workers = [context.Process(target=_work, args=(sweep.device, tasks, answers), daemon=True) for _ in range(count)]
    for worker in workers:
        worker.start()
    left = len(todo)
    try:
        while left:
            try:
                kind, *content = answers.get(timeout=1)
            except queue.Empty:
                if not any(worker.is_alive() for worker in workers) and answers.empty():
                    raise UserError(f"the processes of the sweep ended with {left} runs to do (out of memory?): lower "
                                    "processes or batch_tokens and start again") from None
                continue
            if kind == "steps":
                bar.update(content[0])
                continue
            left -= 1
            yield content
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _work(device: str, tasks: Any, answers: Any) -> None:
    """One process: a process group of its own, then run after run."""
    torch.set_num_threads(1)
    from based_mp.parallel import state
    ranks = state.initialize(device=device)
    from based_mp.evaluation import mqar
    while (task := tasks.get()) is not None:
        key, model, recipe = task
        report = _Report(answers.put)
        try:
            recipe["train"], recipe["test"] = (tuple(map(tuple, recipe[name])) for name in ("train", "test"))
            record = mqar.train_mqar(ModelConfig.model_validate(model), mqar.Recipe(**recipe), ranks.device, report)
        except Exception:
            record = {"error": traceback.format_exc()}
        report.flush()
        answers.put(("record", key, record))
    state.destroy()


class _Report:
    """Steps done, told every 20."""

    def __init__(self, put: Callable[[Any], None]) -> None:
        self.put, self.steps = put, 0

    def __call__(self, steps: int) -> None:
        self.steps += steps
        if self.steps >= 20:
            self.flush()

    def flush(self) -> None:
        if self.steps:
            self.put(("steps", self.steps))
        self.steps = 0
