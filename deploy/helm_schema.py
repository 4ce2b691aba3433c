"""Writes the service's settings into the schema of the Helm chart's values, so that Helm refuses unknown ones.

python deploy/helm_schema.py
"""

from __future__ import annotations

import json
from pathlib import Path

from hessquik_service.settings import Settings

SCHEMA = Path(__file__).parent / "helm" / "values.schema.json"
#: What the chart sets itself, from other values or fixed.
SET_BY_THE_CHART = {"models", "port", "device", "secrets", "api_keys", "admin_keys", "tracing"}


def with_settings(schema: str) -> str:
    """Return the schema with the settings of this version of the service."""
    document = json.loads(schema)
    document["properties"]["settings"]["properties"] = {
        name: {key: value for key, value in described.items() if key not in ("title", "default")}
        for name, described in Settings.model_json_schema()["properties"].items()
        if name not in SET_BY_THE_CHART
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(with_settings(SCHEMA.read_text()))
