"""The OpenAPI document is true: schemathesis makes requests up from it and checks the replies."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from served import TOKEN, Served, png, served

schemathesis = pytest.importorskip("schemathesis", reason="makes requests up")
pytest.importorskip("pydantic", reason="needs the serve extra")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served('fake:{"yes": 1}') as running:
        yield running


def _operations() -> list[Any]:
    from medmo_edge.runtime.server_openapi import document

    schema = schemathesis.openapi.from_dict(document())
    return [each.ok() for each in schema.get_all_operations()]


CHECKED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)
OPERATIONS = {operation.label: operation for operation in _operations()}


@pytest.mark.parametrize("label", OPERATIONS)
def test_replies_are_as_described(server: Served, label: str) -> None:
    known = [schemathesis.checks.CHECKS.get_one(name) for name in CHECKED]
    study = server.client.post("/v1/studies", files={"file": png()}).json()["id"]

    @settings(max_examples=6, suppress_health_check=list(HealthCheck), deadline=None)
    @given(case=OPERATIONS[label].as_strategy())
    def hold(case: Any) -> None:
        if "study" in (case.path_parameters or {}):
            case.path_parameters["study"] = study  # else nearly every request is a 404
        reply = case.call(base_url=server.url, headers={"Authorization": f"Bearer {TOKEN}"})
        case.validate_response(reply, checks=known)

    if not label.startswith("DELETE"):
        hold()
    server.client.delete(f"/v1/studies/{study}")


def test_the_document_is_served_and_names_every_route(server: Served) -> None:
    from starlette.routing import Route

    from medmo_edge.runtime.server_app import build

    document = server.client.get("/openapi.json").json()
    routes = build(server.state)._app.routes  # type: ignore[attr-defined]
    paths = {route.path for route in routes if isinstance(route, Route)}
    page = {path for path in paths if path == "/" or path.startswith("/viewer")}
    assert set(document["paths"]) == paths - page
    assert document["info"]["description"].startswith("Research use only")
