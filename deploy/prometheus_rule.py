"""Writes the records and alerts of deploy/prometheus into a manifest for the Prometheus operator.

python deploy/prometheus_rule.py
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
MANIFEST = HERE / "kubernetes" / "monitoring" / "prometheusrule.yaml"
HEAD = """\
# Written by deploy/prometheus_rule.py from deploy/prometheus/rules.yml and alerts.yml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: hessquik
  labels: {app.kubernetes.io/name: hessquik}
spec:
  groups:
"""


def manifest() -> str:
    """Return the manifest with the groups of both files, and their comments."""
    groups = [
        (HERE / "prometheus" / name).read_text().partition("groups:\n")[2] for name in ("rules.yml", "alerts.yml")
    ]
    return HEAD + "".join(f"  {line}\n" for text in groups for line in text.splitlines())


if __name__ == "__main__":
    MANIFEST.write_text(manifest())
