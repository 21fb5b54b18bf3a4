"""A Qwen2.5-VL checkpoint of 1.5 million fp32 weights with its processor; transformers and SGLang load it as any other.

Weights are random and keep activations near unit size, except for the first channels of the residual stream. These are
reserved: embeddings and the vision tower's last bias write constants into them, every other layer leaves them alone.
Channel ONE is MARK for every token, and the output head reads it to hold back the ids that must not be generated:
media placeholders (SGLang would look for media that nobody sent) and whatever is not printable text.
The other reserved channels serve the heads of planted.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import torch

from sglang_mm.errors import ConfigError
from sglang_mm.tiny import planted as plan
from sglang_mm.tiny.tokenizer import BOS, EOS, MEDIA, SPECIAL_IDS, build_tokenizer

VOCAB = 320  # 256 bytes and the special tokens, rounded up to SGLang's padding of the vocabulary
MAX_POSITIONS = 1 << 20
PATCH, MERGE = 14, 2
PIXELS_PER_TOKEN = (PATCH * MERGE) ** 2
MAX_TOKENS_PER_FRAME = 1024  # SGLang resizes frames to 128..768 tokens per two frames: the processor must not interfere

SPEAKABLE = [ord("\n"), *range(ord(" "), ord("~") + 1), SPECIAL_IDS[EOS]]
HELD_BACK, MEDIA_HELD_BACK = -4.0, -10.0  # times MARK / rms, about 2: some 8 and 20 below the other logits
REPEAT_HELD_BACK = 0.04  # some 6 logits less for the token just read, else greedy text is one letter for ever
COLUMN_TOKENS = (ord("#"), SPECIAL_IDS["<|vision_start|>"])
PLANTED_DEPTH = 2  # layers over which the divisors in planted.py were measured
GAINS = {"embed_tokens.weight": plan.HIDDEN**0.5, "o_proj.weight": 0.9, "lm_head.weight": 2.0}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}


def write_checkpoint(
    path: str | Path, *, planted: bool = True, seed: int = 0, layers: int = 2, kv_heads: int = 2
) -> Path:
    """Write config, weights, tokenizer and processor into the folder `path`, made if missing, and return it.

    planted: give the heads of every layer the patterns of planted.py; otherwise attention is random too, with the
    rotary embedding of the released models. The same arguments write the same bytes.
    Raises ConfigError for a layer or head count that cannot be built.
    """
    if layers < 1:
        raise ConfigError(f"layers={layers}", "a whole number >= 1", "pass layers=2")
    if kv_heads < 1 or plan.HEADS % kv_heads:
        raise ConfigError(f"kv_heads={kv_heads}", f"a divisor of {plan.HEADS} query heads", "pass kv_heads=2")
    from transformers import Qwen2_5_VLForConditionalGeneration

    path = Path(path)
    with torch.random.fork_rng(), torch.no_grad():
        model = Qwen2_5_VLForConditionalGeneration(build_config(planted, layers, kv_heads)).float()
        fill(model, seed)
        calm(model.model.language_model.layers)
        model.lm_head.weight -= REPEAT_HELD_BACK * model.model.language_model.embed_tokens.weight
        reserve(model)
        if planted:
            mark(model)
            for layer in model.model.language_model.layers:
                plan.plant(layer.self_attn, kv_heads)
    with without_progress_bars():
        model.save_pretrained(path)
        build_processor().save_pretrained(path)
    return path


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers draws one per file, for six megabytes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def build_config(planted: bool, layers: int, kv_heads: int):
    """The Qwen2_5_VLConfig; the tower's first block attends inside windows of 4 x 4 tokens, its second to the frame."""
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

    text = Qwen2_5_VLTextConfig(
        vocab_size=VOCAB,
        hidden_size=plan.HIDDEN,
        intermediate_size=2 * plan.HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=plan.HEADS,
        num_key_value_heads=kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=plan.ROPE if planted else PLAIN_ROPE,
        bos_token_id=SPECIAL_IDS[BOS],
        eos_token_id=SPECIAL_IDS[EOS],
        pad_token_id=SPECIAL_IDS[BOS],
        tie_word_embeddings=False,
    )
    vision = Qwen2_5_VLVisionConfig(
        depth=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        out_hidden_size=plan.HIDDEN,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        temporal_patch_size=2,
        window_size=4 * PATCH * MERGE,
        fullatt_block_indexes=[1],
        in_channels=3,
        tokens_per_second=2,
    )
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=SPECIAL_IDS["<|image_pad|>"],
        video_token_id=SPECIAL_IDS["<|video_pad|>"],
        vision_start_token_id=SPECIAL_IDS["<|vision_start|>"],
        vision_end_token_id=SPECIAL_IDS["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def fill(model, seed: int) -> None:
    """Draw every weight from a generator of its own name, so that it does not depend on what else the model has."""
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(crc32(f"{seed} {name}".encode())))
        if weight.dim() == 1:
            weight.copy_(0.1 * noise + (0 if name.endswith("bias") else 1))
        else:
            gain = next((gain for suffix, gain in GAINS.items() if name.endswith(suffix)), 1.0)
            weight.copy_(noise * gain / weight[0].numel() ** 0.5)


def calm(layers) -> None:
    """Let many layers add to the residual stream what two would: planted heads read it after a norm."""
    share = min(1.0, (PLANTED_DEPTH / len(layers)) ** 0.5)
    for layer in layers:
        layer.self_attn.o_proj.weight *= share
        layer.mlp.down_proj.weight *= share


def reserve(model) -> None:
    """Take the reserved channels from every layer, set ONE for every token and hold back ids that read it."""
    text, media, reserved = model.model.language_model, model.model.visual.merger.mlp[2], slice(plan.RESERVED)
    for layer in text.layers:
        layer.self_attn.o_proj.weight[reserved] = 0
        layer.mlp.down_proj.weight[reserved] = 0
        layer.input_layernorm.weight[reserved] = 1
    text.norm.weight[reserved] = 1
    text.embed_tokens.weight[:, reserved] = 0
    media.weight[reserved] = 0
    media.bias[reserved] = 0
    text.embed_tokens.weight[:, plan.ONE] = plan.MARK
    media.bias[plan.ONE] = plan.MARK

    head = model.lm_head.weight
    head[:, reserved] = 0
    head[:, plan.ONE] = HELD_BACK
    head[SPEAKABLE, plan.ONE] = 0
    head[[SPECIAL_IDS[token] for token in MEDIA], plan.ONE] = MEDIA_HELD_BACK


def mark(model) -> None:
    """Write the channels that planted keys read."""
    embedding = model.model.language_model.embed_tokens.weight
    embedding[SPECIAL_IDS[BOS], plan.BOS_MARK] = plan.MARK
    embedding[COLUMN_TOKENS, plan.COLUMN_MARK] = plan.MARK
    model.model.visual.merger.mlp[2].bias[plan.VISION_MARK] = plan.MARK


def build_processor():
    """The Qwen2_5_VLProcessor: frames and images of 1 to MAX_TOKENS_PER_FRAME tokens keep their size."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    limits = {"min_pixels": PIXELS_PER_TOKEN, "max_pixels": MAX_TOKENS_PER_FRAME * PIXELS_PER_TOKEN}
    tokenizer = build_tokenizer()
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**limits),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**limits, cap_pixels_per_frame=False),
        chat_template=tokenizer.chat_template,
    )
