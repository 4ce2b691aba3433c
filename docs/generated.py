"""Tables of settings, errors and commands, read off the code when the pages are built.

A page names a part by ``{{ name }}`` on a line of its own.
"""

from __future__ import annotations

import re
from typing import Any

import click
import typer
from pydantic_core import PydanticUndefined

from hessquik.importing import support
from hessquik_client import errors
from hessquik_client.errors import ServiceError
from service import cli, loadtest
from service.settings import Settings


def settings() -> str:
    """The table of settings."""
    rows = ["| environment variable | default | bounds | what |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        bounds = [
            f"{sign} {getattr(one, key)}"
            for one in field.metadata
            for key, sign in _SIGNS.items()
            if hasattr(one, key)
        ]
        default = field.default
        shown = "" if default is PydanticUndefined or default == () else f"`{default}`"
        rows.append(f"| `HESSQUIK_{name.upper()}` | {shown} | {', '.join(bounds)} | {field.description} |")
    return "\n".join(rows)


_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def codes() -> str:
    """The table of errors."""
    kinds = [getattr(errors, name) for name in errors.__all__]
    kinds = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, ServiceError)]
    kinds.remove(ServiceError)
    rows = ["| status | code | when | tried again by the client |", "|---|---|---|---|"]
    for kind in sorted(kinds, key=lambda kind: (kind.status, kind.code)):
        when = (kind.__doc__ or "").strip().splitlines()[0]
        again = "yes" if kind.retry_after_s is not None or kind.status == 504 else ""
        rows.append(f"| {kind.status} | `{kind.code}` | {when} | {again} |")
    return "\n".join(rows)


def commands() -> str:
    """Every command with its arguments."""
    group: Any = typer.main.get_command(cli.app)
    parts = []
    for name, command in group.commands.items():
        if name == "bench":  # has a parser of its own, since it runs without the server's packages
            parts += ["## `hessquik bench`", "", "```text", loadtest.arguments().format_help().strip(), "```", ""]
            continue
        context = click.Context(click.Command(name))
        parts += [f"## `hessquik {name}`", "", (command.help or "").strip(), "", "| argument | what |", "|---|---|"]
        for parameter in command.params:
            if parameter.name == "help":
                continue
            is_option = parameter.param_type_name == "option"
            shown = ", ".join(parameter.opts) if is_option else (parameter.name or "").upper()
            default = parameter.get_default(context) if parameter.default is not None else None
            text = (getattr(parameter, "help", "") or "").replace("|", "\\|")
            parts.append(f"| `{shown}` | {text}{f' Default: {default}.' if default not in (None, False) else ''} |")
        parts.append("")
    return "\n".join(parts)


PARTS = {"settings": settings, "codes": codes, "commands": commands, "importable": support.table}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the parts in their places; called by MkDocs for each page."""
    return re.sub(r"^\{\{ (\w+) \}\}$", lambda match: PARTS[match[1]](), markdown, flags=re.M)


def on_page_content(html: str, **_: Any) -> str:
    """Show docstrings' cross-references (``:class:`Evaluator```) as plain code."""
    return re.sub(r":(?:class|func|meth|mod|data|attr):<code>~?", "<code>", html)
