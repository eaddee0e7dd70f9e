"""Nothing of a patient in logs, metrics and errors: every text of a DICOM file is a sentinel.

Server, node and ``ask`` run as processes of their own; all they print and all they answer is
searched. What an answer may hold of a file is its provenance, by name; errors may hold nothing.
"""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from node_bench import ANSWER, store, tool, until, write_lone_rules
from PIL import Image, PngImagePlugin
from private_sources import found_in, write_private

pytest.importorskip("highdicom", reason="needs the dicom extra")
TOKEN = "a-token-for-the-tests"
# Technique, not identity: PS3.15 table E.1-1 lets all of them stay, but for UIDs, which results
# must refer to and which no error names.
PROVENANCE = frozenset(
    "BodyPartExamined BurnedInAnnotation FrameOfReferenceUID ImageLaterality ImageType Laterality "
    "LossyImageCompression Modality PatientOrientation PatientPosition PresentationIntentType "
    "PresentationLUTShape RescaleType SeriesInstanceUID SOPClassUID SOPInstanceUID "
    "StudyInstanceUID ViewPosition VOILUTFunction".split()
)
ODD: dict[str, tuple[str, ...]] = {
    "plain": (),
    "charset": ("SpecificCharacterSet",),
    "numbers": ("NUMBERS", "PixelAspectRatio", "WindowCenter", "RescaleSlope"),
    "uids": ("StudyInstanceUID", "SeriesInstanceUID"),
    "class": ("SOPClassUID",),
    "colour": ("PhotometricInterpretation",),
    "frames": ("NUMBERS", "NumberOfFrames"),
}

# Threads that leave catch_warnings in another order than they entered it show what it was to hide:
# the worst case is that it hides nothing.
NO_SHELTER = """
import contextlib, warnings
real = warnings.catch_warnings
warnings.catch_warnings = lambda *, record=False, **more: (
    real(record=True, **more) if record else contextlib.nullcontext())
warnings.simplefilter = lambda *_, **__: None
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """In which libraries warn as loudly as they can."""
    folder = tmp_path_factory.mktemp("loud")
    (folder / "sitecustomize.py").write_text(NO_SHELTER)
    more = {"MEDMO_EDGE_TOKEN": TOKEN, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(folder)}
    return {**os.environ, **more, "PYTHONWARNINGS": "always"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Readable files, unreadable ones and a damaged one; UIDs 1.2.1 and so on."""
    folder = tmp_path_factory.mktemp("private")
    made = {
        name: write_private(folder / f"{name}.dcm", uid=f"1.2.{number}", odd=odd)
        for number, (name, odd) in enumerate(ODD.items(), 1)
    }
    content = made["plain"].read_bytes()
    made["cut"] = folder / "cut.dcm"
    made["cut"].write_bytes(content[: len(content) // 3])
    place = content.index(b"Zqxj^00100010") - 2
    made["length"] = folder / "length.dcm"
    made["length"].write_bytes(content[:place] + b"\xff\x7f" + content[place + 2 :])
    return made


def test_the_sentinels_are_found_where_they_belong(sources: dict[str, Path]) -> None:
    """The search itself: the file and its results hold the patient."""
    from medmo_edge.images import read_image
    from medmo_edge.runtime.results import ResultOptions, make_fhir, make_sr
    from medmo_edge.runtime.session import load

    assert len(found_in(sources["plain"].read_bytes().decode("latin-1"))) > 1500
    for name in ("plain", "numbers"):
        frame = read_image(sources[name])
        with load(ANSWER) as session:
            answer = session.ask(frame, "Where?")
        for make in (make_sr, make_fhir):
            result = make([frame], answer, ResultOptions()).decode("latin-1")
            assert "PatientID" in found_in(result)


@pytest.fixture
def server(tmp_path: Path, environment: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """Address of a server and the file with all that it prints."""
    pytest.importorskip("uvicorn", reason="needs the serve extra")
    command = [sys.executable, "-m", "medmo_edge", "serve", ANSWER, "--port", "0"]
    printed = tmp_path / "printed"
    with printed.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            until(lambda: "Stop with" in printed.read_text())
            (base,) = re.findall(r"api: (\S+)/v1", printed.read_text())
            yield base, printed
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()


def _private_png() -> bytes:
    """A picture that cannot be read, with texts that an error could quote."""
    text = PngImagePlugin.PngInfo()
    for key in ("Title", "Author", "Comment"):
        text.add_text(key, "Zqxj^00100010" * 50)
    buffer = io.BytesIO()
    Image.new("L", (64, 64)).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()[:700]


def test_a_server_says_nothing(server: tuple[str, Path], sources: dict[str, Path]) -> None:
    httpx2 = pytest.importorskip("httpx2", reason="comes with the openai client")
    base, printed = server
    headers = {"Authorization": f"Bearer {TOKEN}"}
    errors: list[str] = []
    good: list[str] = []

    with httpx2.Client(base_url=base, headers=headers, timeout=60) as client:

        def keep(reply: Any) -> Any:
            binary = reply.headers.get("content-type", "").startswith(("image/", "application/d"))
            (errors if reply.status_code >= 400 else good).append("" if binary else reply.text)
            return reply

        for name, path in sources.items():
            files = {"file": (f"Zqxj^{name}.dcm", path.read_bytes())}
            made = keep(client.post("/v1/studies", files=files))
            url = base64.b64encode(path.read_bytes()).decode()
            part = {
                "type": "image_url",
                "image_url": {"url": f"data:application/dicom;base64,{url}"},
            }
            keep(client.post("/v1/chat/completions", json=_chat([part])))
            if made.status_code == 201:
                _visit(client, made.json()["id"], keep)
        keep(client.post("/v1/studies", files={"file": ("Zqxj^.png", _private_png())}))
        metrics = client.get("/metrics").text
    assert found_in(printed.read_text()) == set()
    assert found_in(metrics) == set() and found_in("".join(errors)) == set()
    assert len(errors) >= 8 and found_in("".join(good)) <= PROVENANCE
    assert "BodyPartExamined" in found_in("".join(good))


def _chat(parts: list[dict[str, Any]]) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": "Where?"}]
    return {"model": "fake", "messages": [{"role": "user", "content": content}]}


def _visit(client: Any, study: str, keep: Callable[[Any], Any]) -> None:
    """Everything that can be asked about a study, with success or not."""
    base = f"/v1/studies/{study}"
    for query in ("?window=lung", "?window=nonsense", "?frame=9"):
        keep(client.get(f"{base}/images/0/facts{query}"))
    answer = keep(client.post(f"{base}/ask", json={"question": "Where?"})).json()["id"]
    for kind in ("sr", "gsps", "overlay", "fhir"):
        reply = client.get(f"{base}/answers/{answer}/{kind}")
        if kind != "fhir" or reply.status_code >= 400:
            keep(reply)  # a report itself holds the patient


def test_a_node_says_nothing(
    sources: dict[str, Path], tmp_path: Path, environment: dict[str, str]
) -> None:
    pytest.importorskip("pynetdicom", reason="the node needs the dicom extra")
    tool("storescu")
    port = write_lone_rules(tmp_path)
    run = [sys.executable, "-m", "medmo_edge", "node"]
    printed = tmp_path / "printed"
    with printed.open("wb") as file:
        command = [*run, ANSWER, "--config", "rules.toml"]
        node = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file, env=environment)
        try:
            until(lambda: " listening " in printed.read_text())
            for path in sources.values():
                store(port, path)
            stored = printed.read_text().count(" stored ")
            until(
                lambda: len(re.findall("Z (answered|quarantined)", printed.read_text())) == stored
            )
            command = [*run, "status", "--config", "rules.toml", "--json"]
            status = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            node.send_signal(signal.SIGTERM)
            assert node.wait(30) == 0
        finally:
            node.kill()
            node.wait()
    states = json.loads(status.stdout)["instances"]
    assert states["answered"] >= 3 and states["quarantined"] >= 2
    assert found_in(printed.read_text() + status.stdout + status.stderr) == set()
    results = b"".join(path.read_bytes() for path in (tmp_path / "spool/results").iterdir())
    assert "PatientName" in found_in(results.decode("latin-1"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "numbers", "uids"])
def test_ask_says_no_more_than_the_provenance(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    kinds = [part for kind in ("sr", "gsps", "sc", "fhir") for part in (f"--{kind}", f"{kind}.out")]
    command = [sys.executable, "-m", "medmo_edge", "ask", ANSWER, str(sources[name]), "Where?"]
    run = subprocess.run([*command, "--json", *kinds], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == (2 if name == "uids" else 0), run.stderr
    assert found_in(run.stderr) == set() and found_in(run.stdout) <= PROVENANCE


LOUD = """
import logging, threading, warnings
from medmo_edge.runtime.quiet import silence_libraries
import pydicom, pynetdicom, PIL.Image

told = []
silence_libraries(lambda where, kind: told.append((where, kind)))

class Loud:
    def __del__(self):
        raise ValueError("Zqxj^00100010")

def fail():
    raise KeyError("Zqxj^00100010")

warnings.resetwarnings()
warnings.warn("Zqxj^00100010")
for name in "pydicom pynetdicom pynetdicom.acse PIL.PngImagePlugin asyncio uvicorn".split():
    logging.getLogger(name).critical("Zqxj^00100010")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
del thread
Loud()
print(told)
"""


def test_what_nobody_caught_is_told_by_its_type() -> None:
    run = subprocess.run([sys.executable, "-c", LOUD], capture_output=True, text=True, check=True)
    assert run.stdout == "[('thread', 'KeyError'), ('destructor', 'ValueError')]\n"
    assert run.stderr == ""
