"""The whole OpenAPI description, thrown at the service: no server error, no answer that is not described."""

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


EXAMPLES = 8  # of each operation and kind of data


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_error_and_no_undocumented_answer(address: str, mode: GenerationMode) -> None:
    description = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [found.ok() for found in description.get_all_operations()]
    assert len(operations) > 20
    failures: list[Exception] = []
    for operation in operations:

        @hypothesis.given(operation.as_strategy(generation_mode=mode))
        @hypothesis.settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def answers(case: schemathesis.Case) -> None:
            case.call_and_validate(base_url=address, checks=CHECKS)

        try:
            answers()
        except hypothesis.errors.Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE  # an operation that takes nothing can be sent nothing wrong
        except Exception as error:
            failures.append(error)
    if failures:
        raise ExceptionGroup(f"{len(failures)} operations", failures)
