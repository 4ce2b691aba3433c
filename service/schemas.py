"""Bodies of requests and replies as pydantic models, with which FastAPI validates or documents them.

Numbers do not pass through these models, since that would take longer than evaluating a small network:
:mod:`service.codecs` reads and writes them. A test checks that the models and the codecs agree.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from hessquik_client.domain import Outside
from hessquik_client.quantities import AXES, QUANTITIES, TEXTS, Quantity, describe_shape

__all__ = [
    "Answer",
    "Attempt",
    "EvaluateRequest",
    "Facts",
    "IndexEntry",
    "IndexRequest",
    "InferenceError",
    "InferenceOutput",
    "InferenceReply",
    "InferenceRequest",
    "InferenceResult",
    "InferenceTensor",
    "Limits",
    "Liveness",
    "Loaded",
    "ModelDetails",
    "ModelList",
    "ModelMetadata",
    "ModelReady",
    "ModelStatistics",
    "Problem",
    "QuantityRequest",
    "Readiness",
    "Ready",
    "RepositoryRequest",
    "ServerMetadata",
    "Statistics",
    "TensorMetadata",
    "TesseractAbstract",
    "TesseractApply",
    "TesseractArray",
    "TesseractError",
    "TesseractFaults",
    "TesseractJacobians",
    "TesseractOutputs",
    "TesseractShapes",
    "UMBridgeError",
    "UMBridgeFault",
    "UMBridgeIndex",
    "UMBridgeInfo",
    "UMBridgeInputSizes",
    "UMBridgeOutput",
    "UMBridgeOutputSizes",
    "UMBridgeOutputs",
    "UMBridgePoint",
    "UMBridgeRequest",
    "UMBridgeSupport",
    "UMBridgeVector",
    "Unloaded",
]

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Row = Annotated[list[Number], Field(min_length=1)]
Rows = Annotated[list[Row], Field(min_length=1)]
Stack = Annotated[list[Rows], Field(min_length=1)]
#: Replies: null stands for a number that is not finite.
Entry = float | None
Vector = list[Entry]
Matrix = list[Vector]
Cube = list[Matrix]
Tesseract = list[Cube]
Dtype = Literal["float32", "float64"]
Version = Annotated[str, Field(pattern="^[1-9][0-9]{0,8}$")]
State = Literal["ready", "loading", "failed"]


class QuantityRequest(BaseModel):
    """Points, and options of their evaluation."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"inputs": [[0.5, -1.0]]}})

    inputs: Row | Rows = Field(description="(n, d) points, or one point of d numbers: the reply then has no n axis.")
    weights: Row | Rows | None = Field(
        None, description="(m) or (n, m): derivatives of Σ_j weights_j f_j; the m axis of the reply becomes 1."
    )
    directions: Rows | Stack | None = Field(None, description="(k, d) or (n, k, d), for jvp, hvp and curvature.")
    dtype: Dtype | None = Field(None, description="What to compute in; the model's own if not given.")
    outside: Outside | None = Field(
        None, description="Treatment of points outside the model's bounds; the service's setting if not given."
    )


class EvaluateRequest(QuantityRequest):
    """Points, and the quantities to compute at them."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"inputs": [[0.5, -1.0]], "quantities": ["value", "gradient"]}}
    )

    quantities: Annotated[list[Quantity], Field(min_length=1)] | None = Field(
        None, description="Any of them, each once; value if not given.", json_schema_extra={"uniqueItems": True}
    )


class _Answered(BaseModel):
    model: str
    version: Version


def _result(quantity: str) -> Any:
    """Return the field of a quantity in an answer: lists for one point, or for a batch."""
    rank = len(AXES[quantity])
    text = f"{describe_shape(quantity)}: {TEXTS[quantity]}"
    return _LISTS[rank] | _LISTS[rank + 1] | None, Field(None, description=text)


_LISTS: list[Any] = [Entry, Vector, Matrix, Cube, Tesseract]
Answer = create_model(
    "Answer",
    __base__=_Answered,
    __doc__="One key per quantity. Axes: n points (absent for a single point), d inputs, k directions, m outputs.",
    **{quantity: _result(quantity) for quantity in QUANTITIES},
)


class Facts(BaseModel):
    """State, sizes and metadata of a model."""

    name: str = Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    versions: list[Version]
    default_version: Version
    state: State
    reason: str | None = Field(None, description="Why it failed.")
    d: int | None = Field(description="Inputs.")
    m: int | None = Field(description="Outputs.")
    dtype: Dtype | None
    device: str | None
    parameters: int | None
    members: int | None = Field(description="Networks whose mean is the model; 1 if it is not an ensemble.")
    metadata: dict[str, Any] | None = Field(
        description="What its file says: description, names, bounds, training with its errors."
    )


class ModelList(BaseModel):
    """All models, ordered by name."""

    models: list[Facts]


class Limits(BaseModel):
    """Limits of one request."""

    rows: int
    directions: int = Field(description="Per point; directions times points are at most the rows.")
    body_bytes: int
    reply_bytes: int


class ModelDetails(Facts):
    """One version of a model."""

    version: Version
    architecture: dict[str, Any] | None
    sha256: str | None = Field(None, description="Of the file, as GET …/file has it in Repr-Digest.")
    quantities: list[Quantity]
    dtypes: list[Dtype]
    limits: Limits


class Attempt(BaseModel):
    """The result of reading one file."""

    version: Version
    state: State
    reason: str | None


class Loaded(Facts):
    """The model after loading, and the result of reading each file."""

    loaded: list[Attempt]


class Unloaded(BaseModel):
    """The model, or the version of it, that is no longer served."""

    name: str
    state: Literal["unloaded"]
    version: Version | None = None


class Liveness(BaseModel):
    """Liveness of the process."""

    live: Literal[True]


class Readiness(BaseModel):
    """Readiness of the service, with the reasons if it is not ready."""

    ready: bool
    reasons: list[str]


class Problem(BaseModel):
    """An error in the problem details format (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str = Field(description="What was expected, and what came.")
    code: str
    request_id: str
    field: str | None = Field(None, description="The field at fault.")
    row: int | None = Field(None, description="Its first row at fault.")
    expected: str | None = None
    got: str | None = None
    input: int | None = Field(None, description="The input of a point outside the domain, counted from 0.")
    name: str | None = Field(None, description="Its name.")
    lower: float | None = Field(None, description="Its bounds.")
    upper: float | None = None


# UM-Bridge 1.0.

Config = Annotated[
    dict[Literal["version", "dtype", "outside"], Any] | None,
    Field(description="At most version; dtype: float32 or float64; outside: allow or refuse."),
]
UMBridgeIndex = Annotated[Literal[0], Field(description="The only input or output vector that there is.")]
UMBridgeVector = Number | Row


class UMBridgeRequest(BaseModel):
    """The name of a model."""

    name: str
    config: Config = None


class UMBridgePoint(UMBridgeRequest):
    """The model's input: a list of one vector of d numbers."""

    input: Annotated[list[Row], Field(min_length=1, max_length=1)]


class UMBridgeInfo(BaseModel):
    """The models that are ready."""

    protocolVersion: float  # noqa: N815
    models: list[str]


class UMBridgeSupport(BaseModel):
    """The quantities that can be asked of a model."""

    support: dict[Literal["Evaluate", "Gradient", "ApplyJacobian", "ApplyHessian"], bool]


class UMBridgeInputSizes(BaseModel):
    """Lengths of the input vectors."""

    inputSizes: list[int]  # noqa: N815


class UMBridgeOutputSizes(BaseModel):
    """Lengths of the output vectors."""

    outputSizes: list[int]  # noqa: N815


class UMBridgeOutput(BaseModel):
    """One vector of numbers."""

    output: list[float]


class UMBridgeOutputs(BaseModel):
    """The model's output: a list of one vector."""

    output: list[list[float]]


class UMBridgeFault(BaseModel):
    """An error message."""

    type: str
    message: str


class UMBridgeError(BaseModel):
    """An error in UM-Bridge's format."""

    error: UMBridgeFault


# Tesseract.


class TesseractData(BaseModel):
    """The numbers of an array."""

    buffer: Any = Field(description="Nested lists, or base64 of the numbers' bytes in row-major order.")
    encoding: Literal["json", "raw", "base64"]
    compression: None = None


class TesseractArray(BaseModel):
    """An array in Tesseract's encoding."""

    object_type: Literal["array"] = "array"
    shape: list[int]
    dtype: str
    data: TesseractData


class TesseractInputs(BaseModel):
    """Points, and the outputs to compute at them."""

    x: TesseractArray | Row | Rows = Field(description="(n, d) or (d).")
    weights: TesseractArray | Row | Rows | None = Field(
        None, description="(m) or (n, m): everything is that of Σ_j weights_j f_j."
    )
    outputs: list[Quantity] | None = Field(None, description="Of apply: quantities without directions.")
    outside: Outside | None = None


class TesseractApply(BaseModel):
    """A request for values or other quantities."""

    inputs: TesseractInputs


class TesseractShape(BaseModel):
    """An array without its numbers."""

    shape: list[int]
    dtype: str


class TesseractAbstract(BaseModel):
    """A request for the shapes of outputs."""

    inputs: dict[str, Any] = Field(description="As for apply, x with shape and dtype only.")


TesseractShapes = dict[str, TesseractShape]
TesseractOutputs = dict[str, TesseractArray]
TesseractJacobians = dict[str, TesseractOutputs]


class TesseractError(BaseModel):
    """An error."""

    detail: str


class TesseractFault(BaseModel):
    """The location of an error in the input, and the expected value."""

    type: str
    loc: list[str | int]
    msg: str
    input: None = None


class TesseractFaults(BaseModel):
    """The errors of an input that does not fit."""

    detail: list[TesseractFault]


# Open Inference Protocol v2.

Parameters = dict[str, Any]


class InferenceTensor(BaseModel):
    """A tensor of a request."""

    name: Literal["inputs", "weights", "directions"]
    shape: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=3)]
    datatype: str
    parameters: Parameters | None = Field(None, description="binary_data_size, where the numbers follow the JSON.")
    data: list[Any] | None = Field(None, description="Numbers in row-major order, nested or flat.")


class InferenceOutput(BaseModel):
    """A requested output."""

    name: Quantity
    parameters: Parameters | None = Field(None, description="binary_data: whether it is wanted as binary.")


class InferenceRequest(BaseModel):
    """Input tensors, and the requested outputs; the value if none is named."""

    id: str | None = None
    inputs: list[InferenceTensor]
    outputs: list[InferenceOutput] | None = None
    parameters: Parameters | None = Field(
        None, description="binary_data_output, dtype, outside, timeout in microseconds."
    )


class InferenceResult(BaseModel):
    """A tensor of a reply."""

    name: Quantity
    shape: list[int]
    datatype: str
    parameters: Parameters | None = None
    data: list[Entry] | None = Field(None, description="Flat, in row-major order; null is not finite.")


class InferenceReply(BaseModel):
    """The outputs."""

    model_name: str
    model_version: Version
    id: str | None = None
    outputs: list[InferenceResult]


class InferenceError(BaseModel):
    """An error in the format of the Open Inference Protocol."""

    error: str


class TensorMetadata(BaseModel):
    """A tensor of a model; a length of −1 varies."""

    name: str
    datatype: str
    shape: list[int]


class ServerMetadata(BaseModel):
    """The server."""

    name: str
    version: str
    extensions: list[str]


class ModelMetadata(BaseModel):
    """A model and its tensors."""

    name: str
    versions: list[Version]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class Ready(BaseModel):
    """Readiness of the server."""

    ready: bool


class ModelReady(BaseModel):
    """Readiness of a model."""

    name: str
    ready: bool


class IndexRequest(BaseModel):
    """A choice of models to list; the body may be empty."""

    ready: bool | None = None


class IndexEntry(BaseModel):
    """A version in the folder."""

    name: str
    version: Version
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str


class ModelStatistics(BaseModel):
    """Statistics of a version in the form of Triton's extension."""

    name: str
    version: Version
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: dict[str, dict[str, int]]


class Statistics(BaseModel):
    """Statistics of several versions."""

    model_stats: list[ModelStatistics]


class RepositoryRequest(BaseModel):
    """An empty object, since models come from the service's own folder. The body may also be empty."""

    parameters: Parameters | None = None
