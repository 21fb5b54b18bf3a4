"""Who can reach the HTTP server, and what they may make it read."""

import ipaddress
import socket
from dataclasses import dataclass

from sglang_mm.config import Config
from sglang_mm.serving.media_access import ANYWHERE


@dataclass(frozen=True)
class Exposure:
    """host: where the server listens. has_key: --api-key is set. has_domains: --allowed-media-domains is set.

    chosen: --allow-local-media.
    """

    host: str
    has_key: bool
    has_domains: bool
    chosen: tuple[str, ...]

    @classmethod
    def of(cls, config: Config, args) -> "Exposure":
        """args: SGLang's ServerArgs."""
        return cls(args.host, bool(args.api_key), bool(args.allowed_media_domains), config.allow_local_media)

    @property
    def is_open(self) -> bool:
        """Whether others than this machine's own processes may reach it."""
        try:
            found = socket.getaddrinfo(self.host or None, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError:
            return True
        return not all(ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for *_, address in found)

    @property
    def directories(self) -> tuple[str, ...]:
        """Below which requests may name files."""
        return self.chosen or (() if self.is_open else (ANYWHERE,))

    @property
    def readable(self) -> list[str]:
        """The same in words."""
        if self.chosen:
            return [f"files below {directory}" for directory in self.chosen]
        return ["no local files (--allow-local-media DIR)" if self.is_open else "any file this user can read"]

    @property
    def warnings(self) -> list[str]:
        """What an open server lacks; docs/security.md says more."""
        if not self.is_open:
            return []
        lacking = []
        if not self.has_key:
            lacking.append(
                f"--host {self.host} without --api-key: WHOEVER REACHES THIS PORT CAN USE AND ADMINISTER THE SERVER. "
                "Pass --api-key (and --admin-api-key), or --host 127.0.0.1; see docs/security.md"
            )
        if not self.has_domains:
            lacking.append(
                f"--host {self.host} without --allowed-media-domains: CLIENTS CAN MAKE THE SERVER FETCH ANY ADDRESS IT "
                "REACHES, your internal ones too. Pass --allowed-media-domains HOST...; see docs/security.md"
            )
        return lacking
