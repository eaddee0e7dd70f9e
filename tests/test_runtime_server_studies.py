"""Studies over HTTP: upload, look, ask, stream, fetch results, forget."""

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served import Served, png, served

from medmo_edge.dicom_write import write_radiograph
from medmo_edge.images import read_image
from medmo_edge.phantoms import draw

TEXT = "nodule <box>[[100, 200, 300, 600]]</box>"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(f"fake:{TEXT}", max_studies=4, max_kept_bytes=3 << 20) as running:
        yield running


@pytest.fixture(scope="module")
def radiograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dicom") / "DOE^JOHN.dcm"
    write_radiograph(path, draw(5, size=(128, 144), nodule=True).pixels)
    return path


@pytest.fixture
def fresh() -> Iterator[Served]:
    """A server that holds nothing yet."""
    with served("fake:yes", max_studies=4, max_kept_bytes=3 << 20) as running:
        yield running


@pytest.fixture(scope="module")
def study(server: Served, radiograph: Path) -> Iterator[dict[str, Any]]:
    files = [("file", radiograph.read_bytes()), ("file", png(200, 100))]
    reply = server.client.post("/v1/studies", files=files)
    assert reply.status_code == 201, reply.text
    made: dict[str, Any] = reply.json()
    yield made
    server.client.delete(f"/v1/studies/{made['id']}")


def test_an_upload_is_described_without_names(
    server: Served, study: dict[str, Any], radiograph: Path
) -> None:
    first, second = study["images"]
    assert (first["width"], first["height"], first["format"]) == (128, 144, "dicom")
    assert (second["width"], second["height"], second["format"]) == (200, 100, "png")
    assert first["dicom"]["modality"] == "DX" and "DOE" not in json.dumps(study)
    assert server.client.get(f"/v1/studies/{study['id']}").json()["id"] == study["id"]
    listed = server.client.get("/v1/studies").json()["data"]
    assert [each["id"] for each in listed] == [study["id"]]


def test_frames_are_the_pixels_that_the_reader_gives(
    server: Served, study: dict[str, Any], radiograph: Path
) -> None:
    base = f"/v1/studies/{study['id']}/images/0"
    for query, window in (({}, None), ({"window": "1500,900"}, (1500.0, 900.0))):
        shown = np.asarray(
            Image.open(io.BytesIO(server.client.get(base, params=query).content)).convert("RGB")
        )
        assert np.array_equal(shown, read_image(radiograph, window=window).pixels)
    facts = server.client.get(f"{base}/facts", params={"window": "1500,900"}).json()
    assert facts["window"]["center"] == 1500 and "path" not in facts
    resized = Image.open(io.BytesIO(server.client.get(base, params={"view": "model"}).content))
    (picture,) = server.state.session.study(read_image(radiograph)).pictures
    assert np.array_equal(np.asarray(resized.convert("RGB")), picture.resized_HWC)


def test_questions_name_images_and_reuse_them(server: Served, study: dict[str, Any]) -> None:
    ask = f"/v1/studies/{study['id']}/ask"
    both = server.client.post(ask, json={"question": "Where?"}).json()
    assert [image["index"] for image in both["images"]] == [0, 1]
    one = {"question": "Where?", "images": [{"index": 1}]}
    first, again = (server.client.post(ask, json=one).json() for _ in range(2))
    assert first["boxes"] == [{"label": "nodule", "image": 0, "xyxy": [20.0, 20.0, 60.0, 60.0]}]
    assert again["timings"]["reused_tokens"] > first["timings"]["reused_tokens"]
    assert again["timings"]["image_seconds"] == 0
    located = server.client.post(ask, json={"task": "locate", "target": "nodule"}).json()
    assert located["question"] == "Locate the nodule."
    kept = server.client.get(f"/v1/studies/{study['id']}/answers/{first['id']}").json()
    assert kept == first


def test_a_stream_ends_with_the_answer(server: Served, study: dict[str, Any]) -> None:
    from medmo_edge.runtime.server_replies import AnswerReply

    body = {"task": "report", "stream": True, "images": [{"index": 0}]}
    with server.client.stream("POST", f"/v1/studies/{study['id']}/ask", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: ")]
    assert "".join(event["text"] for event in events[:-1]) == TEXT and len(events) > 10
    AnswerReply.model_validate(events[-1]["answer"])


def test_results_carry_the_patient_and_the_box(
    server: Served, study: dict[str, Any], radiograph: Path
) -> None:
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("highdicom", reason="needs the dicom extra")
    body = {"task": "locate", "target": "nodule", "images": [{"index": 0}]}
    answer = server.client.post(f"/v1/studies/{study['id']}/ask", json=body).json()
    base = f"/v1/studies/{study['id']}/answers/{answer['id']}"
    source = pydicom.dcmread(radiograph)
    for kind, modality in (("sr", "SR"), ("gsps", "PR"), ("sc", "OT")):
        reply = server.client.get(f"{base}/{kind}")
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"] == "application/dicom"
        found = pydicom.dcmread(io.BytesIO(reply.content))
        assert found.StudyInstanceUID == source.StudyInstanceUID
        assert found.PatientID == source.PatientID
        assert found.Modality == modality
        again = pydicom.dcmread(io.BytesIO(server.client.get(f"{base}/{kind}").content))
        assert again.SOPInstanceUID == found.SOPInstanceUID
    fhir = server.client.get(f"{base}/fhir").json()
    assert fhir["resourceType"] == "Bundle"
    overlay = Image.open(io.BytesIO(server.client.get(f"{base}/overlay").content))
    assert overlay.size[0] >= 128
    refused = server.client.get(f"{base}/pdf")
    assert refused.status_code == 404


def test_a_picture_gives_no_dicom_and_says_so_without_a_path(
    server: Served, study: dict[str, Any]
) -> None:
    pytest.importorskip("highdicom", reason="needs the dicom extra")
    ask = {"question": "Where?", "images": [{"index": 1}]}
    answer = server.client.post(f"/v1/studies/{study['id']}/ask", json=ask).json()
    reply = server.client.get(f"/v1/studies/{study['id']}/answers/{answer['id']}/sr")
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert "image 1" in message and str(server.state.spool.folder) not in message


def test_deleting_forgets_the_files(fresh: Served) -> None:
    made = fresh.client.post("/v1/studies", files={"file": png()}).json()
    path = f"/v1/studies/{made['id']}"
    folder = fresh.state.spool.folder
    (kept,) = folder.iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    assert fresh.client.delete(path).status_code == 204
    assert not kept.exists() and fresh.client.get(path).status_code == 404
    assert fresh.client.delete(path).status_code == 404


def test_studies_expire(fresh: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fresh.client.post("/v1/studies", files={"file": png()}).json()
    later = time.time() + 3601
    monkeypatch.setattr(time, "time", lambda: later)
    fresh.state.store.expire()
    monkeypatch.undo()
    assert fresh.client.get(f"/v1/studies/{made['id']}").status_code == 404
    assert list(fresh.state.spool.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "either a question or a task"),
        ({"question": "a", "task": "report"}, "either a question or a task"),
        ({"task": "locate"}, "needs a target"),
        ({"task": "report", "target": "x"}, "belongs to task locate"),
        ({"task": "sing"}, "task"),
        ({"question": "a", "images": []}, "at least 1"),
        ({"question": "a", "images": [{"index": 7}]}, "no such image"),
        ({"question": "a", "images": [{"index": 1, "frame": 3}]}, "frame"),
        ({"question": "a", "images": [{"index": 1, "window": "lung"}]}, "window"),
        ({"question": "a", "images": [{"index": 0, "window": "nan,1"}]}, "finite"),
        ({"question": "a", "images": [{"index": 0, "window": "1,-5"}]}, "above 0"),
        ({"question": "a", "images": [{"index": 0}] * 17}, "17 images"),
    ],
)
def test_bad_questions(
    server: Served, study: dict[str, Any], body: dict[str, Any], words: str
) -> None:
    reply = server.client.post(f"/v1/studies/{study['id']}/ask", json=body)
    assert reply.status_code in (400, 404) and words in reply.json()["error"]["message"]


def test_bad_uploads(fresh: Served, radiograph: Path) -> None:
    post = fresh.client.post
    good = radiograph.read_bytes()
    assert post("/v1/studies", content=b"x").status_code == 415
    assert post("/v1/studies", files={"other": good}).status_code == 400
    assert post("/v1/studies", data={"frame": "1"}, files={}).status_code in (400, 415)
    refused = [
        post("/v1/studies", files={"file": b"no picture"}),
        post("/v1/studies", files={"file": b""}),
        post("/v1/studies", files={"file": good[:-100]}),
        post("/v1/studies", files={"file": good}, data={"frame": "9"}),
        post("/v1/studies", files={"file": good}, data={"frame": "-1"}),
        post("/v1/studies", files={"file": good}, data={"window": "abc"}),
        post("/v1/studies", files=[("file", good), ("file", b"broken")]),
    ]
    assert [reply.status_code for reply in refused] == [400] * len(refused)
    assert "file 2" in refused[-1].json()["error"]["message"]
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    assert post("/v1/studies", content=b"--x\r\nbroken", headers=broken).status_code == 400
    assert list(fresh.state.spool.folder.iterdir()) == []


def test_the_store_is_bounded(fresh: Served) -> None:
    made = [fresh.client.post("/v1/studies", files={"file": png()}).json() for _ in range(4)]
    full = fresh.client.post("/v1/studies", files={"file": png()})
    assert full.status_code == 429 and full.headers["retry-after"]
    for study in made:
        fresh.client.delete(f"/v1/studies/{study['id']}")
    noise = np.random.default_rng(0).integers(0, 255, (1200, 1200, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    assert len(buffer.getvalue()) > 3 << 20
    assert fresh.client.post("/v1/studies", files={"file": buffer.getvalue()}).status_code == 413
    assert list(fresh.state.spool.folder.iterdir()) == []
