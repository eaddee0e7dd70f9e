"""Choosing a backend: every one has a reason, and doctor shows them as they are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from medmo_edge.errors import ArtifactError, BackendUnavailable, UsageError
from medmo_edge.runtime import doctor as doctor_module
from medmo_edge.runtime import fake, llamacpp, ort, ort_native, trt
from medmo_edge.runtime.backends import BACKENDS, choose, open_backend
from medmo_edge.runtime.device import probe
from medmo_edge.runtime.doctor import doctor, format_findings


def test_without_an_artifact_every_backend_is_judged_by_its_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (llamacpp, ort, trt):
        monkeypatch.setattr(module, "unavailable", lambda: "it is not installed")
    choices = choose(None, probe())
    assert {choice.name for choice in choices} == set(BACKENDS)
    assert [choice.name for choice in choices] == ["fake", "trt", "ort", "llamacpp"]
    assert choices[1].obstacle == choices[1].reason == "it is not installed"


def test_an_artifact_is_opened_by_the_backend_that_reads_it() -> None:
    manifest = fake.artifact("x")
    choices = choose(manifest, probe())
    assert (choices[0].name, choices[0].obstacle) == ("fake", None)
    assert "cannot read fake artifacts" in choices[1].reason
    assert open_backend(manifest, probe()).name == "fake"


def test_when_none_can_run_the_error_names_every_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest = replace(fake.artifact("x"), target="gguf-f16", backend="llamacpp")
    monkeypatch.setattr(llamacpp, "unavailable", lambda: "it is not installed")
    with pytest.raises(BackendUnavailable) as caught:
        open_backend(manifest, probe())
    assert caught.value.reasons == {
        "trt": "cannot read gguf-f16 artifacts (llamacpp can)",
        "ort": "cannot read gguf-f16 artifacts (llamacpp can)",
        "llamacpp": "it is not installed",
        "fake": "cannot read gguf-f16 artifacts (llamacpp can)",
    }
    assert "\n" not in str(caught.value)


def test_asking_for_a_backend_by_name() -> None:
    assert open_backend(fake.artifact("x"), probe(), "fake").name == "fake"
    with pytest.raises(BackendUnavailable, match="--backend llamacpp was asked for"):
        open_backend(fake.artifact("x"), probe(), "llamacpp")
    with pytest.raises(UsageError, match="use auto, trt, ort, llamacpp, fake"):
        choose(None, probe(), "coreml")


def test_doctor_without_artifact() -> None:
    findings = json.loads(json.dumps(doctor()))
    assert findings["artifact"] is None
    assert {backend["name"] for backend in findings["backends"]} == set(BACKENDS)
    assert findings["settings"]["HF_HUB_OFFLINE"] == "1"
    assert findings["device"]["cores"] >= 1
    lines = format_findings(findings).splitlines()
    assert [line for line in lines if line.startswith("backend fake") and "yes: " in line]


def test_doctor_with_an_artifact(tiny_artifact: Path) -> None:
    findings = doctor(tiny_artifact)
    assert findings["artifact"]["target"] == "gguf-f16"
    assert findings["artifact"]["certificate"] is None
    reasons = {backend["name"]: backend["reason"] for backend in findings["backends"]}
    assert reasons["fake"] == "cannot read gguf-f16 artifacts (llamacpp can)"
    assert str(tiny_artifact) in format_findings(findings)
    with pytest.raises(ArtifactError):
        doctor(tiny_artifact / "absent")


def test_doctor_warns_about_what_goes_wrong_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": "1.20", "onnxruntime-gpu": "1.20", "numpy": None}
    monkeypatch.setattr(doctor_module, "library_versions", lambda: both)
    monkeypatch.setattr(ort_native, "versions", lambda: both)
    monkeypatch.setattr(doctor_module, "probe", lambda: replace(probe(), features=()))
    monkeypatch.setenv("GOMP_SPINCOUNT", "100")
    warnings = doctor()["warnings"]
    assert len(warnings) == 3
    assert "both installed" in warnings[0]
    assert "GOMP_SPINCOUNT" in warnings[1]
    assert "AVX2" in warnings[2]
    assert format_findings(doctor()).count("\nwarning") == 3
