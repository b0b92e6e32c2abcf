"""The dashboard as TypeScript, for Grafana's own types of dashboards and panels to accept or refuse.

There are none for Prometheus' queries; those are asked of a Prometheus.
"""

from __future__ import annotations

import json

TYPES = "./node_modules/@grafana/schema/dist/types/raw"
KINDS = {"timeseries": "TimeSeries", "heatmap": "Heatmap", "stat": "Stat", "bargauge": "BarGauge", "table": "Table"}
# TypeScript's enums take no plain text or number, which is what a file holds: their values do.
PLAIN = """type Plain<T> = T extends string ? `${T}`
  : T extends number ? (number extends T ? number : `${T}` extends `${infer N extends number}` ? N : T)
  : T extends Array<infer U> ? Array<Plain<U>>
  : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;"""


def program(dashboard: dict) -> str:
    """Literals with `satisfies`, which refuses missing, wrong and unknown fields."""
    lines = [f"import type {{ Dashboard, Panel, RowPanel }} from '{TYPES}/dashboard/x/dashboard_types.gen';"]
    lines += [
        f"import type * as {kind} from '{TYPES}/composable/{kind}/panelcfg/x/{name}PanelCfg_types.gen';"
        for kind, name in KINDS.items()
    ]
    lines.append(PLAIN)

    def check(value: object, kind: str) -> None:
        lines.append(f"({json.dumps(value)}) satisfies Plain<{kind}>;")

    check({**dashboard, "panels": []}, "Dashboard")
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            check(panel, "RowPanel")
            continue
        kind = panel["type"]
        defaults = panel["fieldConfig"]["defaults"]
        check(panel["options"], f"Partial<{kind}.Options>")
        check(defaults.get("custom", {}), f"{kind}.FieldConfig" if kind in ("timeseries", "heatmap") else "object")
        bare = {"unit": defaults["unit"]}
        check({**panel, "options": {}, "targets": [], "fieldConfig": {"defaults": bare, "overrides": []}}, "Panel")
    return "\n".join([*lines, "export {};", ""])
