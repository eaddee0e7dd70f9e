"""The receiving side of a DICOM node: C-ECHO and C-STORE for images, nothing promised too early.

An instance is acknowledged when its bytes and its place in the queue are on the disk. Nothing of a
data set is parsed here. Peers are checked by called and calling AE title and, if configured, by
certificate; messages are limited in size before they are kept. Not served: query, retrieve, storage
commitment.
"""

import sqlite3
import ssl
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from medmo_edge.errors import NodeError
from medmo_edge.runtime.artifact_watch import ArtifactWatch
from medmo_edge.runtime.node_config import NodeConfig
from medmo_edge.runtime.node_log import NodeLog, hashed
from medmo_edge.runtime.node_queue import Queue
from medmo_edge.runtime.node_spool import INCOMING, Spool

SUCCESS, OUT_OF_RESOURCES = 0x0000, 0xA700
MAX_PDU = 131072

# What read_image decodes; see docs/dicom.md.
TRANSFER_SYNTAXES = (
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.1.99",
    "1.2.840.10008.1.2.2",
    "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.57",
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.81",
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.91",
    "1.2.840.10008.1.2.4.201",
    "1.2.840.10008.1.2.4.202",
    "1.2.840.10008.1.2.4.203",
)
_EXCLUDED = ("Video", "Segmentation", "WholeSlide", "Tiled", "RTImage", "ContinuousRT")


def image_classes() -> list[str]:
    """SOP class UIDs of the images that are accepted: no video, whole slides or RT images."""
    from pynetdicom.presentation import AllStoragePresentationContexts

    return [
        str(context.abstract_syntax)
        for context in AllStoragePresentationContexts
        if context.abstract_syntax is not None and _is_image(context.abstract_syntax.keyword)
    ]


def _is_image(keyword: str) -> bool:
    return "ImageStorage" in keyword and not any(word in keyword for word in _EXCLUDED)


class Receiver:
    """The Storage SCP of a node; ``received`` is called after each new instance."""

    def __init__(
        self,
        config: NodeConfig,
        spool: Spool,
        queue: Queue,
        log: NodeLog,
        *,
        received: Callable[[], None],
        watch: ArtifactWatch,
    ) -> None:
        self._config = config
        self._spool = spool
        self._queue = queue
        self._log = log
        self._received = received
        self._watch = watch
        self._server: Any = None
        self._entity: Any = None

    @property
    def port(self) -> int:
        """The port it listens on, also when the configuration says 0."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Listen, in threads. Errors: NodeError when address or certificate cannot be used."""
        from pynetdicom import evt

        from medmo_edge.runtime.node_server import make_server

        config = self._config
        self._entity = _entity(config)
        handlers = [
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_C_ECHO, self._echo),
            (evt.EVT_REJECTED, self._rejected),
            (evt.EVT_ABORTED, self._aborted),
        ]
        limit = config.max_instance_mb * 2**20
        try:
            self._server = make_server(
                self._entity, (config.host, config.port), handlers, _tls(config), limit
            )
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise NodeError(
                f"cannot listen on {config.host} port {config.port}: {reason}"
            ) from error
        threading.Thread(target=self._server.serve_forever, args=(0.2,), daemon=True).start()

    def stop(self) -> None:
        """Accept nothing more and end the associations."""
        if self._server is not None:
            for association in self._server.active_associations:
                association.abort(block=False)
            self._server.shutdown()

    def _echo(self, event: Any) -> int:
        self._log.event("echo", calling=_calling(event))
        return SUCCESS

    def _rejected(self, event: Any) -> None:
        self._log.event("rejected", calling=_calling(event))

    def _aborted(self, event: Any) -> None:
        self._log.event("aborted", calling=_calling(event))

    def _store(self, event: Any) -> Any:
        """Status of one C-STORE; never an exception, never a word of the data set."""
        event.assoc.dul.socket.start_message()
        uid = str(event.request.AffectedSOPInstanceUID)
        name, calling = hashed(uid), _calling(event)
        refusal = self._refusal()
        if refusal:
            self._log.event("refused", id=name, calling=calling, reason=refusal)
            return _refused(refusal)
        file = f"{uuid.uuid4().hex}.dcm"
        data = event.request.DataSet.getbuffer()
        try:
            self._spool.write(INCOMING, file, (_head(event), data))
            verdict = self._queue.accept(name, calling, file, len(data), time.time())
        except (OSError, sqlite3.Error) as error:
            self._spool.remove(INCOMING, file)
            self._log.event("refused", id=name, calling=calling, reason=type(error).__name__)
            return _refused("disk_error")
        if verdict in ("duplicate", "own"):
            self._spool.remove(INCOMING, file)
        self._log.event("stored", id=name, calling=calling, bytes=len(data), verdict=verdict)
        self._received()
        return SUCCESS

    def _refusal(self) -> str | None:
        if self._watch.changed():
            return "artifact_changed"
        if self._spool.free_bytes() < self._config.min_free_mb * 2**20:
            return "disk_nearly_full"
        if self._queue.waiting() >= self._config.max_waiting:
            return "queue_full"
        return None


def _refused(reason: str) -> Any:
    """Status A700 with the reason as Error Comment (0000,0902), for the sender's log."""
    from pydicom import Dataset

    status = Dataset()
    status.Status = OUT_OF_RESOURCES
    status.ErrorComment = reason.replace("_", " ")
    return status


def _calling(event: Any) -> str:
    return str(event.assoc.requestor.ae_title).strip()


def _head(event: Any) -> bytes:
    """Preamble and file meta information of the received instance."""
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_file_meta_info

    file = DicomBytesIO()
    file.write(bytes(128) + b"DICM")
    write_file_meta_info(file, event.file_meta)
    return file.getvalue()


def _entity(config: NodeConfig) -> Any:
    from pynetdicom import AE, _config
    from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

    _config.ENFORCE_UID_CONFORMANCE = True
    _config.LOG_HANDLER_LEVEL = "none"
    _config.WINDOWS_TIMER_RESOLUTION = None
    entity = AE(ae_title=config.ae_title)
    entity.require_called_aet = True
    entity.require_calling_aet = list(config.accept_from)
    entity.maximum_associations = config.max_associations
    entity.maximum_pdu_size = MAX_PDU
    entity.network_timeout = config.timeout_seconds
    entity.acse_timeout = entity.dimse_timeout = config.timeout_seconds
    entity.add_supported_context(Verification)
    for uid in image_classes():
        entity.add_supported_context(uid, list(TRANSFER_SYNTAXES))
    return entity


def _tls(config: NodeConfig) -> ssl.SSLContext | None:
    if config.tls is None or config.tls.certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls.certificate, config.tls.key)
        if config.tls.ca is not None:
            context.load_verify_locations(config.tls.ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError as error:
        raise NodeError(f"[node.tls]: the PEM files cannot be used ({error.reason})") from error
    return context
