"""Derives kserve.schema.json from the models that KServe's Python SDK publishes.

The SDK itself is no dependency of the tests: it needs an older psutil than this project. So its wheel is only read:

    pip download --no-deps kserve==0.21.0
    python deploy/kserve/derive_schema.py kserve-0.21.0-py3-none-any.whl > deploy/kserve/kserve.schema.json

Fields whose type is Kubernetes' own refer to the definitions of Kubernetes' schema, by the same names as there.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from typing import Any

ROOTS = ("V1alpha1ServingRuntime", "V1beta1InferenceService")
#: Types that are no object of KServe's or of Kubernetes' core.
PLAIN: dict[str, dict[str, Any]] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "object": {"type": "object"},
    "ResourceQuantity": {"type": ["string", "number"]},
    "V1beta1MetricQuantity": {"type": ["string", "number"]},
    "V1ObjectMeta": {"$ref": "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"},
    "V1Time": {"type": "string", "format": "date-time"},
}


def read_models(wheel: str) -> dict[str, tuple[dict[str, str], dict[str, str], set[str]]]:
    """Return by class: types by attribute, JSON keys by attribute, and required attributes."""
    models = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not re.fullmatch(r"kserve/models/v1\w+\.py", name):
                continue
            source = archive.read(name).decode()
            required = set(re.findall(r"client_side_validation and (\w+) is None", source))
            for node in ast.parse(source).body:
                if isinstance(node, ast.ClassDef):
                    tables = {
                        statement.targets[0].id: ast.literal_eval(statement.value)
                        for statement in node.body
                        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
                    }
                    models[node.name] = (tables["openapi_types"], tables["attribute_map"], required)
    return models


def main(wheel: str) -> None:
    """Print the schema of the roots and of all that they are made of."""
    models = read_models(wheel)
    waiting, definitions = list(ROOTS), {}

    def schema_of(kind: str) -> dict[str, Any]:
        if match := re.fullmatch(r"list\[(.+)\]", kind):
            return {"type": "array", "items": schema_of(match[1])}
        if match := re.fullmatch(r"dict\(str, (.+)\)", kind):
            return {"type": "object", "additionalProperties": schema_of(match[1])}
        if kind in PLAIN:
            return PLAIN[kind]
        if kind in models:
            waiting.append(kind)
            return {"$ref": f"#/$defs/{kind}"}
        if match := re.fullmatch(r"V1([A-Z]\w+)", kind):
            return {"$ref": f"#/$defs/io.k8s.api.core.v1.{match[1]}"}
        return {}  # of another project, such as Knative: anything

    while waiting:
        kind = waiting.pop()
        if kind in definitions:
            continue
        types, keys, required = models[kind]
        definitions[kind] = {
            "type": "object",
            "additionalProperties": False,
            "properties": {keys[attribute]: schema_of(types[attribute]) for attribute in sorted(types)},
            "required": sorted(keys[attribute] for attribute in required & set(types)),
        }
    source = re.sub(r"-py3.*", "", wheel.rsplit("/", 1)[-1])
    schema = {"$comment": f"Derived from {source} (Apache-2.0).", "$defs": definitions}
    sys.stdout.write(json.dumps(schema, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
