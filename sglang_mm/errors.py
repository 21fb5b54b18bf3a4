"""Every error of this package: what was given, what is allowed, what to do."""


class SglangMMError(Exception):
    """Base class, so that one `except` catches whatever this package raises."""


class ConfigError(SglangMMError, ValueError):
    """A flag, argument or environment that cannot work, found before any work starts."""

    def __init__(self, given: str, allowed: str, remedy: str):
        super().__init__(f"{given}. Allowed: {allowed}. Remedy: {remedy}.")
        self.given, self.allowed, self.remedy = given, allowed, remedy


class SelfCheckError(SglangMMError, RuntimeError):
    """SGLang does not have the shape this package was written for, or the plugin is not live."""


class RankMismatch(SglangMMError, RuntimeError):
    """Ranks hold different plans for the same request; raised before a collective could deadlock on it."""


class RingBroken(SglangMMError, RuntimeError):
    """A rank did not answer within the deadline, or its connection closed.

    rank: the world rank that is to blame, as far as is known; layer: where that was, if known; stage: what was being
    waited for; waited_s: seconds; silent: all world ranks that did not come.
    """

    def __init__(
        self,
        rank: int,
        stage: str,
        waited_s: float,
        cause: str = "",
        layer: int | None = None,
        silent: tuple[int, ...] = (),
    ):
        who = f"rank {rank}" if layer is None else f"rank {rank}, in layer {layer},"
        tail = f": {cause}" if cause else ""
        super().__init__(f"{who} did not answer during {stage} after {waited_s:.1f} s{tail}")
        self.rank, self.stage, self.waited_s, self.cause, self.layer = rank, stage, waited_s, cause, layer
        self.silent = tuple(silent) or (rank,)

    def __reduce__(self):
        return type(self), (self.rank, self.stage, self.waited_s, self.cause, self.layer, self.silent)


class RankFailed(SglangMMError, RuntimeError):
    """A rank has failed or is lost, and the others have ended with it; of a server and its Engine.

    verdict: rank, node, layer, stage and reason (events.messages.Verdict), or None where nobody knows; then `reason` is
    SGLang's. exit_code: that of a server which ends so.
    """

    exit_code = 3

    def __init__(self, verdict=None, reason: str = ""):
        told = str(verdict) if verdict else reason or "SGLang gave up, see the log"
        super().__init__(
            f"{told.rstrip('.')}. All ranks have ended. Remedy: start again; docs/faults.md says what fails how"
        )
        self.verdict, self.reason = verdict, reason

    def __reduce__(self):
        return type(self), (self.verdict, self.reason)
