"""What only SGLang's own batch knows of its requests, noted when it becomes the batch that models see."""

from sglang_mm.serving import prompts, record


def note_batch(forward_batch, _class, batch, *_args, **_kwargs):
    """After-hook on SGLang's ForwardBatch.init_new."""
    record.note_chunks(forward_batch, _class, batch)
    prompts.note_prompts(forward_batch, batch)
    return forward_batch
