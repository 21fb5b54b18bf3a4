"""Qwen2.5-VL's processor, with the video's timing kept.

SGLang 0.5.23 samples a video's frames but does not tell transformers when they were taken, so transformers assumes
24 frames a second: at 2 sampled frames a second up to 6 frame pairs share one temporal position. Here the metadata
of the sampling travels along, and `second_per_grid_ts` is what it is (1.0 at 2 frames a second).
Frames sent without a container (lists, arrays) carry no timing; for those transformers' assumption stands.
"""

from typing import ClassVar

from sglang.srt.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from sglang.srt.multimodal.processors import qwen_vl
from sglang.srt.utils.video_decoder import VideoDecoderWrapper


class TimedQwenVLProcessor(qwen_vl.QwenVLImageProcessor):
    """SGLang's processor for one model class; everything but the two methods below is inherited."""

    models: ClassVar[list] = [Qwen2_5_VLForConditionalGeneration]

    async def load_mm_data(self, *args, **kwargs):
        """Sample the videos right after loading, where their metadata can still be kept beside them."""
        loaded = await super().load_mm_data(*args, **kwargs)
        loaded.video_metadata = None
        videos = loaded.videos or []
        containers = [isinstance(video, VideoDecoderWrapper) for video in videos]
        if any(containers):
            if not all(containers):
                raise ValueError(
                    "one request has video files and preprocessed frames. Allowed: one of the two. Remedy: send all "
                    "videos as files, or all as frames"
                )
            sampled = [await qwen_vl.preprocess_video(video, video_config=self.video_config) for video in videos]
            loaded.videos, loaded.video_metadata = map(list, zip(*sampled))
        return loaded

    async def process_and_combine_mm_data_async(self, base_output, *args, **kwargs):
        metadata = getattr(base_output, "video_metadata", None)
        if metadata is not None:
            kwargs["processor_video_config"] = qwen_vl._get_processor_video_config(self.video_config, metadata)
            kwargs.update(video_metadata=metadata, do_sample_frames=False)
        return await super().process_and_combine_mm_data_async(base_output, *args, **kwargs)
