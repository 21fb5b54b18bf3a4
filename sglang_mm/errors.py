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

    rank: the rank that was waited for; stage: what was being waited for; waited_s: seconds.
    """

    def __init__(self, rank: int, stage: str, waited_s: float, cause: str = ""):
        tail = f": {cause}" if cause else ""
        super().__init__(f"rank {rank} did not answer during {stage} after {waited_s:.1f} s{tail}")
        self.rank, self.stage, self.waited_s = rank, stage, waited_s
