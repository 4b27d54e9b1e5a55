"""What the guide for operators says is true: names of metrics, and the file for Prometheus."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from libs.telemetry import genai, http_metrics, rpc_metrics
from tests.unit.test_metric_names import metrics_of_all_modules

GUIDE = (Path(__file__).parents[2] / "docs/guides/operations.md").read_text()


def test_every_metric_of_the_guide_exists():
    """With the ending that Prometheus sees."""
    collected = [
        *metrics_of_all_modules(),
        *genai.TIME_TO_FIRST_TOKEN.collect(),
        *genai.REQUEST_DURATION.collect(),
        *http_metrics.REQUEST_DURATION.collect(),
        *rpc_metrics.CALL_DURATION.collect(),
    ]
    known = {each.name + ("_total" if each.type == "counter" else "") for each in collected}

    named = re.findall(r"`((?:headrace|gen_ai|grpc_server|http_server)_[a-z_]+)`", GUIDE)

    assert len(named) > 10
    assert set(named) <= known


def test_the_script_of_the_guide_writes_the_targets_of_prometheus(tmp_path: Path):
    """As it is in the guide."""
    found = re.search(r"<<'EOF'\n(.*?)\nEOF", GUIDE, re.DOTALL)
    assert found is not None
    (tmp_path / "run").mkdir()
    ports = {"envoy.edge": 1, "envoy.metrics": 2, "cost.metrics": 3}
    (tmp_path / "run/ports.json").write_text(json.dumps(ports))

    done = subprocess.run(
        [sys.executable, "-", tmp_path], input=found[1], capture_output=True, text=True, check=True
    )

    assert json.loads(done.stdout) == [
        {
            "targets": ["127.0.0.1:2"],
            "labels": {"process": "envoy", "__metrics_path__": "/stats/prometheus"},
        },
        {
            "targets": ["127.0.0.1:3"],
            "labels": {"process": "cost", "__metrics_path__": "/metrics"},
        },
    ]
