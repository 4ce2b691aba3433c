"""The ``hessquik`` command."""

from __future__ import annotations

import gc
import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError:
    if sys.argv[1:2] == ["bench"]:  # needs the client's packages alone
        from .loadtest import main as run_bench

        sys.exit(run_bench(sys.argv[2:]))
    sys.exit("hessquik: expected the server's packages, found the client's; pip install 'hessquik-service[server]'")

from .settings import CLIENT_KEYS, Settings, explain, unknown_names

if TYPE_CHECKING:
    from hessquik_client import Client

__all__ = ["main"]

#: New objects after which the collector looks for cycles; importing torch makes hundreds of thousands, which stay.
MANY_OBJECTS = 200_000

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Derivatives of saved hessQuik networks over HTTP.",
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from .versions import versions

        found = versions()
        print("hessquik {version} (Python {python}, torch {torch}, {modules} modules)".format(**found))  # noqa: T201
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the versions and exit.")
    ] = False,
) -> None:
    """Derivatives of saved hessQuik networks over HTTP."""


Folder = Annotated[Path | None, typer.Argument(help="Folder of the saved networks; models/ if not given.")]


Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="What the file is to say: description, input_names, output_names, lower_bounds, upper_bounds, "
        "training.KEY; lists separated by commas; nothing behind = removes an entry.",
    ),
]


def _takes_every_setting(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for each setting except the folder; :class:`Settings` validates the values."""
    parameters = [
        inspect.Parameter("models", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=Folder)
    ]
    for name, field in Settings.model_fields.items():
        if name == "models":
            continue
        is_switch = field.annotation is bool
        default = "" if is_switch or field.default in (None, ()) else f" Default: {field.default}."
        option = typer.Option(help=f"{field.description}{default}", metavar=None if is_switch else "VALUE")
        annotation = Annotated[bool | None, option] if is_switch else Annotated[str | None, option]
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@app.command()
@_takes_every_setting
def serve(**flags: Any) -> None:
    """Serve a folder of saved networks.

    Each flag is also an environment variable: --max-rows is HESSQUIK_MAX_ROWS. An empty value counts as none.
    """
    for sentence in unknown_names(os.environ):
        _fail(sentence, status=2)
    try:
        settings = Settings.of({name: value for name, value in flags.items() if value not in {None, ""}})
    except ValueError as error:
        _fail(explain(error), status=2)
    for name in CLIENT_KEYS:
        if os.environ.get(name) and not settings.api_keys:
            _fail(f"got a client's {name} and no API keys; set HESSQUIK_API_KEYS, or unset {name}", status=2)
    from hessquik_client.errors import StartUpError

    from .app import create_app
    from .logs import log_start, set_up_logging
    from .server import EXIT_START_UP
    from .server import serve as run
    from .supervisor import supervise

    set_up_logging(settings)
    log_start(settings)
    try:
        status = supervise(settings) if settings.processes > 1 else run(create_app(settings), settings)
    except StartUpError as error:
        if settings.log_format == "json":
            logging.getLogger(__name__).error("%s", error)
            raise typer.Exit(EXIT_START_UP) from None
        logging.shutdown()  # writes what was logged before, so that this line is the last
        _fail(str(error), EXIT_START_UP)
    raise typer.Exit(status)


@app.command()
def models(folder: Folder = None) -> None:
    """Show the saved networks in a folder."""
    from hessquik import FormatError, storage

    from .logs import printable
    from .repository import scan
    from .workers import LoadError

    root = folder or Path("models")
    if not os.path.isdir(root):
        _fail(f"expected a folder, {root} is none", status=2)
    table = Table("name", "version", "architecture", "d", "m", "dtype", "parameters")
    refused = []
    look = scan(root)
    for file in look.files:
        try:
            saved = storage.parse(file.read())
        except (FormatError, LoadError) as error:
            refused.append(f"{file.path}: {error}")
            continue
        network = saved.network
        parameters = list(network.parameters())
        dtype = str(parameters[0].dtype).removeprefix("torch.")
        count = sum(parameter.numel() for parameter in parameters)
        sizes = (network.dim_input(), network.dim_output())
        table.add_row(file.name, str(file.version), saved.architecture["type"], *map(str, sizes), dtype, str(count))
    Console().print(table)
    for line in (
        *(f"left out: {printable(path)}: {why}" for path, why in sorted(look.left_out.items())),
        *(f"refused: {line}" for line in refused),
    ):
        sys.stderr.write(f"{line}\n")
    raise typer.Exit(1 if refused else 0)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="What torch.save wrote: a network or its state dict.")],
    out: Annotated[Path, typer.Argument(help="File to write, or the folder for it.")],
    architecture: Annotated[Path | None, typer.Option(help="JSON that describes a state dict's network.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name, where OUT is a folder.")] = None,
    description: Annotated[str | None, typer.Option(help="A sentence to keep in the file.")] = None,
    changes: Changes = None,
) -> None:
    """Turn a saved network of the original hessQuik library into a file that can be served."""
    from hessquik import HessQuikError, conversion

    from .metadata import changed

    out = _destination(checkpoint, out, name)
    try:
        metadata = changed({} if description is None else {"description": description}, changes or [])
        out.parent.mkdir(parents=True, exist_ok=True)
        network = conversion.convert(checkpoint, out, architecture, **metadata)
    except (HessQuikError, OSError, ValueError) as error:
        _fail(str(error), status=1)
    Console().print(f"{out}: {network.dim_input()} inputs, {network.dim_output()} outputs", highlight=False)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A network: .onnx, .pt2 (torch.export.save), or a state dict.")],
    out: Annotated[Path, typer.Argument(help="File to write, or the folder for it.")],
    name: Annotated[str | None, typer.Option(help="The model's name, where OUT is a folder.")] = None,
    description: Annotated[str | None, typer.Option(help="A sentence to keep in the file.")] = None,
    input_names: Annotated[str | None, typer.Option(help="Names of the inputs: x,y,z.")] = None,
    output_names: Annotated[str | None, typer.Option(help="Names of the outputs.")] = None,
    bounds: Annotated[str | None, typer.Option(help="Where it was trained, lower:upper per input: 0:1,-5:5.")] = None,
    scale: Annotated[
        Path | None, typer.Option(help="JSON with input_mean, input_scale, output_mean, output_scale, or bounds.")
    ] = None,
    architecture: Annotated[
        Path | None, typer.Option(help="JSON that describes a state dict's nn.Sequential.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64; the source's own if not given.")] = None,
    allow_kinks: Annotated[bool, typer.Option(help="Let ReLU and the like through, and say so in the file.")] = False,
) -> None:
    """Convert a network of torch or ONNX to a file that can be served, and check it."""
    import torch

    from hessquik import HessQuikError, proof, storage
    from hessquik.importing import files

    from .logs import printable

    out = _destination(file, out, name)
    if dtype not in {None, "float32", "float64"}:
        _fail(f"--dtype must be float32 or float64, got {dtype}", status=2)
    limits = None if bounds is None else _bounds(bounds)
    metadata: dict[str, Any] = {} if description is None else {"description": description}
    if limits is not None:
        metadata |= {"lower_bounds": limits[0], "upper_bounds": limits[1]}
    for key, names in (("input_names", input_names), ("output_names", output_names)):
        metadata |= {} if names is None else {key: _names(key, names)}
    progress = Console(stderr=True)
    try:
        with progress.status("reading the network and comparing its values"):
            scaling = None if scale is None else files.read_scaling(scale)
            chosen = None if dtype is None else getattr(torch, dtype)
            imported = files.import_file(file, scaling, architecture, allow_kinks, chosen, limits)
            data = storage.serialize(imported.network, **metadata)
        with progress.status("proving the derivatives"):
            rows = proof.prove(imported.network, *imported.region)
    except (HessQuikError, OSError) as error:
        _fail(printable(str(error)), status=1)
    table = Table("", "found")
    for key, value in files.describe(imported):
        table.add_row(key, value)
    failed = [
        f"{row.quantity} by {row.computed_by}: {row.found:.1e} > {row.bound:.0e}" for row in rows if not row.passed
    ]
    worst = max(row.found for row in rows if "float64" in row.computed_by)
    proven = f"[green]{len(rows)} comparisons passed[/], largest error {worst:.1e} in float64"
    table.add_row("derivatives", f"[red]FAILED[/]: {'; '.join(failed)}" if failed else proven)
    Console().print(table)
    if failed:
        _fail("the derivatives must agree with automatic differentiation; nothing was written", status=1)
    was_there = out.exists()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        storage.write(data, out)
    except OSError as error:
        _fail(str(error), status=1)
    Console().print(f"{out}: {len(data)} bytes{', in place of an older file' if was_there else ''}", highlight=False)


def _names(key: str, text: str) -> list[str]:
    """Parse ``x,y,…`` and return the names."""
    names = [each.strip() for each in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        _fail(f"--{key.replace('_', '-')} must be different names, such as x,y,z, got {text}", status=2)
    return names


def _bounds(text: str) -> tuple[list[float], list[float]]:
    """Parse ``lower:upper,lower:upper,…`` and return the lower and the upper bounds."""
    try:
        pairs = [[float(part) for part in pair.split(":")] for pair in text.split(",")]
        return [lower for lower, _ in pairs], [upper for _, upper in pairs]
    except ValueError:
        _fail(f"--bounds must be lower:upper per input, such as 0:1,-5:5, got {text}", status=2)


def _destination(source: Path, out: Path, name: str | None) -> Path:
    """Return the path of the file to write; its folder can be made, and its name is a valid name of a model.

    It is another file than the one to read.
    """
    from .repository import NAME, SUFFIX

    if name is not None and not NAME.fullmatch(name):
        _fail(f"--name must be letters, digits, dots, _ and -, at most 64 of them, got {name}", status=2)
    if out.is_dir() or not out.suffix:
        out = out / f"{name or source.stem}{SUFFIX}"
    elif name is not None and out.stem != name:
        _fail(f"expected a folder or {name}{SUFFIX} as OUT beside --name {name}, got {out.name}", status=2)
    if out.suffix != SUFFIX or not NAME.fullmatch(out.stem):
        _fail(
            f"expected a folder, or a file named like model{SUFFIX}, as OUT, got {out.name}; or pass --name", status=2
        )
    if out.exists() and source.exists() and out.samefile(source):
        _fail(f"OUT must be another file than the one to read, {source}; pass --name", status=2)
    there = next(folder for folder in out.parents if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        _fail(f"the folder {out.parent} cannot be made in {there}", status=2)
    return out


@app.command()
def describe(
    model: Annotated[Path, typer.Argument(help="A saved network.")],
    changes: Changes = None,
) -> None:
    """Show the metadata of a saved network, and change it with --set."""
    import json

    from hessquik import HessQuikError, save, storage

    from .metadata import changed

    try:
        saved = storage.parse(model.read_bytes())
        metadata = changed(saved.metadata, changes or [])
        if changes:
            save(saved.network, model, **metadata)
    except (HessQuikError, OSError, ValueError) as error:
        _fail(f"{model}: {error}", status=1)
    sizes = {"d": saved.network.dim_input(), "m": saved.network.dim_output()}
    print(json.dumps({**sizes, **metadata, "network": saved.architecture}, indent=2, ensure_ascii=False))  # noqa: T201


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A saved network.")],
    points: Annotated[Path, typer.Argument(metavar="IN", help="Points: .npy (n, d), .csv or .parquet.")],
    results: Annotated[
        Path, typer.Argument(metavar="OUT", help="Results: .npy for one quantity, .csv, .parquet, or a new folder.")
    ],
    quantities: Annotated[str, typer.Option(help="What to compute, separated by commas.")] = "value",
    directions: Annotated[Path | None, typer.Option(help="For jvp, hvp and curvature: .npy (k, d).")] = None,
    weights: Annotated[str | None, typer.Option(help="Of the outputs, separated by commas.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64; the network's own if not given.")] = None,
    outside: Annotated[str, typer.Option(help="Points outside the bounds: allow or refuse.")] = "allow",
    device: Annotated[str, typer.Option(help="Where to compute, as torch names it.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads to compute with, on a CPU.")] = 1,
) -> None:
    """Evaluate a saved network at all points of a file, tile by tile, without a server."""
    import numpy as np
    import torch
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from hessquik import HessQuikError, storage
    from hessquik_client.domain import OUTSIDE
    from hessquik_client.errors import ServiceError
    from hessquik_client.evaluators import TORCH_DTYPES, Evaluators
    from hessquik_client.quantities import QUANTITIES

    from .bulk import Job, evaluate_file

    names = tuple(dict.fromkeys(name.strip() for name in quantities.split(",")))
    if not set(names) <= set(QUANTITIES):
        _fail(f"--quantities: expected names out of {', '.join(QUANTITIES)}, got {quantities}", status=2)
    if dtype is not None and dtype not in TORCH_DTYPES:
        _fail(f"--dtype: expected float32 or float64, got {dtype}", status=2)
    if outside not in OUTSIDE:
        _fail(f"--outside: expected {' or '.join(OUTSIDE)}, got {outside}", status=2)
    if results.exists() and results.is_dir():
        _fail(f"expected a folder that does not exist yet, {results} is there", status=2)
    try:
        given = None if weights is None else np.array([float(weight) for weight in weights.split(",")])
        v = None if directions is None else np.load(directions, allow_pickle=False)
        evaluators = Evaluators(storage.parse(model.read_bytes()), torch.device(device), threads)
        columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("evaluating", total=None)
            count = evaluate_file(
                evaluators,
                points,
                results,
                Job(names, dtype, given, v, outside),
                lambda rows, total: bar.update(task, advance=rows, total=total or None),
            )
    except (HessQuikError, ServiceError, OSError, ValueError) as error:
        _fail(str(error), status=1)
    Console().print(f"{results}: {count} points", highlight=False, soft_wrap=True)


@app.command()
def load(
    url: Annotated[str, typer.Argument(help="A running service, such as http://127.0.0.1:8000.")],
    model: Annotated[str, typer.Argument(help="The model's name.")],
) -> None:
    """Make a running service load a model's files again; the admin key is HESSQUIK_API_KEY."""
    _administer(url, lambda client: client.load(model))


@app.command()
def unload(
    url: Annotated[str, typer.Argument(help="A running service, such as http://127.0.0.1:8000.")],
    model: Annotated[str, typer.Argument(help="The model's name.")],
    version: Annotated[int | None, typer.Option(help="One version; all if not given.")] = None,
) -> None:
    """Have a running service drop a model, or one version of it: the next lower one is the default then.

    The admin key is HESSQUIK_API_KEY. The files stay where they are; load brings all versions back.
    """
    _administer(url, lambda client: client.unload(model, version))


def _administer(url: str, action: Callable[[Client], dict[str, Any]]) -> None:
    """Send an administrative request to a running service, and print its reply."""
    import json
    import os

    from hessquik_client import Client, ClientError

    try:
        with Client(url, api_key=os.environ.get("HESSQUIK_API_KEY") or None) as client:
            print(json.dumps(action(client), indent=2))  # noqa: T201
    except (ClientError, ValueError) as error:
        _fail(str(error), status=1)


@app.command()
def check(
    model: Annotated[Path, typer.Argument(help="A saved network.")],
    samples: Annotated[int, typer.Option(min=1, max=1000, help="Points to compare at.")] = 5,
) -> None:
    """Check a model's derivatives against automatic differentiation; exit with 1 if any check fails."""
    from hessquik import FormatError, storage
    from hessquik.proof import backends, prove

    try:
        saved = storage.parse(model.read_bytes())
    except (FormatError, OSError) as error:
        _fail(f"{model.name}: {error}", status=1)
    bounds = (saved.metadata.get("lower_bounds"), saved.metadata.get("upper_bounds"))
    rows = prove(saved.network, *bounds, samples=samples)
    table = Table("quantity", "computed by", "compared with", "measure", "found", "bound", "")
    for row in rows:
        verdict = "[green]passed[/]" if row.passed else "[red]FAILED[/]"
        found, bound = f"{row.found:.2e}", f"{row.bound:.2e}"
        table.add_row(row.quantity, row.computed_by, row.reference, row.measure, found, bound, verdict)
    Console().print(table)
    failed = {row.computed_by.split(",")[0] for row in rows if not row.passed}
    for backend in backends():
        Console().print(f"backend {backend}: {'FAILED' if backend in failed else 'proven'}", highlight=False)
    raise typer.Exit(0 if all(row.passed for row in rows) else 1)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Run a load test against a running service; see hessquik bench --help."""
    from .loadtest import main as run_bench

    raise typer.Exit(run_bench(context.args))


def _fail(message: str, status: int) -> NoReturn:
    """Print a one-line error and exit with a status."""
    sys.stderr.write(f"hessquik: {message}\n")
    raise typer.Exit(status)


def main() -> None:
    """Run the command."""
    logging.captureWarnings(True)
    gc.set_threshold(MANY_OBJECTS)
    try:
        app()
    finally:
        gc.freeze()  # the process ends: no need to look for cycles among all that torch defines


if __name__ == "__main__":
    main()
