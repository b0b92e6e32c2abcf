"""Writes dashboards/dsformer.json, the dashboard that Grafana is started with: `python deploy/grafana/dashboard.py`.

A panel here is a title, a kind and its expressions; the places on the grid and what all panels of a kind have in common
are added below. A test compares the file with this page, and asks a running Prometheus for each expression.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "dashboards" / "dsformer.json"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
WIDTH, HEIGHT = 24, 8  # Grafana's grid has 24 columns
WHO = "{{task}} {{variant}}"
CHOSEN = 'task=~"$task"'
RATE = "$__rate_interval"
BUCKETS = "task, variant, le"


def quantile(q: float) -> str:
    return f"dsformer:request_duration_seconds:p{round(100 * q)}{{{CHOSEN}}}"


def rate(metric: str, labels: str = "", by: str = "task, variant") -> str:
    inside = ", ".join(filter(None, (CHOSEN, labels)))
    return f"sum by ({by}) (rate({metric}{{{inside}}}[{RATE}]))"


def mean(histogram: str, by: str = "task, variant") -> str:
    """Mean of a histogram's values; nothing where there were none."""
    return f"{rate(histogram + '_sum', by=by)} / ({rate(histogram + '_count', by=by)} > 0)"


# Rows of panels: (title, kind, width, unit, what it says, [(expression, legend), ...]).
ROWS: list[tuple[str, list[tuple[str, str, int, str, str, list[tuple[str, str]]]]]] = [
    (
        "Compare",
        [
            (
                "Times as fast, p50",
                "stat",
                4,
                "none",
                "The dense variant's median time over this one's, of all requests of five minutes. It is fair where "
                "both get the same requests.",
                [(f"dsformer:speedup:p50{{{CHOSEN}}}", WHO)],
            ),
            (
                "Times as fast, p95",
                "stat",
                4,
                "none",
                "The same of the slow requests.",
                [(f"dsformer:speedup:p95{{{CHOSEN}}}", WHO)],
            ),
            (
                "Same answers as dense",
                "stat",
                4,
                "percentunit",
                "Of the inputs sent to /compare.",
                [(f"dsformer:agreement_ratio{{{CHOSEN}}}", WHO)],
            ),
            (
                "model.onnx",
                "bargauge",
                6,
                "decbytes",
                "What a disk or a download sees.",
                [(f"dsformer_model_file_bytes{{{CHOSEN}}}", WHO)],
            ),
            (
                "Memory of the process",
                "stat",
                6,
                "decbytes",
                "All models together; `dsformer-bench card` measures each alone.",
                [('process_resident_memory_bytes{job="dsformer"}', "{{instance}}")],
            ),
            (
                "Times as fast, p50, with its 95 % interval",
                "timeseries",
                12,
                "none",
                "As if times were normally distributed; texts of many lengths make it wide.",
                [
                    (f"dsformer:speedup:p50{{{CHOSEN}}}", WHO),
                    (f"dsformer:speedup:p50{{{CHOSEN}}} - dsformer:speedup:p50_error", f"{WHO}, from"),
                    (f"dsformer:speedup:p50{{{CHOSEN}}} + dsformer:speedup:p50_error", f"{WHO}, to"),
                ],
            ),
            (
                "Times as fast on the same input, quartiles",
                "timeseries",
                12,
                "none",
                "Of /compare, where every variant answers the same input in turns.",
                [
                    (
                        f"histogram_quantile({q}, {rate('dsformer_compare_speedup_ratio_bucket', by=BUCKETS)})",
                        f"{WHO}, {name}",
                    )
                    for q, name in ((0.25, "lower quartile"), (0.5, "median"), (0.75, "upper quartile"))
                ],
            ),
        ],
    ),
    (
        "Latency",
        [
            (
                "Request, p50, p95, p99",
                "timeseries",
                12,
                "s",
                "From arrival to the end of the answer; successful requests.",
                [(quantile(q), f"{WHO} p{round(100 * q)}") for q in (0.5, 0.95, 0.99)],
            ),
            (
                "Stages, mean",
                "stack",
                12,
                "s",
                "Where a request's time goes.",
                [(mean("dsformer_stage_duration_seconds", "task, variant, stage"), f"{WHO} {{{{stage}}}}")],
            ),
            (
                "Distribution, dense",
                "heatmap",
                12,
                "s",
                "Requests of each duration.",
                [(rate("dsformer_request_duration_seconds_bucket", 'variant="dense"', by="le"), "{{le}}")],
            ),
            (
                "Distribution, other variants",
                "heatmap",
                12,
                "s",
                "Requests of each duration.",
                [(rate("dsformer_request_duration_seconds_bucket", 'variant!="dense"', by="le"), "{{le}}")],
            ),
        ],
    ),
    (
        "Load",
        [
            (
                "Requests a second",
                "timeseries",
                8,
                "reqps",
                "Answered or not.",
                [(rate("dsformer_requests_total"), WHO)],
            ),
            (
                "Tokens a second",
                "timeseries",
                8,
                "none",
                "Tokens that ran, padding left out.",
                [(rate("dsformer_tokens_total", 'kind="real"'), WHO)],
            ),
            (
                "In flight",
                "timeseries",
                8,
                "none",
                "Requests that are admitted and not answered.",
                [('dsformer_inflight_requests{job="dsformer"}', "{{instance}}")],
            ),
            (
                "Batch fill, rows",
                "timeseries",
                6,
                "none",
                "Mean rows of one run of a model.",
                [(mean("dsformer_batch_items"), WHO)],
            ),
            (
                "Batch fill, tokens",
                "timeseries",
                6,
                "none",
                "Mean tokens of one run, padding included.",
                [(mean("dsformer_batch_tokens"), WHO)],
            ),
            (
                "Padding share",
                "timeseries",
                6,
                "percentunit",
                "Of the tokens that ran; waste.",
                [(f"dsformer:padding_ratio{{{CHOSEN}}}", WHO)],
            ),
            (
                "Queue, tokens",
                "timeseries",
                6,
                "none",
                "Tokens of all requests in flight, those that wait for a run, and the limit: above it 429.",
                [
                    ('dsformer_admitted_tokens{job="dsformer"}', "admitted"),
                    (f"sum by (task, variant) (dsformer_queue_tokens{{{CHOSEN}}})", f"{WHO}, waiting"),
                    ('dsformer_queue_limit_tokens{job="dsformer"}', "limit"),
                ],
            ),
        ],
    ),
    (
        "Errors",
        [
            (
                "Requests that were not answered",
                "timeseries",
                8,
                "reqps",
                "By outcome: invalid and cancelled are the client's, overloaded and deadline the queue's, error ours.",
                [(rate("dsformer_requests_total", 'outcome!="ok"', by="task, outcome"), "{{task}} {{outcome}}")],
            ),
            (
                "Responses of 400 and above",
                "timeseries",
                8,
                "reqps",
                "By route and status.",
                [
                    (
                        f'sum by (route, code) (rate(dsformer_http_responses_total{{code=~"[45].."}}[{RATE}]))',
                        "{{route}} {{code}}",
                    )
                ],
            ),
            (
                "Inputs that were cut",
                "timeseries",
                8,
                "reqps",
                "Longer than the model takes, and cut because the request allowed it.",
                [(rate("dsformer_truncated_inputs_total", by="task"), "{{task}}")],
            ),
        ],
    ),
    (
        "Process",
        [
            (
                "Processor",
                "timeseries",
                6,
                "none",
                "Cores in use.",
                [(f'rate(process_cpu_seconds_total{{job="dsformer"}}[{RATE}])', "{{instance}}")],
            ),
            (
                "Memory",
                "timeseries",
                6,
                "decbytes",
                "Resident.",
                [('process_resident_memory_bytes{job="dsformer"}', "{{instance}}")],
            ),
            (
                "Open files",
                "timeseries",
                6,
                "none",
                "Connections among them.",
                [('process_open_fds{job="dsformer"}', "{{instance}}")],
            ),
            (
                "Models",
                "table",
                6,
                "none",
                "What is loaded.",
                [(f"dsformer_model_info{{{CHOSEN}}}", "")],
            ),
        ],
    ),
]

LINES = {"drawStyle": "line", "fillOpacity": 0, "lineWidth": 1, "showPoints": "never", "spanNulls": False}
KINDS: dict[str, dict[str, Any]] = {
    "timeseries": {"custom": LINES},
    "stack": {"custom": {**LINES, "fillOpacity": 40, "stacking": {"mode": "normal", "group": "A"}}},
    "heatmap": {},
    "stat": {},
    "bargauge": {},
    "table": {},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "heatmap": {
        "calculate": False,
        "cellGap": 0,
        "color": {"mode": "scheme", "scheme": "Blues", "fill": "blue", "exponent": 0.5, "steps": 64, "reverse": False},
        "yAxis": {"unit": "s"},
        "tooltip": {"mode": "single", "yHistogram": True},
    },
    "stat": {
        "colorMode": "none",
        "graphMode": "area",
        "textMode": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    },
    "bargauge": {
        "displayMode": "basic",
        "orientation": "horizontal",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    },
    "table": {"showHeader": True, "cellHeight": "sm"},
}
OPTIONS["stack"] = OPTIONS["timeseries"]
HIDDEN_COLUMNS = ("Time", "Value", "__name__", "instance", "job", "sha256", "runtime", "threads", "base_model")


def panel(number: int, x: int, y: int, row: tuple[str, str, int, str, str, list[tuple[str, str]]]) -> dict[str, Any]:
    title, kind, width, unit, description, queries = row
    made: dict[str, Any] = {
        "id": number,
        "type": "timeseries" if kind == "stack" else kind,
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": width, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, **KINDS[kind]}, "overrides": []},
        "options": OPTIONS[kind],
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": SOURCE,
                "expr": expression,
                "legendFormat": legend,
                "format": kind if kind in ("heatmap", "table") else "time_series",
                "instant": kind == "table",
                "range": kind != "table",
            }
            for i, (expression, legend) in enumerate(queries)
        ],
    }
    if kind == "table":
        hidden = {"excludeByName": dict.fromkeys(HIDDEN_COLUMNS, True), "indexByName": {}, "renameByName": {}}
        made["transformations"] = [{"id": "organize", "options": hidden}]
    return made


def panels() -> list[dict[str, Any]]:
    """Rows of panels from left to right; a new line where one is full."""
    made: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        head = {"id": len(made) + 1, "type": "row", "title": title, "collapsed": False, "panels": []}
        made.append({**head, "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}})
        x, y = 0, y + 1
        for one in row:
            if x + one[2] > WIDTH:
                x, y = 0, y + HEIGHT
            made.append(panel(len(made) + 1, x, y, one))
            x += one[2]
        y += HEIGHT
    return made


def dashboard() -> dict[str, Any]:
    return {
        "uid": "dsformer",
        "title": "DSFormer: dense and compressed",
        "tags": ["dsformer"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-15m", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [
                {
                    "name": "task",
                    "label": "Task",
                    "type": "query",
                    "datasource": SOURCE,
                    "query": {"query": "label_values(dsformer_model_info, task)", "refId": "task"},
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "current": {"text": ["All"], "value": ["$__all"]},
                }
            ]
        },
        "annotations": {"list": []},
        "links": [],
        "panels": panels(),
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
