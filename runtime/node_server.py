"""pynetdicom's association server with limits it lacks: PDU size, message size, TLS handshake.

A peer that announces a PDU of gigabytes, sends a message without end or stalls in its handshake
loses its connection and costs nobody else's. Nothing of a message is interpreted here.
"""

from socketserver import TCPServer
from types import MethodType
from typing import Any

MAX_PDU_BYTES = 2**20  # the largest association request; data PDUs are limited to 128 KiB
_HANDSHAKE_SECONDS = 10.0


def make_server(
    entity: Any, address: tuple[str, int], handlers: list[Any], tls: Any, message_bytes: int
) -> Any:
    """A listening server for ``entity``; a message may have ``message_bytes``. Errors: OSError."""
    from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

    class LimitedHandler(RequestHandler):
        """One connection."""

        def handle(self) -> None:
            self.request.settimeout(_HANDSHAKE_SECONDS)
            if tls is not None:
                self.request = tls.wrap_socket(self.request, server_side=True)
            self.request.settimeout(entity.network_timeout)
            super().handle()

        def _create_association(self) -> Any:
            association = super()._create_association()
            limit_socket(association.dul.socket, message_bytes)
            return association

    class QuietServer(ThreadedAssociationServer):
        """Tells nobody's terminal about broken connections."""

        daemon_threads = True
        request_queue_size = 64

        def shutdown(self) -> None:
            """End the loop and the socket; make_server enters nothing into the entity's list."""
            TCPServer.shutdown(self)
            self.server_close()

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A connection that ended before it was an association: no event of ours."""

    # TLS is done above, in the connection's own thread: here it would block all others.
    return entity.make_server(
        address, evt_handlers=handlers, server_class=QuietServer, request_handler=LimitedHandler
    )


def limit_socket(sock: Any, message_bytes: int) -> None:
    """Make pynetdicom's AssociationSocket refuse what is too large, before it is read."""
    plain = sock.recv
    sock.received = 0

    def start_message(self: Any) -> None:
        self.received = 0

    def recv(self: Any, count: int) -> bytearray:
        self.received += count
        if count > MAX_PDU_BYTES or self.received > message_bytes + MAX_PDU_BYTES:
            raise ConnectionAbortedError("the peer sends more than the limit")
        data: bytearray = plain(count)
        return data

    sock.start_message = MethodType(start_message, sock)
    sock.recv = MethodType(recv, sock)
