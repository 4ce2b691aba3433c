"""Errors: one definition, bodies that say the same as the classes, and values that keep no traceback alive."""

from __future__ import annotations

import gc
import json
import weakref

import pytest

from hessquik_client import errors
from hessquik_client.errors import BY_CODE, Failure, InvalidInput, Overloaded, ServiceError, Unauthorized

KINDS = [kind for kind in ServiceError.__subclasses__() if kind.code]


class Array:
    """A stand-in for an object in a frame of a failed request."""


def fail() -> tuple[ServiceError, weakref.ref[Array]]:
    """Raise and catch an error in a frame that holds an array."""
    array = Array()
    try:
        raise InvalidInput.of("inputs", "2 numbers", "3", row=7)
    except ServiceError as error:
        return error, weakref.ref(array)


def test_failure_keeps_nothing_of_the_frames_alive() -> None:
    gc.disable()
    try:
        error, array = fail()
        failure = error.failure
        # The control: the exception itself holds the frame that raised it.
        assert array() is not None
        del error
        assert array() is None
    finally:
        gc.enable()
    assert isinstance(failure, Failure)


def test_failure_builds_a_fresh_exception_each_time() -> None:
    failure = fail()[0].failure
    first, second = failure.error(), failure.error()
    assert first is not second
    assert type(first) is InvalidInput
    assert (first.__traceback__, first.__cause__, first.__context__) == (None, None, None)
    assert (first.detail, str(first)) == ("inputs, row 7: expected 2 numbers, got 3",) * 2
    assert first.extra == {"field": "inputs", "expected": "2 numbers", "got": "3", "row": 7}
    with pytest.raises(InvalidInput):
        raise second
    assert failure.error().__traceback__ is None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_body_says_what_the_class_says(kind: type[ServiceError]) -> None:
    problem = json.loads(kind("wörds", limit_bytes=3).problem("an-id"))
    assert problem == {
        "type": f"urn:hessquik:error:{kind.code}",
        "title": kind.title,
        "status": kind.status,
        "detail": "wörds",
        "code": kind.code,
        "request_id": "an-id",
        "limit_bytes": 3,
    }
    assert kind.__doc__


def test_every_code_and_name_is_used_once() -> None:
    assert len({kind.code for kind in KINDS}) == len({kind.title for kind in KINDS}) == len(KINDS)
    assert {kind.__name__ for kind in KINDS} <= set(errors.__all__)
    assert all(BY_CODE[kind.code] is kind for kind in KINDS if kind.code not in {"client_gone", "invalid_output"})


def test_an_instance_may_differ_from_its_class() -> None:
    error = Overloaded("x", status=529, retry_after_s=2.5, request_id="id")
    assert (error.status, error.retry_after_s, error.request_id) == (529, 2.5, "id")
    assert (Overloaded.status, Overloaded.retry_after_s) == (503, 1)


def test_headers_belong_to_their_errors() -> None:
    assert Overloaded("x").headers() == [(b"retry-after", b"1")]
    assert Unauthorized("x").headers() == [(b"www-authenticate", b"Bearer")]
    assert InvalidInput("x").headers() == []
