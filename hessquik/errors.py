"""The errors of the engine.

    HessQuikError
    ├── ShapeError         an input's shape or dtype does not fit the network (also a ValueError)
    ├── CompositionError   two neighbouring layers do not fit together        (also a ValueError)
    ├── ArchitectureError  a description of a network is malformed            (also a ValueError)
    ├── FormatError        a file is not a saved network                      (also a ValueError)
    ├── UnsupportedError   a network of another library cannot be exact here  (also a ValueError)
    ├── TraceError         a function cannot be traced into a graph           (also a TypeError)
    ├── DerivativeError    a network's derivatives disagree with a reference  (also a ValueError)
    └── OrderError         backward() without the forward() it belongs to     (also a RuntimeError)

Every message says what is wrong and what would be right.
"""

__all__ = [
    "ArchitectureError",
    "CompositionError",
    "DerivativeError",
    "FormatError",
    "HessQuikError",
    "OrderError",
    "ShapeError",
    "TraceError",
    "UnsupportedError",
]


class HessQuikError(Exception):
    """Base of all errors that the engine raises on purpose."""


class ShapeError(HessQuikError, ValueError):
    """An input's shape or dtype does not fit the network."""


class CompositionError(HessQuikError, ValueError):
    """Two neighbouring layers do not fit together."""


class ArchitectureError(HessQuikError, ValueError):
    """A description of a network is malformed."""


class FormatError(HessQuikError, ValueError):
    """A file is not a saved network, or a network cannot be saved."""


class UnsupportedError(HessQuikError, ValueError):
    """A network of another library cannot be exact here; the message names the node."""


class TraceError(HessQuikError, TypeError):
    """A function cannot be traced into a graph."""


class DerivativeError(HessQuikError, ValueError):
    """A network's derivatives disagree with a reference."""


class OrderError(HessQuikError, RuntimeError):
    """``backward()`` was called without the ``forward()`` it belongs to."""
