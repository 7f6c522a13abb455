"""One indexed dataset being written: temporary files that become PREFIX.bin, .idx and .json together, or nothing."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.indexed import write_index


class Output:
    """Appends documents to PREFIX's temporary .bin; `finish` writes index and manifest, `publish` renames all three."""

    def __init__(self, prefix: str, dtype: np.dtype, overwrite: bool) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.finals = [Path(prefix + ending) for ending in (".bin", ".json", ".idx")]
        existing = [str(path) for path in self.finals if path.exists()]
        if existing and not overwrite:
            raise UserError(f"{existing[0]} exists: give --overwrite or another --output-prefix")
        self.temporaries = [path.with_name(f".{path.name}.writing") for path in self.finals]
        self.lengths = array("i")
        self.components: dict[str, Counter] = {}
        self.digest = hashlib.sha256()
        self.finals[0].parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.temporaries[0], "wb")

    def append(self, ids: bytes | memoryview, component: str, text_bytes: int) -> None:
        """One document. ids: its tokens with the end-of-document token, in the dataset's dtype."""
        self.file.write(ids)
        self.digest.update(ids)
        tokens = len(ids) // self.dtype.itemsize
        self.lengths.append(tokens)
        self.components.setdefault(component, Counter()).update(documents=1, tokens=tokens, bytes=text_bytes)

    def finish(self, facts: dict, seconds: float) -> dict:
        """Write the rest of the temporary files; `facts` go into the manifest, which is returned."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        write_index(self.temporaries[2], np.array(self.lengths, dtype=np.int32), self.dtype)
        totals: Counter = sum(self.components.values(), Counter())
        manifest = {
            "documents": totals["documents"], "tokens": totals["tokens"], "text_bytes": totals["bytes"],
            "seconds": round(seconds, 3), "megabytes_per_second": round(totals["bytes"] / 1e6 / seconds, 3),
            "components": {name: dict(counts) for name, counts in sorted(self.components.items())},
            "dtype": self.dtype.name, **facts,
            "sha256": {"bin": self.digest.hexdigest(),
                       "idx": hashlib.sha256(self.temporaries[2].read_bytes()).hexdigest()},
        }
        self.temporaries[1].write_text(json.dumps(manifest, indent=1))
        return manifest

    def publish(self) -> None:
        """The index goes first and comes last: whoever finds an index finds what belongs to it."""
        self.finals[2].unlink(missing_ok=True)
        for temporary, final in zip(self.temporaries, self.finals, strict=True):
            os.replace(temporary, final)

    def discard(self) -> None:
        """Remove the temporary files that are left."""
        try:
            self.file.close()
        except OSError:
            pass                                   # its buffer could not be written; that error is being reported
        for temporary in self.temporaries:
            temporary.unlink(missing_ok=True)
