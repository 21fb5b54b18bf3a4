"""How long a prompt may be, and what bounds it. SGLang's ranks know, too, but by then they hold the request."""

from dataclasses import dataclass

from sglang_mm.serving.media_access import RequestError

KEPT_BACK = 8  # SGLang keeps a few tokens of the context for the answer
FEWER_FRAMES = '--mm-process-config \'{"video": {"max_frames": N}}\''


@dataclass(frozen=True)
class PromptLimit:
    """tokens: a prompt has fewer, media included. context: the model's context length, in tokens. keepers: how many
    ranks share the K/V of a prompt.
    """

    tokens: int
    context: int
    keepers: int = 1

    @classmethod
    def of(cls, manager) -> "PromptLimit | None":
        """manager: SGLang's TokenizerManager, which knows once the ranks are there."""
        longest, config = manager.max_req_input_len, getattr(getattr(manager, "mm_processor", None), "mm_config", None)
        return None if longest is None else cls(longest, manager.context_len, config.keepers if config else 1)

    def check(self, tokens: int, what: str) -> None:
        """Raise RequestError if `what`, of so many tokens, does not fit."""
        if tokens < self.tokens:
            return
        by_context = self.tokens >= self.context - KEPT_BACK
        bound = f"the context length of {self.context:,}" if by_context else self._memory
        flags = "--context-length" if by_context else "--max-total-tokens, --mem-fraction-static or --cp"
        raise RequestError(
            what,
            f"fewer than {self.tokens:,} tokens in a prompt, bound by {bound}",
            f"send less; or start the server with fewer frames ({FEWER_FRAMES}), or with a higher {flags}",
        )

    @property
    def _memory(self) -> str:
        if self.keepers == 1:
            return "the memory of a rank, for K/V and for what a prefill needs besides"
        return f"the memory of {self.keepers} ranks, for the K/V that they share and for what a prefill needs besides"
