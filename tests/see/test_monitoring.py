"""The monitoring example as files; that its queries return data is tested with a real engine."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "monitoring"
BOTH = 'model_name=~"$model",engine=~"$engine"'
DASHBOARD = json.loads((EXAMPLE / "grafana" / "dashboards" / "taper.json").read_text())


def test_panels_are_whole_and_do_not_overlap():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        assert all(target["expr"] for target in panel["targets"])
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y


def test_panels_use_the_provisioned_datasource():
    text = (EXAMPLE / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text()
    uid = re.search(r"uid: (\S+)", text).group(1)
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {uid}
    assert all(target["datasource"]["uid"] == uid for panel in DASHBOARD["panels"] for target in panel["targets"])


def test_every_query_can_be_narrowed_to_a_model_and_an_engine():
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            selectors = re.findall(r"([a-z_:]+)\{([^{}]*)\}", target["expr"])
            assert selectors
            for name, labels in selectors:  # programs are the API server's: they belong to no engine
                narrowed = 'model_name=~"$model"' if name.startswith("taper:program_") else BOTH
                assert labels.startswith(narrowed)
