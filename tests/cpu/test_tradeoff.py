"""The trade-off's numbers and figure from results of launch/evaluate.py."""

import copy
import json

import pytest

from based_mp.errors import UserError
from based_mp.evaluation import tradeoff

RECORD = {"tasks": {"swde": {"metrics": {"contains": {"value": 0.2, "ci95": [0.15, 0.26]}}},
                    "fda": {"metrics": {"contains": {"value": 0.4, "ci95": [0.33, 0.48]}}},
                    "piqa": {"metrics": {"acc": {"value": 0.9}}}},
          "speed": {"batch": 16, "prompt": 1024, "new": 128, "device": "cpu", "tokens_per_second": 5000.0,
                    "state_bytes": 1000}}


def write(path, **records):
    path.write_text(json.dumps(records))
    return path


def test_points_table_and_figure(tmp_path):
    pytest.importorskip("matplotlib")
    other = copy.deepcopy(RECORD)
    other["speed"] |= {"state_bytes": 9000, "tokens_per_second": 700.0}
    points = tradeoff.read_points(write(tmp_path / "a.json", based=RECORD, other=other))
    assert points["based"]["accuracy"] == pytest.approx(0.3)
    low, high = points["based"]["interval"]
    assert low == pytest.approx(0.3 - 0.0074 ** 0.5 / 2) and high == pytest.approx(0.35)     # √(0.06² + 0.08²) / 2
    assert "| other | 30.0 (25.7 to 35.0) | 9,000 | 700 |" in tradeoff.table(points)
    tradeoff.plot(points, tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_compared_is_refused(tmp_path):
    def refused(match, **records):
        with pytest.raises(UserError, match=match):
            tradeoff.read_points(write(tmp_path / "r.json", **records))

    refused("--speed", a={"tasks": RECORD["tasks"]})
    refused("--task", a={"speed": RECORD["speed"]})
    refused("different recall tasks", a=RECORD, b=RECORD | {"tasks": {"swde": RECORD["tasks"]["swde"]}})
    refused("different batch", a=RECORD, b=RECORD | {"speed": RECORD["speed"] | {"batch": 1}})
    refused("no model")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        tradeoff.read_points(tmp_path / "broken.json")
