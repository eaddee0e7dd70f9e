"""Sending one result object to one destination: C-STORE or STOW-RS, and what came of it.

A result that the destination already has counts as delivered: it got it before a crash. Redirects
are not followed and no answer of a peer is quoted anywhere. When to try again is not decided here.
"""

import contextlib
import http.client
import json
import os
import secrets
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medmo_edge.runtime.node_config import Destination

_DUPLICATE = (0x0111, 0xB007)  # already there; there, but not as sent (coerced)
_MAX_REPLY = 2**20
_OK = (200, 202)


@dataclass(frozen=True, slots=True)
class Sent:
    """What came of one file: delivered, or why not; ``reachable`` is False when nobody answered."""

    delivered: bool
    reason: str = ""
    reachable: bool = True


def send_files(destination: Destination, files: Sequence[Path]) -> Iterator[Sent]:
    """Send ``files`` in order; ends early when the destination is not reachable."""
    sender = _store if destination.kind == "c-store" else _stow
    yield from sender(destination, files)


def _store(destination: Destination, files: Sequence[Path]) -> Iterator[Sent]:
    from pydicom import dcmread

    classes = {str(dcmread(path, specific_tags=["SOPClassUID"]).SOPClassUID) for path in files}
    association = _associate(destination, classes)
    if not association.is_established:
        rejected = association.is_rejected
        yield Sent(False, "association rejected" if rejected else "not reachable", reachable=False)
        return
    try:
        for path in files:
            sent = _store_one(association, dcmread(path))
            yield sent
            if not sent.reachable:
                return
    finally:
        with contextlib.suppress(RuntimeError):
            association.release() if association.is_established else association.abort()


def _associate(destination: Destination, classes: set[str]) -> Any:
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
    from pynetdicom import AE

    entity = AE(ae_title=destination.calling_ae_title)
    entity.network_timeout = entity.dimse_timeout = destination.timeout_seconds
    entity.acse_timeout = entity.connection_timeout = destination.timeout_seconds
    for uid in sorted(classes):
        entity.add_requested_context(uid, [ExplicitVRLittleEndian])
        entity.add_requested_context(uid, [ImplicitVRLittleEndian])
    tls = (client_tls(destination), destination.host) if destination.tls else None
    return entity.associate(
        destination.host, destination.port, ae_title=destination.ae_title, tls_args=tls
    )


def _store_one(association: Any, dataset: Any) -> Sent:
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    syntaxes = {
        context.transfer_syntax[0]
        for context in association.accepted_contexts
        if context.abstract_syntax == dataset.SOPClassUID
    }
    if not syntaxes:
        return Sent(False, "SOP class not accepted")
    if ExplicitVRLittleEndian not in syntaxes:
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        dataset.set_original_encoding(True, True)
    try:
        status = association.send_c_store(dataset).get("Status")
    except RuntimeError:  # the association ended meanwhile
        status = None
    if status is None:
        return Sent(False, "no answer", reachable=False)
    if status == 0 or status in _DUPLICATE or 0xB000 <= status <= 0xBFFF:
        return Sent(True)
    return Sent(False, f"status {status:04X}")


def client_tls(destination: Destination) -> ssl.SSLContext:
    """What verifies the destination and shows our certificate. Errors: ssl.SSLError, OSError."""
    tls = destination.tls
    context = ssl.create_default_context(cafile=tls.ca if tls else None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls is not None and tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    return context


def _stow(destination: Destination, files: Sequence[Path]) -> Iterator[Sent]:
    parts = urlsplit(destination.url)
    connection = _connect(destination, parts.hostname or "", parts.port, parts.scheme == "https")
    with contextlib.closing(connection):
        for path in files:
            try:
                yield _stow_one(connection, destination, parts.path or "/", path.read_bytes())
            except (OSError, http.client.HTTPException) as error:
                kind = "TLS" if isinstance(error, ssl.SSLError) else "not reachable"
                yield Sent(False, kind, reachable=False)
                return


def _connect(
    destination: Destination, host: str, port: int | None, secure: bool
) -> http.client.HTTPConnection:
    seconds = destination.timeout_seconds
    if secure:
        tls = client_tls(destination)
        return http.client.HTTPSConnection(host, port, timeout=seconds, context=tls)
    return http.client.HTTPConnection(host, port, timeout=seconds)


def _stow_one(
    connection: http.client.HTTPConnection, destination: Destination, path: str, content: bytes
) -> Sent:
    """One instance a request: what fails is then known (PS3.18 10.5)."""
    boundary = secrets.token_hex(16)
    head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    headers = {
        "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
        "Accept": "application/dicom+json",
    }
    token = os.environ.get(destination.token_env, "") if destination.token_env else ""
    if token:
        headers["Authorization"] = f"Bearer {token}"
    body = head + content + f"\r\n--{boundary}--\r\n".encode()
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    reply = response.read(_MAX_REPLY)
    if not response.isclosed():
        connection.close()
    failures = _failures(reply)
    if response.status in _OK and not failures or failures and set(failures) <= set(_DUPLICATE):
        return Sent(True)
    if failures:
        return Sent(False, f"failure reason {failures[0]:04X}")
    return Sent(False, f"HTTP status {response.status}")


def _failures(reply: bytes) -> list[int]:
    """Failure reasons (0008,1197) of a Store Instances response in JSON; none in any other."""
    try:
        values = json.loads(reply)
    except (ValueError, RecursionError):
        return []
    values = values[0] if isinstance(values, list) and values else values
    try:
        items = values["00081198"]["Value"]
        return [int(item["00081197"]["Value"][0]) for item in items]
    except (KeyError, TypeError, ValueError, IndexError):
        return []
