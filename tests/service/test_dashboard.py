"""The dashboard and the rules: every name exists, every alert fires when it should, every expression has data.

Needs `promtool` and, for the last test, `prometheus` (Debian's package prometheus has both) on the PATH.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grafana_types
import pytest
import yaml
from fastapi.testclient import TestClient
from harness import ROOT, Served, free_port

from service import bench_main

DEPLOY = ROOT / "deploy"
GRAFANA = DEPLOY / "grafana"
RULES = yaml.safe_load((DEPLOY / "rules.yml").read_text())["groups"]
RECORDED = {rule["record"]: rule["expr"] for group in RULES for rule in group["rules"] if "record" in rule}
ALERTS = {rule["alert"]: rule["expr"] for group in RULES for rule in group["rules"] if "alert" in rule}


def dashboard() -> dict:
    return json.loads((GRAFANA / "dashboards" / "dsformer.json").read_text())


def expressions() -> list[str]:
    """Of all panels, as Grafana would send them with every task chosen."""
    found = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    return [each.replace("$task", ".+").replace("$__rate_interval", "1m") for each in found]


def compares(service_paths: str) -> Callable[[str], bool]:
    """Whether an expression can have data: those of comparisons need a service with /compare."""
    return lambda expression: "/compare" in service_paths or not ("compare" in expression or "agreement" in expression)


def test_the_file_is_what_its_page_writes() -> None:
    spec = importlib.util.spec_from_file_location("dashboard", GRAFANA / "dashboard.py")
    assert spec
    assert spec.loader
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.text() == page.FILE.read_text(), "python deploy/grafana/dashboard.py writes it anew"


def test_panels_have_their_own_numbers_and_places() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Compare", "Latency", "Load", "Errors", "Process"]
    places = [panel["gridPos"] for panel in panels]
    assert all(one["x"] >= 0 and one["x"] + one["w"] <= 24 for one in places)
    for one, two in itertools.combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= two["x"]
            or two["x"] + two["w"] <= one["x"]
            or one["y"] + one["h"] <= two["y"]
            or two["y"] + two["h"] <= one["y"]
        )
        assert apart, (one, two)


def test_every_name_is_a_metric_or_a_recorded_series(client: TestClient) -> None:
    told = {line.split("{")[0].split(" ")[0] for line in client.get("/metrics").text.splitlines() if line[:1] != "#"}
    known = compares(client.get("/openapi.json").text)
    asked = [*expressions(), *RECORDED.values(), *ALERTS.values()]
    for expression in filter(known, asked):
        bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|by \([^)]*\)|on \([^)]*\)", " ", expression)
        for name in re.findall(r"\b(?:dsformer|process|python)[_:][\w:]+", bare):
            assert name in told | RECORDED.keys(), (name, expression)


def test_the_source_is_the_provisioned_one() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert f'"uid": "{source["uid"]}"' in (GRAFANA / "dashboards" / "dsformer.json").read_text()
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    host, port = urllib.parse.urlsplit(source["url"]).netloc.split(":")
    assert services[host]["ports"][0].endswith(f":{port}")
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/dsformer.yml").read_text())["providers"]
    mounted = {volume.split(":")[1]: volume.split(":")[0] for volume in services["grafana"]["volumes"]}
    assert (ROOT / mounted[provider["options"]["path"]] / "dsformer.json").exists()
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == provider["options"]["path"] + "/dsformer.json"


def test_every_service_is_on_this_computer_only_and_may_do_little() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert services.keys() == {"service", "prometheus", "grafana"}
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        for volume in service.get("volumes", ()):
            source, _, rest = volume.partition(":")
            assert not source.startswith(".") or ((ROOT / source).exists() and rest.endswith(":ro")), volume


def tool(name: str, package: str = "prometheus") -> str:
    found = shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not on the PATH (Debian: apt-get install {package})")
    return found


@pytest.mark.slow
def test_grafanas_own_types_accept_it(tmp_path: Path) -> None:
    """Needs npm and the network. The types' version is that of the image."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    version = services["grafana"]["image"].rpartition(":")[2]
    install = [tool("npm", "npm"), "install", "--no-audit", "--no-fund", "--ignore-scripts"]
    subprocess.run([*install, f"@grafana/schema@{version}", "typescript@5.5"], cwd=tmp_path, check=True)
    flags = ["--noEmit", "--strict", "--skipLibCheck", "--target", "es2020", "--module", "esnext"]
    command = [str(tmp_path / "node_modules/.bin/tsc"), *flags, "--moduleResolution", "bundler", "check.ts"]

    def complaints(board: dict) -> str:
        (tmp_path / "check.ts").write_text(grafana_types.program(board))
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout

    assert complaints(dashboard()) == ""
    broken = dashboard()
    broken["panels"][1]["options"]["colorMode"] = "colourful"
    del broken["time"]["to"]
    said = complaints(broken)
    assert "colourful" in said
    assert "'to' is missing" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "rules", "rules.yml"],
        ["check", "config", "--syntax-only", "prometheus.yml"],
        ["test", "rules", "rules_test.yml"],
    ],
)
def test_promtool_finds_nothing_wrong(arguments: list[str]) -> None:
    done = subprocess.run([tool("promtool"), *arguments], cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested() -> None:
    tests = yaml.safe_load((DEPLOY / "rules_test.yml").read_text())["tests"]
    fired = {each["alertname"] for one in tests for each in one["alert_rule_test"] if each["exp_alerts"]}
    assert fired == ALERTS.keys()


class Prometheus:
    """A Prometheus of its own with our rules, every second."""

    def __init__(self, folder: Path, target: int) -> None:
        config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{target}"]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(DEPLOY / "rules.yml", folder)
        self._port = free_port()
        command = [tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}"]
        command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{self._port}"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=(folder / "log").open("w"))

    def get(self, path: str, **query: str) -> dict:
        url = f"http://127.0.0.1:{self._port}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.loads(answer.read())["data"]

    def sees(self, expression: str) -> bool:
        try:
            return bool(self.values(expression))
        except OSError:
            return False

    def values(self, expression: str) -> dict[tuple[str, str], float]:
        """By task and variant; NaN, which is no data, left out."""
        found = self.get("/api/v1/query", query=expression)["result"]
        named = {(r["metric"].get("task", ""), r["metric"].get("variant", "")): float(r["value"][1]) for r in found}
        return {which: value for which, value in named.items() if not math.isnan(value)}


@contextmanager
def watched(models: Path, folder: Path) -> Iterator[tuple[Served, Prometheus]]:
    tool("prometheus")
    with Served(models) as service:
        watching = Prometheus(folder, service.port)
        try:
            until = time.monotonic() + 60
            while not watching.sees("up == 1"):  # what was counted before the first scrape is no rate
                assert time.monotonic() < until, (folder / "log").read_text()
                time.sleep(0.2)
            yield service, watching
        finally:
            watching.process.terminate()
            watching.process.wait(30)


@pytest.fixture
def watched_tiny(models: Path, tmp_path: Path) -> Iterator[tuple[Served, Prometheus]]:
    with watched(models, tmp_path) as both:
        yield both


@pytest.mark.slow
def test_the_load_tool_sees_the_same_speedup(tmp_path: Path) -> None:
    """The service's own times, exact there and from a histogram here, of the models that come with it."""
    report = tmp_path / "report.json"
    with watched(DEPLOY / "models", tmp_path) as (service, prometheus):
        url = f"http://127.0.0.1:{service.port}"
        bench_main.main(["http", "--url", url, "--rounds", "20", "--warm-up", "1", "--json", str(report)])
        time.sleep(3)
        seen = prometheus.values("dsformer:speedup:p50")
    for row in json.loads(report.read_text())["loads"]:
        if row["variant"] != "dense":
            told, shown = row["service"]["speedup"], seen[row["task"], row["variant"]]
            print(f"{row['task']}: {told:.3f} by the load tool, {shown:.3f} by Prometheus")
            assert shown == pytest.approx(told, rel=0.05)


@pytest.mark.slow
def test_every_expression_has_data_while_there_is_traffic(watched_tiny: tuple[Served, Prometheus]) -> None:
    service, prometheus = watched_tiny
    url = f"http://127.0.0.1:{service.port}"
    known = compares(service.get("/openapi.json")[1])
    wanted = [*filter(known, [*expressions(), *RECORDED])]
    assert len(wanted) > 30
    stop = threading.Event()

    def compare() -> None:
        question = {"question": "who lives in berkeley", "context": "clara lives in berkeley"}
        while not stop.is_set() and known("compare"):
            for task, inputs in (("classify", "the film is good"), ("qa", question)):
                body = json.dumps({"task": task, "inputs": inputs}).encode()
                sent = urllib.request.Request(f"{url}/compare", body, {"Content-Type": "application/json"})
                urllib.request.urlopen(sent, timeout=60).read()

    comparing = threading.Thread(target=compare)
    comparing.start()
    until = time.monotonic() + 120
    missing = wanted
    try:
        while missing and time.monotonic() < until:
            bench_main.main(["http", "--url", url, "--requests", "50", "--rounds", "6", "--clients", "4"])
            missing = [each for each in wanted if not prometheus.values(each)]
    finally:
        stop.set()
        comparing.join()
    assert not missing
    told = prometheus.get("/api/v1/rules")["groups"]
    assert {rule["name"] for group in told for rule in group["rules"]} == RECORDED.keys() | ALERTS.keys()
    assert not [rule for group in told for rule in group["rules"] if rule.get("lastError")]
    assert prometheus.values("dsformer:speedup:p50").keys() == {("classify", "dsformer"), ("qa", "dsformer")}
