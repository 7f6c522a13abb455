"""Generates with one tiny model at the given tensor-parallel size: generation_worker.py OUT.json TP"""

import json
import sys
from pathlib import Path

from based_mp.parallel import state
from tests.models import Letters, tiny_config

out, tp = Path(sys.argv[1]), int(sys.argv[2])
ranks = state.initialize(tp, device="cpu", seed=7)

from based_mp.inference.generate import Generator  # noqa: E402
from based_mp.inference.load import cut, partition  # noqa: E402
from based_mp.inference.model import InferenceModel  # noqa: E402
from based_mp.model.based_model import build_model  # noqa: E402
from tests.parity.test_generation import SIZES, prompt_of  # noqa: E402

import torch  # noqa: E402

results = []
for name in ("based", "attention", "systems"):
    config = tiny_config(model=SIZES[name] | {"init_std": 0.2}, parallel={"tensor_parallel_size": tp})
    module = build_model(config).eval()
    for i, (_, parameter) in enumerate(module.named_parameters()):      # the same weights at every size
        cutting = partition(parameter)
        shape = list(parameter.shape)
        if cutting is not None:
            shape[cutting[0]] *= tp
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(i)) * (0.2 if len(shape) > 1 else 0.5)
        with torch.no_grad():
            parameter.copy_(whole if cutting is None else cut(whole, *cutting, ranks.tp_rank, tp))
    generator = Generator(InferenceModel(module, config.model), Letters(), max_batch=2)
    prompts = [prompt_of(n) for n in (1, 40, 9)]
    greedy = generator.generate(prompts, max_new_tokens=24)
    sampled = generator.generate(prompts, max_new_tokens=24, temperature=0.9, top_p=0.9, seed=3, stop=["e"])
    forked = generator.generate([[], [5]], states=[generator.state(prompts[1])] * 2, max_new_tokens=8)
    results.append([[c.tokens for c in group] for group in (greedy, sampled, forked)])
if ranks.rank == 0:
    out.write_text(json.dumps(results))
state.destroy()
