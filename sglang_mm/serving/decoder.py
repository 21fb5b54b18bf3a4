"""Which library decodes video. torchcodec imports without FFmpeg's libraries and fails only at the first video, so
SGLang's own fallback never triggers; here it is tried once, on a tiny video, before the first request needs it."""

import importlib.util
import logging

logger = logging.getLogger(__name__)


def choose() -> str:
    """Name of the decoder SGLang will use: `torchcodec`, or `decord` where torchcodec cannot decode."""
    from sglang.srt.utils import video_decoder

    if video_decoder._BACKEND == "torchcodec" and not _torchcodec_works():
        if importlib.util.find_spec("decord") is None:
            logger.warning("no video decoder works: install decord2 (carries its own FFmpeg), or FFmpeg's libraries")
            return "none"
        video_decoder._BACKEND = "decord"
        logger.info("torchcodec finds no FFmpeg libraries; videos are decoded by decord")
    return video_decoder._BACKEND


def _torchcodec_works() -> bool:
    """Whether torchcodec gets as far as rejecting a video of no bytes; without FFmpeg it fails before."""
    try:
        from torchcodec.decoders import VideoDecoder

        VideoDecoder(b"\0")
    except ImportError:
        return False
    except Exception as error:
        return "Could not load" not in str(error)
    return True
