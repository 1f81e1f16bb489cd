"""Whatever the description allows, and much that it does not: never a 5xx, always the form of answer that is
described.
"""

from __future__ import annotations

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance
from served import Served
from synthetic import small_chain

from tightfit.planner.service.wire import inputs, schema


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contract")
    (folder / "root").mkdir()
    service = Served(folder / "data", "--root", str(folder / "root"), "--workers", "1").start()
    service.identity = service.upload(small_chain(3, layers=2))
    yield service
    service.stop()
    errors = [line for line in service.lines() if line["level"] == "error"]
    assert not errors, json.dumps(errors, indent=2)


@pytest.fixture(scope="module")
def described(served):
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_the_contract_holds(described, served, mode):
    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) > 20
    asked = 0
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not list(operation.iter_parameters()) and not operation.body:
            continue

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=8,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
        )
        def ask(case):
            nonlocal asked
            asked += 1
            if "identity" in case.path_parameters and asked % 3 == 0:
                case.path_parameters["identity"] = served.identity
            answer = case.call(timeout=60)
            case.validate_response(
                answer, checks=[not_a_server_error, response_schema_conformance, content_type_conformance]
            )
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"], answer.text

        ask()
    assert asked > 100


def test_the_examples_of_the_description_are_what_is_asked_for(described, served):
    """Every example is understood: refused only for what it names, never for its form."""
    schemas = json.loads(json.dumps(described.raw_schema))["components"]["schemas"]
    requests = {
        "PlanRequest": "plans",
        "ComparisonRequest": "comparisons",
        "RunRequest": "runs",
        "PreviewRequest": "previews",
        "AnswerRequest": "answers",
    }
    for name, path in requests.items():
        for example in schemas[name]["examples"]:
            answer = served.http.post(f"/v1/{path}", json=example)
            assert answer.status_code == 404, answer.text
    profile = schemas["ProfileRequest"]["examples"][0]
    assert served.http.post("/v1/profiles", json=profile).json()["error"]["fields"][0]["field"] == "body.path"


def test_every_answer_is_described_with_an_example(described):
    """Answers have a type and an example of it, errors have the one form; examples are what their type says."""
    raw = described.raw_schema
    types = {**vars(schema), **vars(inputs)}
    assert raw["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    seen = 0
    for path, methods in raw["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], (path, method)
            assert "default" in operation["responses"]
            for status, answer in operation["responses"].items():
                assert answer["description"], (path, status)
                if status in {"204", "304"}:
                    continue
                for media, told in answer["content"].items():
                    if media in {"application/x-tar", "application/octet-stream"}:
                        continue
                    name = told["schema"].get("$ref", "").rpartition("/")[2]
                    examples = raw["components"]["schemas"][name].get("examples", []) if name else []
                    examples = [*examples, *([told["example"]] if "example" in told else [])]
                    assert examples, (path, method, status)
                    seen += 1
                    if not status.startswith("2"):
                        assert name == "ErrorAnswer", (path, method, status)
                    for example in examples if name else []:
                        types[name].model_validate(example)
    assert seen > 100
