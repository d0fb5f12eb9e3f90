"""One connection to one process of the server."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from redis.exceptions import NoPermissionError, ResponseError

from paceline.ledger.stores.redis.address import Address

Command = Sequence[bytes | str] | bytes  # its words, or all of it packed


def packed_words(words: Sequence[bytes | str]) -> bytes:
    """As the server reads them. redis-py takes five times as long, and a call has dozens."""
    data = (word.encode() if isinstance(word, str) else word for word in words)
    return b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in data)


def packed(command: Command) -> bytes:
    if isinstance(command, bytes):
        return command
    return b"*%d\r\n" % len(command) + packed_words(command)


class Link:
    """Raises redis-py's errors; the caller knows what they mean for its call."""

    def __init__(self, address: Address) -> None:
        self._connection = address.connection()
        self._connection.connect()
        try:
            self.facts = self._facts()
        except BaseException:
            self.close()
            raise

    def _facts(self) -> dict[str, str]:
        """What INFO says of the server; nothing if this user may not ask."""
        try:
            [text] = self.ask([["INFO"]])
        except NoPermissionError:
            return {}
        lines = (line.partition(":") for line in text.decode(errors="replace").splitlines())
        return {name: value for name, colon, value in lines if colon}

    @property
    def server(self) -> str:
        """The random name of the server's process; another one after each restart."""
        return self.facts.get("run_id", "")

    def is_sound(self) -> bool:
        """Whether nothing has come, not even the end, since the last reply."""
        try:
            return not self._connection.can_read(timeout=0)
        except Exception:  # noqa: BLE001 (whatever it is, the link is not used again)
            return False

    def ask(self, commands: Sequence[Command], reply_s: float | None = None) -> list[Any]:
        """Send the commands together; returns their replies. Raises the first one if it is an error.

        A later one that is an error is returned: what the first command did stands.
        """
        self._connection.send_packed_command([b"".join(packed(command) for command in commands)])
        replies = [self._reply(reply_s) for _ in commands]
        if isinstance(replies[0], ResponseError):
            raise replies[0]
        return replies

    def _reply(self, reply_s: float | None) -> Any:
        try:
            if reply_s is None:
                return self._connection.read_response()
            return self._connection.read_response(timeout=reply_s)
        except ResponseError as error:  # the replies behind it are read all the same
            return error

    def interrupt(self) -> None:
        """Make another thread's wait for a reply on this link end with an error."""
        sock = self._connection._sock
        with suppress(OSError, AttributeError):
            sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._connection.disconnect()
