"""One of several processes on two pretended nodes: argv is a corpus prefix and, by node, a cache folder.

Prints how many index files this process wrote, and the first samples.
"""

from __future__ import annotations

import os
import sys

PER_NODE = 2
os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % PER_NODE)

import numpy  # noqa: E402

from based_mp.data.datasets import build_datasets, check_corpora, prepare_cache  # noqa: E402
from based_mp.parallel import state  # noqa: E402
from tests.models import tiny_config  # noqa: E402

corpus, *caches = sys.argv[1:]
config = tiny_config(data={"train": [{"path": corpus}, {"path": corpus, "weight": 2.0, "name": "again"}],
                           "cache_dir": caches[int(os.environ["RANK"]) // PER_NODE]})
ranks = state.initialize(device="cpu")
written = []
save = numpy.save
numpy.save = lambda path, *a, **k: (written.append(path), save(path, *a, **k))
prepare_cache(config, ranks)
data = build_datasets(config, ranks, check_corpora(config))
print("written", len(written), "samples", [data.train[i]["tokens"].tolist() for i in range(20)], flush=True)
state.destroy()
