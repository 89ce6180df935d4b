"""The OpenAPI schema is true: requests made from it, well-formed and not, get answers that it describes."""

from __future__ import annotations

from typing import Any

import pytest

from amlora_dist.serving.bank import ServedBank
from tests.serving.servers import Running, running

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed (extra dev)")


@pytest.fixture(scope="module")
def quick(model: Any) -> Any:
    """A server whose answers are short: what is asked is drawn at random."""
    with running(ServedBank(model, "words"), max_new_tokens=8) as one:
        yield one


@pytest.fixture(scope="module")
def schema(quick: Running) -> Any:
    return schemathesis.openapi.from_url(f"{quick.url}/openapi.json")


def test_the_schema_describes_what_there_is(server: Running) -> None:
    found = server.client.get("/openapi.json").json()
    assert set(found["paths"]) == {
        "/", "/healthz", "/metrics", "/v1/models", "/v1/models/{model}", "/v1/completions", "/v1/chat/completions",
        "/v1/classifications",
    }  # fmt: skip
    assert "422" not in str(found) and "HTTPValidationError" not in str(found)
    assert "text/event-stream" in found["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]


@pytest.mark.integration
@pytest.mark.parametrize("examples", [30, pytest.param(200, marks=[pytest.mark.crash, pytest.mark.timeout(1800)])])
def test_no_request_made_from_the_schema_meets_a_fault_or_an_answer_it_does_not_describe(
    schema: Any, quick: Running, examples: int
) -> None:
    """``examples`` well-formed and as many malformed requests to each of the three paths that take a body."""
    from hypothesis import HealthCheck, given, settings
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    sent = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        # What takes nothing but its path cannot be asked wrongly.
        modes = [GenerationMode.POSITIVE, *([GenerationMode.NEGATIVE] if operation.body else [])]
        for mode in modes:

            @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
                      suppress_health_check=list(HealthCheck))  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                nonlocal sent
                sent += 1
                # Whether a text fits depends on the bank's tokens, which no schema can say: 400 is always possible.
                case.call_and_validate(timeout=60, excluded_checks=[positive_data_acceptance])

            ask()
    assert sent > 6 * examples
    assert quick.client.get("/healthz").json()["status"] == "ok"
