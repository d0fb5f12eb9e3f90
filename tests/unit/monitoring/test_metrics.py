"""Metrics: the OpenMetrics text, the endpoint that serves it, and the board that draws it."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from typer.testing import CliRunner

from paceline.cli.main import app
from paceline.errors import ConfigError
from paceline.monitoring.endpoint import MetricsServer
from paceline.monitoring.metrics import CONTENT_TYPE, METRICS, exposition
from paceline.monitoring.status import read_status

BOARD = Path(__file__).parents[3] / "docs" / "grafana" / "paceline.json"


def parsed(text: str) -> dict[tuple[str, str], float]:
    """By name of the sample and its label beside `run`."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            [other] = [value for name, value in sample.labels.items() if name != "run"] or [""]
            found[sample.name, other] = sample.value
    return found


def test_a_scraper_reads_the_numbers_of_the_status(run: Path) -> None:
    """Prometheus's own parser accepts the text."""
    status = read_status(run)
    found = parsed(CliRunner().invoke(app, ["metrics", str(run)]).output)
    assert found["paceline_samples_committed_total", ""] == status.samples.committed == 4
    assert found["paceline_samples_waiting", ""] == status.samples.waiting == 2
    assert found["paceline_checkpoint_step", ""] == 1
    assert found["paceline_state", "stopped"] == 1
    assert found["paceline_state", "live"] == 0
    assert found["paceline_process_starts_total", "consumer"] == 1
    assert ("paceline_loss", "") not in found


def test_a_run_that_cannot_be_read_is_down() -> None:
    """Its other figures would be old ones."""
    assert parsed(exposition(None, "mine")) == {("paceline_up", ""): 0}


def test_a_name_of_a_run_is_escaped() -> None:
    """Whoever names a run writes into no other sample."""
    [family] = text_string_to_metric_families(exposition(None, 'a"} 1\nb\\ \ud800'))
    assert family.samples[0].labels == {"run": 'a"} 1\nb\\ ?'}


@contextmanager
def served(page: str, host: str = "127.0.0.1") -> Iterator[MetricsServer]:
    with MetricsServer(host, 0, lambda: page) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def asked(url: str, **headers: str) -> tuple[int, str, str]:
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 (our own server)
    try:
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, "", ""


def test_the_endpoint_answers_scrapers_of_this_machine_only() -> None:
    """Under its own names: a page of the web that points a name at it is refused."""
    with served("# EOF\n") as server:
        assert asked(server.url) == (200, CONTENT_TYPE, "# EOF\n")
        assert asked(server.url, Host="localhost:1")[0] == 200
        assert asked(server.url, Host="evil.example")[0] == 403
        assert asked(server.url.replace("metrics", "other"))[0] == 404


def test_the_endpoint_reads_the_run_once_a_second_however_often_it_is_asked() -> None:
    """Many scrapers cost what one does."""
    pages: list[str] = []
    with MetricsServer("127.0.0.1", 0, lambda: pages.append("read") or "# EOF\n") as server:
        for _ in range(5):
            server.page()
    assert len(pages) == 1


def test_a_port_that_is_taken_is_an_error_with_advice() -> None:
    """And so is an address of another machine."""
    with MetricsServer("127.0.0.1", 0, str) as server:
        with pytest.raises(ConfigError, match=r"listen on 127\.0\.0\.1"):
            MetricsServer("127.0.0.1", server.server_port, str)
        with pytest.raises(ConfigError, match=r"listen on 203\.0\.113\.1"):
            MetricsServer("203.0.113.1", 0, str)


# -- the board -----------------------------------------------------------------------------


def board() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(BOARD.read_text())
    return found


def test_the_board_draws_only_metrics_that_there_are() -> None:
    """And every metric that tells of waits, rates or failures is drawn."""
    expressions = " ".join(target["expr"] for panel in board()["panels"] for target in panel["targets"])
    drawn = set(re.findall(r"paceline_\w+", expressions))
    known = {metric.sample_name for metric in METRICS} | {"paceline_up"}
    assert drawn <= known
    assert {name for name in known if "ratio" in name or "failed" in name or "second" in name} <= drawn | {
        "paceline_process_waited_seconds_total",
        "paceline_step_seconds",
        "paceline_steps_per_second",
        "paceline_captured_tokens_per_second",
    }


def test_the_board_fits_its_grid_and_asks_for_its_data_source() -> None:
    """No panel lies over another one, and none names somebody's own source."""
    taken: set[tuple[int, int]] = set()
    panels = board()["panels"]
    assert sorted(panel["id"] for panel in panels) == list(range(1, len(panels) + 1))
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert {source["uid"] for source in sources} == {"${datasource}"}
        assert all('{run=~"$run"}' in target["expr"] for target in panel["targets"])
