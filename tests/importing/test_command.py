"""``hessquik import``: every kind of file, its options, the table, and what it refuses."""

import json
import zipfile

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from torch import nn
from typer.testing import CliRunner

import hessquik
from hessquik import proof, storage
from hessquik.errors import FormatError
from hessquik.importing import onnx_model
from hessquik.importing.files import import_file
from hessquik.importing.sequential import read_sequential
from service.cli import app
from tests.importing import onnx_networks


def run(*arguments):
    return CliRunner().invoke(app, ["import", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 1)).double()


@pytest.fixture(scope="module")
def exported(module, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "mlp.pt2"
    torch.export.save(torch.export.export(module, (torch.zeros(3, 2, dtype=torch.float64),)), path)
    return path


@pytest.fixture
def one_backend(monkeypatch):
    """Prove on one backend, which takes a second; the first test proves on all."""
    name, arguments = next(iter(proof.backends().items()))
    monkeypatch.setattr(proof, "backends", lambda: {name: arguments})


@pytest.mark.slow
def test_an_exported_program_with_all_options(module, exported, tmp_path):
    scale = {"input_mean": [10.0, -1.0], "input_scale": [2.0, 0.5], "output_mean": 3.0, "output_scale": [4.0]}
    (tmp_path / "scale.json").write_text(json.dumps(scale))
    result = run(
        exported, tmp_path, "--name", "mlp", "--description", "A test.", "--input-names", "p, T", "--output-names",
        "y", "--bounds", "8:12,-2:0", "--scale", tmp_path / "scale.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in (
        "singleLayer 2 → 6, 6 × tanhActivation",
        "inputs d, outputs m",
        "2, 1",
        "67 of float64",
        "comparisons",
    ):
        assert text in result.stdout
    assert "largest error against torch" in result.stdout
    saved = storage.parse((tmp_path / "mlp.safetensors").read_bytes())
    assert saved.metadata == {
        "description": "A test.",
        "input_names": ["p", "T"],
        "output_names": ["y"],
        "lower_bounds": [8.0, -2.0],
        "upper_bounds": [12.0, 0.0],
    }
    x = torch.tensor([[9.0, -1.5], [11.0, -0.5]], dtype=torch.float64)
    u = (x - torch.tensor(scale["input_mean"]).double()) / torch.tensor(scale["input_scale"]).double()
    torch.testing.assert_close(saved.network(x)[0], 3 + 4 * module(u), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("one_backend")
def test_an_onnx_model_in_another_dtype(tmp_path):
    model, d, f = onnx_networks.model(1)
    onnx.save(model, tmp_path / "random.onnx")
    result = run(tmp_path / "random.onnx", tmp_path / "out.safetensors", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "of float32" in result.stdout
    network = hessquik.load(tmp_path / "out.safetensors")
    x = torch.randn(3, d)
    torch.testing.assert_close(network(x)[0].detach(), f(x.double()).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("one_backend")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_state_dict_with_its_architecture(module, tmp_path, suffix):
    layers = [
        {"type": "Linear", "in_features": 2, "out_features": 6},
        {"type": "Tanh"},
        {"type": "Linear", "in_features": 6, "out_features": 6},
        {"type": "GELU"},
        {"type": "Linear", "in_features": 6, "out_features": 1},
    ]
    (tmp_path / "net.json").write_text(json.dumps({"type": "Sequential", "layers": layers}))
    weights = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(module.state_dict(), weights)
    else:
        safetensors.torch.save_file(module.state_dict(), weights)
    result = run(weights, tmp_path / "out.safetensors", "--architecture", tmp_path / "net.json")
    assert result.exit_code == 0, result.output
    x = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(hessquik.load(tmp_path / "out.safetensors")(x)[0], module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("one_backend")
def test_kinks_are_refused_and_then_in_the_metadata(tmp_path):
    model, *_ = onnx_networks.model(2, {"Relu": onnx_networks.KINKED["Relu"]})
    onnx.save(model, tmp_path / "relu.onnx")
    refused = run(tmp_path / "relu.onnx", tmp_path)
    assert refused.exit_code == 1
    assert "(Relu) is linear in pieces" in refused.stderr
    assert "--allow-kinks" in refused.stderr
    assert not (tmp_path / "relu.safetensors").exists()
    allowed = run(tmp_path / "relu.onnx", tmp_path, "--allow-kinks")
    assert allowed.exit_code == 0, allowed.output
    saved = storage.parse((tmp_path / "relu.safetensors").read_bytes())
    assert saved.metadata["kinks"] == {
        "reluActivation": "the first derivative jumps where z = 0, and the second one is undefined there"
    }
    header = safetensors.safe_open(tmp_path / "relu.safetensors", "pt").metadata()
    assert json.loads(header["kinks"]) == saved.metadata["kinks"]


class Code:
    """Leaves a file when it is unpickled."""

    def __reduce__(self):
        return (open, ("/nonexistent/was-run", "w"))


def test_what_is_refused_names_the_file_and_what_to_do(module, exported, tmp_path):
    architecture = {"type": "Sequential", "layers": [{"type": "Conv2d"}]}
    (tmp_path / "conv.json").write_text(json.dumps(architecture))
    (tmp_path / "short.json").write_text(
        json.dumps({"type": "Sequential", "layers": [{"type": "Linear", "in_features": 2, "out_features": 6}]})
    )
    (tmp_path / "scale.json").write_text('{"input_men": 1}')
    (tmp_path / "latin.json").write_bytes(b'{"input_mean": "\xe9"}')
    torch.save(module, tmp_path / "whole.pt")
    torch.save(Code(), tmp_path / "code.pt")
    torch.save(module.state_dict(), tmp_path / "state.pt")
    torch.save({"epoch": 3, "state_dict": module.state_dict()}, tmp_path / "checkpoint.pt")
    torch.save(nn.DataParallel(module).state_dict(), tmp_path / "parallel.pt")
    (tmp_path / "damaged.onnx").write_bytes(b"\xff\xff not protobuf")
    (tmp_path / "damaged.pt2").write_bytes(exported.read_bytes()[:-200])
    (tmp_path / "forest.pkl").write_bytes(b"")
    cases = [
        (("whole.pt",), "a whole module or TorchScript holds code: export it with torch.export.save"),
        (("forest.pkl",), "can hold code, and are not opened; call hessquik.from_sklearn"),
        (("state.pt",), "or a state dict beside --architecture"),
        (("whole.pt", "--architecture", "short.json"), "a whole module is a pickle of code"),
        (("code.pt", "--architecture", "short.json"), "a whole module is a pickle of code"),
        (("state.pt", "--architecture", "conv.json"), "layers[0].type must be one of BatchNorm1d"),
        (
            ("state.pt", "--architecture", "short.json"),
            'tensor "2.bias" must be none, got real numbers of the shape (6,)',
        ),
        (("damaged.onnx",), "damaged.onnx: the file must be an ONNX model"),
        (("damaged.pt2",), "damaged.pt2: "),
        (("missing.onnx",), "missing.onnx"),
        ((exported, "--scale", "scale.json"), "a scaling must have keys out of input_mean"),
        ((exported, "--scale", "latin.json"), "scale must be strict JSON"),
        ((exported, "--bounds", "0:1"), "bounds must be 2 lower and 2 upper numbers"),
        ((exported, "--bounds", "0,1"), "--bounds must be lower:upper per input"),
        ((exported, "--dtype", "float16"), "--dtype must be float32 or float64"),
        ((exported, "--input-names", "x"), "input_names must be one string per input"),
        ((exported, "--input-names", "x,x"), "--input-names must be different names"),
        ((exported, "--output-names", "y,"), "--output-names must be different names"),
        ((exported, "--architecture", "short.json"), "an architecture (--architecture) is for state dicts"),
        (("checkpoint.pt", "--architecture", "short.json"), 'got a dict of "epoch", "state_dict"; save module'),
        (("parallel.pt", "--architecture", "short.json"), "as DataParallel writes them"),
    ]
    for (file, *options), message in cases:
        given = [tmp_path / each if str(each).endswith(".json") else each for each in options]
        result = run(tmp_path / file, tmp_path / "out.safetensors", *given)
        assert result.exit_code in {1, 2}, (file, result.output)
        assert message in " ".join(result.stderr.split()), (file, result.stderr)
        assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.usefixtures("one_backend")
def test_a_pickle_in_an_archive_is_not_opened(exported, tmp_path):
    """The pickle of sample inputs is not read; weights that are pickles are refused."""
    hostile, pickled = tmp_path / "hostile.pt2", tmp_path / "pickled.pt2"
    with zipfile.ZipFile(exported) as source, zipfile.ZipFile(hostile, "w") as a, zipfile.ZipFile(pickled, "w") as b:
        for name in source.namelist():
            data = source.read(name)
            a.writestr(name, b"cposix\nsystem\n(S'false'\ntR." if name.endswith(".pt") else data)
            if name.endswith("weights_config.json"):
                data = data.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
            b.writestr(name, data)
    assert run(hostile, tmp_path / "out.safetensors").exit_code == 0
    result = run(pickled, tmp_path / "other.safetensors")
    assert result.exit_code == 1
    assert "must be stored as raw numbers, got a pickle" in result.stderr


def rewritten(source, target, change, compression=zipfile.ZIP_STORED):
    """Write an archive with the JSON of its model and of its weights changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith(("model.json", "weights_config.json")):
                found = json.loads(data)
                change(found["graph_module"] if "graph_module" in found else found["config"]["0.weight"])
                data = json.dumps(found).encode()
            new.writestr(name, data)


def shaped(sizes):
    """Return a change of the shape of a weight, whose numbers are all the first one."""

    def change(part):
        if "tensor_meta" in part:
            part["tensor_meta"] |= {
                "sizes": [{"as_int": size} for size in sizes],
                "strides": [{"as_int": 0} for _ in sizes],
            }

    return change


def graphed(change):
    """Return a change of the graph."""
    return lambda part: change(part) if "graph" in part else None


def aim(target):
    """Return a change of the target of the first call."""
    return graphed(lambda part: part["graph"]["nodes"][0].update(target=target))


def take(sizes):
    """Return a change of the shape of the input."""
    sizes = [{"as_int": size} for size in sizes]
    return graphed(lambda part: part["graph"]["tensor_values"]["input"].update(sizes=sizes))


NORM = {
    "target": "torch.ops.aten.layer_norm.default",
    "inputs": [
        {"name": "input", "arg": argument, "kind": 1}
        for argument in ({"as_tensor": {"name": "input"}}, {"as_ints": [2]}, {"as_float": 2.0})
    ],
    "outputs": [{"as_tensor": {"name": "norm"}}],
}
HOSTILE = {
    "a huge weight": (shaped([1 << 20, 1 << 20]), "tensors must have at most 268435456 numbers together"),
    "an overflow": (shaped([10**30]), "tensors must have at most 268435456 numbers together"),
    "no input": (take([3, 0]), "a program must take 1 to 268435456 numbers, got an array of the shape (3, 0)"),
    "huge inputs": (take([3, 10**9]), "a program must take 1 to 268435456 numbers"),
    "many inputs": (take([3, 10**7]), "the network must have at most 65536 inputs, got 10000000"),
    "negative inputs": (take([3, -2]), "a program must take 1 to 268435456 numbers"),
    "no calls": (graphed(lambda part: part["graph"]["nodes"].clear()), "node linear_2 does not depend on the input"),
    "a class": (aim("torch.ops.aten.add.__class__"), "(aten.add.__class__) is not among the operations"),
    "a method": (aim("torch.ops.aten.linear.op"), "(aten.linear.op) is not among the operations"),
    "no name": (
        graphed(lambda part: part["graph"]["nodes"][0]["outputs"][0]["as_tensor"].update(name={})),
        "the name of a value must be text, got {}",
    ),
    "a number as weights": (
        graphed(lambda part: part["graph"]["nodes"].insert(0, NORM)),
        "(aten.layer_norm.default) has arguments that cannot be read (RuntimeError: aten::layer_norm() Expected",
    ),
    "a terminal": (aim("\x1b[31m\n"), r"node '0' (\x1b[31m\n) is an operator of your own"),
    "no objects": (lambda part: part.clear(), "the file must be an archive that torch.export.save of torch 2.8"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused(name, exported, tmp_path):
    change, message = HOSTILE[name]
    rewritten(exported, tmp_path / "hostile.pt2", change)
    result = run(tmp_path / "hostile.pt2", tmp_path / "out.safetensors")
    assert (result.exit_code, message in " ".join(result.stderr.split())) == (1, True), result.output
    assert not (tmp_path / "out.safetensors").exists()


def test_damaged_archives_are_refused(exported, tmp_path):
    path = tmp_path / "damaged.pt2"
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        rewritten(exported, path, lambda part: None, compression)
        with pytest.raises(FormatError, match="must hold its files as they are, neither compressed nor encrypted"):
            import_file(path)
    data = bytearray(exported.read_bytes())
    entry = data.rfind(b"PK\x01\x02")
    data[entry + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="neither compressed nor encrypted"):
        import_file(path)
    with zipfile.ZipFile(exported) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"[" * 100_000 if name.endswith("model.json") else old.read(name))
    with pytest.raises(FormatError, match=r"must be an archive .*RecursionError"):
        import_file(path)


def test_the_place_to_write_is_checked_first(exported, tmp_path):
    nowhere = run(exported, tmp_path / "models.onnx")
    assert nowhere.exit_code == 2
    assert "expected a folder, or a file named like model.safetensors, as OUT, got models.onnx" in nowhere.stderr
    (tmp_path / "my model.pt2").write_bytes(exported.read_bytes())
    assert "got my model.safetensors" in run(tmp_path / "my model.pt2", tmp_path).stderr
    bad = run(exported, tmp_path, "--name", "a b")
    assert (bad.exit_code, "--name must be letters, digits" in bad.stderr) == (2, True)
    (tmp_path / "file").write_text("")
    inside = run(exported, tmp_path / "file" / "out.safetensors")
    assert (inside.exit_code, "cannot be made" in inside.stderr) == (2, True)
    refused = run(tmp_path / "missing.pt2", tmp_path / "new" / "models")
    assert (refused.exit_code, (tmp_path / "new").exists()) == (1, False)


LAYERS = [{"type": "Linear", "in_features": 2, "out_features": 3}, {"type": "Tanh"}]


@pytest.mark.usefixtures("one_backend")
def test_a_state_dict_of_several_dtypes_keeps_every_digit(tmp_path):
    (tmp_path / "net.json").write_text(json.dumps({"type": "Sequential", "layers": LAYERS}))
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh()).double()
    torch.save({"0.weight": module[0].weight, "0.bias": module[0].bias.float()}, tmp_path / "state.pt")
    result = run(tmp_path / "state.pt", tmp_path / "out.safetensors", "--architecture", tmp_path / "net.json")
    assert result.exit_code == 0, result.output
    module[0].bias.data = module[0].bias.float().double()
    x = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(hessquik.load(tmp_path / "out.safetensors")(x)[0], module(x), rtol=1e-14, atol=1e-14)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w + 1j,
            "must be real numbers of the shape (3, 2), got torch.complex64 numbers of the shape (3, 2)",
        ),
        (lambda w: (9 * w).int(), "must be real numbers of the shape (3, 2), got torch.int32 numbers"),
        (
            lambda w: w.to(torch.float8_e4m3fn),
            "must be real numbers of the shape (3, 2), got torch.float8_e4m3fn numbers",
        ),
        (lambda w: w.to_sparse(), "got numbers in another form than an array"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "got numbers in another form than an array"),
        (lambda w: torch.nested.nested_tensor([w]), "got numbers in another form than an array"),
        (lambda w: w.to("meta"), "must hold a state dict, which has names and tensors alone"),
        (None, "must hold a state dict, which has names and tensors alone, got a dict of 0"),
    ],
)
def test_state_dicts_of_other_numbers(tmp_path, change, message):
    (tmp_path / "net.json").write_text(json.dumps({"type": "Sequential", "layers": LAYERS}))
    state = nn.Linear(2, 3).state_dict(prefix="0.")
    state = {0: state["0.weight"]} if change is None else state | {"0.weight": change(state["0.weight"])}
    torch.save(state, tmp_path / "state.pt")
    result = run(tmp_path / "state.pt", tmp_path / "out.safetensors", "--architecture", tmp_path / "net.json")
    assert (result.exit_code, message in " ".join(result.stderr.split())) == (1, True), result.output
    assert not (tmp_path / "out.safetensors").exists()


def test_the_file_to_read_is_not_written(tmp_path):
    (tmp_path / "net.json").write_text(json.dumps({"type": "Sequential", "layers": LAYERS}))
    safetensors.torch.save_file(nn.Linear(2, 3).state_dict(prefix="0."), tmp_path / "state.safetensors")
    data = (tmp_path / "state.safetensors").read_bytes()
    result = run(tmp_path / "state.safetensors", tmp_path, "--architecture", tmp_path / "net.json")
    assert (result.exit_code, "OUT must be another file than the one to read" in result.stderr) == (2, True)
    assert (tmp_path / "state.safetensors").read_bytes() == data


def test_architectures_larger_than_the_file_take_no_memory(tmp_path):
    layers = [{"type": "Linear", "in_features": 65536, "out_features": 65536}] * 9
    (tmp_path / "net.json").write_text(json.dumps({"type": "Sequential", "layers": layers}))
    torch.save(nn.Linear(2, 3).state_dict(prefix="0."), tmp_path / "state.pt")
    with pytest.raises(
        FormatError, match=r'"0.bias" must be real numbers of the shape \(65536,\), got real .* \(3,\)'
    ):
        read_sequential(tmp_path / "state.pt", tmp_path / "net.json")


def test_json_that_is_no_text(exported, tmp_path):
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "state.pt")
    for arguments in ((exported, "--scale"), (tmp_path / "state.pt", "--architecture")):
        result = run(arguments[0], tmp_path / "out.safetensors", arguments[1], tmp_path / "bytes.json")
        assert (result.exit_code, "must be strict JSON" in result.stderr) == (1, True), result.output


@pytest.mark.usefixtures("one_backend")
def test_folders_are_made_and_an_older_file_is_named(exported, tmp_path):
    assert run(exported, tmp_path / "new" / "models").exit_code == 0
    again = run(exported, tmp_path / "new" / "models" / "mlp.safetensors")
    assert again.exit_code == 0
    assert "in place of an older file" in " ".join(again.stdout.split())


def beside(tmp_path, location):
    """Return a model whose weights are in another file."""
    model, d, f = onnx_networks.model(1)
    for tensor in model.graph.initializer:
        onnx.external_data_helper.set_external_data(tensor, location)
    onnx.save(model, tmp_path / "model" / "net.onnx")
    return tmp_path / "model" / "net.onnx", d, f


def test_weights_beside_the_file_are_read_from_its_folder_alone(tmp_path):
    (tmp_path / "model").mkdir()
    path, d, f = beside(tmp_path, "net.onnx.data")
    x = torch.randn(3, d, dtype=torch.float64)
    torch.testing.assert_close(hessquik.from_onnx(path)(x)[0].detach(), f(x), rtol=1e-10, atol=1e-10)
    (tmp_path / "secret.dat").write_bytes((tmp_path / "model" / "net.onnx.data").read_bytes()[:100])
    for location in (b"../secret.dat", b"missing.data0"):
        other = path.with_stem("other")
        other.write_bytes(path.read_bytes().replace(b"net.onnx.data", location))
        with pytest.raises(
            FormatError, match=f"other.onnx: the weights beside .* in regular files .*{location.decode()}"
        ):
            hessquik.from_onnx(other)


def test_weights_beside_the_file_are_counted_as_often_as_they_are_used(tmp_path, monkeypatch):
    """As many tensors can take the same bytes, those of constants among them."""
    weights = onnx.numpy_helper.from_array(np.ones(3), "w")
    (tmp_path / "w.data").write_bytes(weights.raw_data)
    onnx.external_data_helper.set_external_data(weights, "w.data")
    weights.ClearField("raw_data")
    nodes = [onnx.helper.make_node("Constant", [], [f"w{i}"], value=weights) for i in range(10)]
    nodes.append(onnx.helper.make_node("Sum", ["x", *(f"w{i}" for i in range(10))], ["y"]))
    sides = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, ["n", 3]) for name in "xy"]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", sides[:1], sides[1:])), tmp_path / "net.onnx")
    x = torch.zeros(1, 3, dtype=torch.float64)
    assert torch.equal(hessquik.from_onnx(tmp_path / "net.onnx")(x)[0].detach(), x + 10)
    size = (tmp_path / "net.onnx").stat().st_size
    assert size > 9 * 24
    monkeypatch.setattr(onnx_model, "MAX_FILE_BYTES", size)
    (tmp_path / "w.data").write_bytes(bytes(size // 9))
    with pytest.raises(FormatError, match=f"net.onnx: the weights beside the file must have at most {size} bytes"):
        hessquik.from_onnx(tmp_path / "net.onnx")


def test_names_in_a_file_cannot_forge_lines(tmp_path):
    model, *_ = onnx_networks.model(2)
    for node in model.graph.node:
        node.op_type, node.name = "Floor", "a\x1b[31m\nb"
    onnx.save(model, tmp_path / "net.onnx")
    result = run(tmp_path / "net.onnx", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith(r"hessquik: node a\x1b[31m\nb (Floor) is constant in pieces")
    assert result.stderr.count("\n") == 1
