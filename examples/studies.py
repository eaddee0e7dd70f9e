"""Ask a running ``medmo-edge serve`` about a file, without any dependency.

    MEDMO_EDGE_TOKEN=... python examples/studies.py chest.dcm nodule

Uploads the file, asks where the finding is, prints the words as they come and the boxes in source
pixels, saves the DICOM structured report beside the file, and forgets the study.
"""

import http.client
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HOST, PORT = "127.0.0.1", int(os.environ.get("MEDMO_EDGE_PORT", "8000"))
TOKEN = os.environ["MEDMO_EDGE_TOKEN"]


def call(
    method: str, path: str, body: bytes = b"", kind: str = "application/json"
) -> http.client.HTTPResponse:
    """One request; a refusal ends the program with the server's words."""
    connection = http.client.HTTPConnection(HOST, PORT, timeout=600)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": kind}
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    if reply.status >= 400:
        sys.exit(json.loads(reply.read())["error"]["message"])
    return reply


def upload(path: Path) -> str:
    """A new study of one file; returns its id."""
    head = b'--edge\r\nContent-Disposition: form-data; name="file"; filename="image"\r\n\r\n'
    body = head + path.read_bytes() + b"\r\n--edge--\r\n"
    reply = call("POST", "/v1/studies", body, "multipart/form-data; boundary=edge")
    return str(json.loads(reply.read())["id"])


def ask(study: str, question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a streamed answer."""
    body = json.dumps({**question, "stream": True}).encode()
    for line in call("POST", f"/v1/studies/{study}/ask", body):
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def main() -> None:
    """Upload, ask, print, save, forget."""
    path, target = Path(sys.argv[1]), sys.argv[2]
    study = upload(path)
    try:
        for event in ask(study, {"task": "locate", "target": target}):
            if "error" in event:
                sys.exit(event["error"]["message"])
            if event["type"] == "text":
                print(event["text"], end="", flush=True)
            if event["type"] == "answer":
                answer = event["answer"]
        print()
        for box in answer["boxes"]:
            print(box["label"], box["xyxy"])
        if answer["source"][0]["format"] == "dicom":
            report = call("GET", f"/v1/studies/{study}/answers/{answer['id']}/sr").read()
            path.with_suffix(".sr.dcm").write_bytes(report)
    finally:
        call("DELETE", f"/v1/studies/{study}")


if __name__ == "__main__":
    main()
