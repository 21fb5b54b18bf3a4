"""A byte-level tokenizer with the special tokens and the chat layout of Qwen2.5-VL: ids 0..255 are bytes.

Each prompt of the chat template begins with `<|endoftext|>`, which occurs nowhere else: the attention sink.
"""

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPECIAL_IDS = {token: 256 + i for i, token in enumerate(SPECIALS)}
BOS, EOS = "<|endoftext|>", "<|im_end|>"
MEDIA = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")

CHAT_TEMPLATE = """\
{%- set bos = '<|endoftext|>' -%}
{{- bos -}}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] in ('video', 'video_url') or 'video' in part or 'video_url' in part -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""


def byte_alphabet() -> list[str]:
    """The printable stand-in character of each byte 0..255 that byte-level BPE works on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def build_tokenizer():
    """A PreTrainedTokenizerFast whose id of a byte is the byte, followed by SPECIALS at 256.."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytes_only = models.BPE(vocab={char: byte for byte, char in enumerate(byte_alphabet())}, merges=[])
    core = Tokenizer(bytes_only)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIALS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=EOS,
        pad_token=BOS,
        additional_special_tokens=list(SPECIALS),
        model_max_length=1 << 20,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert tokenizer.convert_tokens_to_ids(list(SPECIALS)) == list(SPECIAL_IDS.values())
    return tokenizer
