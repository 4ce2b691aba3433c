"""The methods of a remote model, once for :class:`Model` and :class:`AsyncModel`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, Generic, Self, TypedDict, TypeVar, Unpack

import numpy.typing as npt

from hessquik_client import progress as bars
from hessquik_client.domain import Outside
from hessquik_client.messages import Answer, Array, ArrayLike, Question, ask
from hessquik_client.steps import Conversation, RetryPolicy, Steps

if TYPE_CHECKING:
    from hessquik_client.local import LocalModel

__all__ = ["AsyncModel", "Model", "Options", "RemoteModel"]

ArrayT = TypeVar("ArrayT")
AnswerT = TypeVar("AnswerT")
FactsT = TypeVar("FactsT")


class Options(TypedDict, total=False):
    """The options that all methods share.

    Attributes:
        weights: Weights of the outputs, (m,) or (n, m), to differentiate Σ_j weights_j f_j; m becomes 1.
        dtype: Dtype to compute in, ``float32`` or ``float64``; the model's own if not given.
        outside: ``allow`` points outside the model's bounds, or ``refuse`` them with
            :class:`~hessquik_client.errors.OutsideDomain`; the service's setting if not given.
        progress: Whether to show a progress bar for the parts of a split batch; needs ``rich``.
    """

    weights: ArrayLike | None
    dtype: npt.DTypeLike | None
    outside: Outside | None
    progress: bool


class RemoteModel(Generic[ArrayT, AnswerT, FactsT]):
    """One model of a service: exact derivatives as functions of points.

    Points are one point, shape (d,), or a batch, shape (n, d), as a list, numpy array or torch tensor. Results are
    numpy arrays, without the n axis for one point. A batch over the service's limits is split by points and by
    directions, and its parts are sent concurrently.

    Methods take the keywords of :class:`Options`. They raise :class:`~hessquik_client.errors.ClientError` if the
    service does not answer, with one subclass per error code; ``TypeError`` for an argument that is not an array of
    numbers, ``ValueError`` for a wrong number of axes or rows, and ``ImportError`` for a progress bar without
    ``rich``.
    """

    def __init__(
        self,
        run: Callable[[Steps[Any]], Any],
        url: str,
        name: str,
        version: str | int | None,
        policy: RetryPolicy,
    ) -> None:
        """Create the model; nothing is requested yet."""
        self._options: Options = {}
        self._run = run
        self._url = url
        self._conversation = Conversation(name, None if version is None else str(version), policy)

    def __repr__(self) -> str:
        name, version, facts = self._conversation.model, self._conversation.version, self._conversation.facts
        known = "" if facts is None else f", d={facts.d}, m={facts.m}, dtype={facts.dtype}"
        return f"{type(self).__name__}({name!r}, version={version!r}{known}, url={self._url!r})"

    def with_options(self, **options: Unpack[Options]) -> Self:
        """Return the same model with other defaults for the options of its calls.

        Examples:
            ``careful = model.with_options(outside="refuse")``
        """
        _check_options(options)
        other = copy(self)
        other._options = {**self._options, **options}
        return other

    def describe(self) -> FactsT:
        """Return the service's description of the model: sizes, dtype, metadata, architecture, limits."""
        return self._run(self._conversation.describe())  # type: ignore[no-any-return]

    def value(self, x: ArrayLike, **options: Unpack[Options]) -> ArrayT:
        """Return f, shape (n, m)."""
        return self._quantity("value", x, None, options)

    def gradient(self, x: ArrayLike, **options: Unpack[Options]) -> ArrayT:
        """Return ∂f_j/∂x_a, shape (n, d, m): inputs first, the transpose of the usual Jacobian."""
        return self._quantity("gradient", x, None, options)

    def hessian(self, x: ArrayLike, **options: Unpack[Options]) -> ArrayT:
        """Return ∂²f_j/∂x_a∂x_b, shape (n, d, d, m)."""
        return self._quantity("hessian", x, None, options)

    def laplacian(self, x: ArrayLike, **options: Unpack[Options]) -> ArrayT:
        """Return Σ_a ∂²f_j/∂x_a², shape (n, m)."""
        return self._quantity("laplacian", x, None, options)

    def hessian_diagonal(self, x: ArrayLike, **options: Unpack[Options]) -> ArrayT:
        """Return ∂²f_j/∂x_a², shape (n, d, m)."""
        return self._quantity("hessian_diagonal", x, None, options)

    def hessian_packed(self, x: ArrayLike, **options: Unpack[Options]) -> ArrayT:
        """Return the lower triangle of the Hessian, row by row, shape (n, d(d+1)/2, m)."""
        return self._quantity("hessian_packed", x, None, options)

    def domain_distance(self, x: ArrayLike, **options: Unpack[Options]) -> ArrayT:
        """Return the largest excess over a bound in units of the input's range, 0 within the bounds; shape (n,)."""
        return self._quantity("domain_distance", x, None, options)

    def value_std(self, x: ArrayLike, **options: Unpack[Options]) -> ArrayT:
        """Return the standard deviation of f over an ensemble's members, shape (n, m)."""
        return self._quantity("value_std", x, None, options)

    def gradient_std(self, x: ArrayLike, **options: Unpack[Options]) -> ArrayT:
        """Return the standard deviations of the gradient's entries over an ensemble's members, shape (n, d, m)."""
        return self._quantity("gradient_std", x, None, options)

    def hessian_std(self, x: ArrayLike, **options: Unpack[Options]) -> ArrayT:
        """Return the standard deviations of the Hessian's entries over an ensemble's members, shape (n, d, d, m)."""
        return self._quantity("hessian_std", x, None, options)

    def jvp(self, x: ArrayLike, directions: ArrayLike, **options: Unpack[Options]) -> ArrayT:
        """Return the derivatives Σ_a v_a ∂f_j/∂x_a along directions v, (k, d) or (n, k, d); shape (n, k, m)."""
        return self._quantity("jvp", x, directions, options)

    def hvp(self, x: ArrayLike, directions: ArrayLike, **options: Unpack[Options]) -> ArrayT:
        """Return the products Σ_b ∂²f_j/∂x_a∂x_b v_b with directions v, (k, d) or (n, k, d); shape (n, k, d, m)."""
        return self._quantity("hvp", x, directions, options)

    def curvature(self, x: ArrayLike, directions: ArrayLike, **options: Unpack[Options]) -> ArrayT:
        """Return Σ_ab v_a ∂²f_j/∂x_a∂x_b v_b along directions v, (k, d) or (n, k, d); shape (n, k, m)."""
        return self._quantity("curvature", x, directions, options)

    def evaluate(
        self,
        x: ArrayLike,
        quantities: Sequence[str] = ("value",),
        *,
        directions: ArrayLike | None = None,
        **options: Unpack[Options],
    ) -> AnswerT:
        """Return any set of quantities, computed in one pass.

        Args:
            x: Points, (d,) or (n, d).
            quantities: Names out of :data:`hessquik_client.quantities.QUANTITIES`.
            directions: Directions (k, d) or (n, k, d), for jvp, hvp and curvature.
            options: See :class:`Options`.
        """
        question, shows_progress = _question(x, quantities, directions, {**self._options, **options})
        return self._run(self._conversation.evaluate(question, shows_progress))  # type: ignore[no-any-return]

    def _quantity(self, name: str, x: ArrayLike, directions: ArrayLike | None, options: Options) -> ArrayT:
        question, shows_progress = _question(x, [name], directions, {**self._options, **options})
        return self._run(self._conversation.quantity(question, shows_progress))  # type: ignore[no-any-return]


def _question(
    x: ArrayLike, quantities: Sequence[str], directions: ArrayLike | None, options: Options
) -> tuple[Question, bool]:
    """Return the checked arguments of a call, and whether to show a progress bar."""
    _check_options(options)
    shows_progress = options.get("progress", False)
    bars.check(shows_progress)
    weights, dtype, outside = options.get("weights"), options.get("dtype"), options.get("outside")
    return ask(x, quantities, weights, directions, dtype, outside), shows_progress


def _check_options(options: Options) -> None:
    if unknown := options.keys() - Options.__annotations__:
        raise TypeError(f"expected the options {', '.join(Options.__annotations__)}, got {', '.join(unknown)}")


class Model(RemoteModel[Array, Answer, dict[str, Any]]):
    """A model whose methods block until there is an answer; see :class:`RemoteModel`."""

    def local(self, device: str = "cpu", threads: int = 1) -> LocalModel:
        """Fetch the served file, and return a model with the same methods that computes in this process.

        Args:
            device: Device to compute on, as in torch.
            threads: Threads that share a large call, on a CPU.

        Raises:
            ImportError: torch is not installed.
            ClientError: the file cannot be fetched.
        """
        kind = _local_model()
        document, data = self._run(self._conversation.fetch())
        facts = self._conversation.facts
        assert facts is not None
        return kind(self._conversation.model, self._url, document, data, facts, device, threads)


class AsyncModel(RemoteModel[Awaitable[Array], Awaitable[Answer], Awaitable[dict[str, Any]]]):
    """A model whose methods are awaited; see :class:`RemoteModel`."""

    async def local(self, device: str = "cpu", threads: int = 1) -> LocalModel:
        """Return a local model, see :meth:`Model.local`; its methods block and are not awaited."""
        kind = _local_model()
        document, data = await self._run(self._conversation.fetch())
        facts = self._conversation.facts
        assert facts is not None
        return kind(self._conversation.model, self._url, document, data, facts, device, threads)


def _local_model() -> type[LocalModel]:
    """Return the class of local models.

    Raises:
        ImportError: torch is not installed.
    """
    try:
        from hessquik_client.local import LocalModel
    except ModuleNotFoundError as error:
        raise ImportError(f"local: expected {error.name}; pip install 'hessquik-service[local]'") from None
    return LocalModel
