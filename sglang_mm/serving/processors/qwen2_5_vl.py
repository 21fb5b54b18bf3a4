"""Qwen2.5-VL's processor: SGLang's, with the video's timing kept and every medium checked before a rank sees it.

SGLang 0.5.23 samples a video's frames but does not tell transformers when they were taken, so transformers assumes
24 frames a second: at 2 sampled frames a second up to 6 frame pairs share one temporal position. Here the metadata
of the sampling travels along, and `second_per_grid_ts` is what it is (1.0 at 2 frames a second).
Frames sent without a container (lists, arrays) carry no timing; for those transformers' assumption stands.

With --vision stock timing, frames and sizes are SGLang's; the checks stay.

Pixels go to the server's store (sglang_mm/pixels) as bytes, and to the ranks as handles; see serving/storing.py.
"""

import asyncio
from contextvars import ContextVar
from functools import partial
from typing import ClassVar

import torch
from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem
from sglang.srt.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from sglang.srt.multimodal.processors import qwen_vl
from sglang.srt.utils.video_decoder import VideoDecoderWrapper

from sglang_mm.config import Config
from sglang_mm.events import Reading
from sglang_mm.pixels import Lease, NoRoom
from sglang_mm.serving import sampling, storing
from sglang_mm.serving.media_access import RequestError
from sglang_mm.serving.media_check import ASPECT, PREPARE, PREPARED, check_markers, check_prepared, unreadable
from sglang_mm.types import digest64

_lease: ContextVar[Lease | None] = ContextVar("lease of the request in this task", default=None)
POSITIONS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")  # what M-RoPE depends on besides the ids


def tell_apart(item: MultimodalDataItem) -> None:
    """Mix an item's grids and times into its hash.

    SGLang's prefix cache knows media by their pixels. The same pixels in another grid (a blank picture, turned) or at
    other times have other positions, and would be answered from wrong keys and values.
    """
    places = [item.model_specific_data.get(name) for name in POSITIONS]
    numbers = [torch.as_tensor(found).tolist() for found in places if found is not None]
    item.set_hash(digest64([item.hash, numbers]))


class TimedQwenVLProcessor(qwen_vl.QwenVLImageProcessor):
    """SGLang's processor for one model class."""

    models: ClassVar[list] = [Qwen2_5_VLForConditionalGeneration]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mm_config = Config.from_env() or Config()
        # a handle can be pickled, SGLang's msgpack knows nothing of it
        self.store = storing.in_use() if envs.SGLANG_USE_PICKLE_IPC.get() else None
        self.prompt_limit = None  # intake.py sets it with every request: SGLang knows it once the ranks are there

    @property
    def marker_ids(self) -> dict[str, int]:
        """Token ids that stand for media and for nothing else."""
        return {"image": self.IM_TOKEN_ID, "video": self.VIDEO_TOKEN_ID}

    async def process_mm_data_async(self, image_data, input_text, request_obj, *args, **kwargs):
        """Ids, pixels and positions of a request. Raises RequestError for media that cannot be served."""
        if request_obj.audio_data:
            raise RequestError("audio", "images and videos: the model hears nothing", "leave the audio out")
        media = {"image": image_data or [], "video": request_obj.video_data or []}
        prepared = any(self._is_preprocessed_input(medium) for some in media.values() for medium in some)
        if not prepared:
            text = input_text if isinstance(input_text, str) else self._tokenizer.decode(input_text)
            check_markers(text, self.mm_tokens, {kind: len(some) for kind, some in media.items()})
        lease = self._lease_for(request_obj)
        setattr(request_obj, storing.LEASE, lease)
        of_task = _lease.set(lease)
        try:
            output = await self._processed(prepared, image_data, input_text, request_obj, *args, **kwargs)
            vision = self.hf_config.vision_config
            patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            check_prepared(output, self.spatial_merge_size, patch, vision.out_hidden_size, sent=prepared)
        except BaseException:  # a client that went away, too
            if lease is not None:
                lease.discard()
            raise
        finally:
            _lease.reset(of_task)  # tasks that outlive the request would keep it
        return output

    def _lease_for(self, request_obj) -> Lease | None:
        """None: pixels travel by value. Later turns of a session may need an earlier one's, whose request has ended;
        ranks of this machine have its files open by then, others could not ask for them."""
        if self.store is None:
            return None
        is_turn = any(getattr(request_obj, name, None) for name in ("session_params", "session_id"))
        return self.store.lease(str(request_obj.rid)) if self.store.is_for_one_machine or not is_turn else None

    async def _processed(self, prepared: bool, *args, **kwargs):
        """SGLang's, with hashes and errors of ours. prepared: whether the client made some of the media's data."""
        try:
            output = await super().process_mm_data_async(*args, **kwargs)
            output.padded_input_ids = None  # ranks make them from the hashes, which change here
            await self.hash_executor.set_pad_values(output.mm_items)
            for item in output.mm_items:
                tell_apart(item)
        except Exception as error:
            explained = self._explained(error, prepared)
            raise explained from (None if explained is error else error)
        return output

    @staticmethod
    def _explained(error: Exception, prepared: bool) -> Exception:
        """What SGLang and transformers raise for media they cannot take, in our words if it is the client's doing."""
        if isinstance(error, RequestError):
            return error
        if isinstance(error, NoRoom):
            return RequestError(error.given, error.allowed, error.remedy)
        if "aspect ratio" in str(error):
            return RequestError(f"an image ({error})", ASPECT, "crop it, or cut it in parts")
        if prepared:  # whatever goes wrong with data that a client made, it made it so
            return RequestError(f"preprocessed media ({type(error).__name__}: {error})", PREPARED, PREPARE)
        return error

    @classmethod
    def _load_single_item(cls, data, modality: Modality, *args, **kwargs):
        try:
            return super()._load_single_item(data, modality, *args, **kwargs)
        except (ValueError, RuntimeError) as error:
            cause = error.__cause__ or error
            explained = unreadable(data, modality.name.lower(), cause)
            raise explained from (None if explained is cause else cause)

    async def load_mm_data(self, *args, **kwargs):
        """Sample the videos right after loading, where their metadata can still be kept beside them."""
        try:
            loaded = await super().load_mm_data(*args, **kwargs)
        except ValueError as error:
            raise (error.__cause__ if isinstance(error.__cause__, RequestError) else error) from None
        loaded.video_metadata, loaded.stored_videos, loaded.lease = None, [], _lease.get()
        videos = loaded.videos or []
        containers = [isinstance(video, VideoDecoderWrapper) for video in videos]
        if any(containers):
            if not all(containers):
                raise RequestError(
                    "one request with video files and preprocessed frames", "one of the two",
                    "send all videos as files, or all as frames",
                )  # fmt: skip
            sampled = await self._sample(videos, kwargs.get("video_data") or [], loaded.lease)
            loaded.videos, loaded.video_metadata = map(list, zip(*sampled))
            if isinstance(loaded.videos[0], storing.StoredVideo):
                loaded.stored_videos = loaded.videos
                loaded.videos = [video.frames for video in loaded.stored_videos]
        return loaded

    async def _sample(self, videos: list[VideoDecoderWrapper], names: list, lease: Lease | None) -> list[tuple]:
        """Frames, or StoredVideos, and metadata of each video, decoded in threads; too many are refused before."""
        room = None
        if self.mm_config.vision == "frames" and self.prompt_limit:
            room = sampling.room(self.video_config, self.prompt_limit.tokens, len(videos))
        planned = [
            await self._in_thread(name, sampling.plan, video, self.video_config, room)
            for video, name in zip(videos, names)
        ]
        self._check_fits(planned)
        chosen = [
            await self._in_thread(name, sampling.chosen, video, how)
            for video, name, how in zip(videos, names, planned, strict=True)
        ]
        settings = self._settings([metadata for _, metadata in chosen])
        frames = [storing.frames_of(len(indices), how.height, how.width) for (indices, _), how in zip(chosen, planned)]
        library = self._processor.video_processor
        cuts = [storing.cut_of(library, shape, settings) if lease else None for shape in frames]
        sampled = []
        for i, (video, (indices, metadata)) in enumerate(zip(videos, chosen)):
            reading = Reading(lease.request if lease else "", i, len(indices))
            read = partial(sampling.pieces, video, planned[i], indices)
            work = _joined
            if all(cuts):
                how = {"frames": frames[i], "cut": cuts[i], "settings": settings, "lease": lease}
                work = partial(storing.store_video, library, **how)
            sampled.append((await self._in_thread(names[i], _read, reading, read, work), metadata))
        return sampled

    def _settings(self, metadata: list[dict]) -> dict:
        """What transformers' video processor is told of these videos beside their frames."""
        settings = qwen_vl._get_processor_video_config(self.video_config, metadata) or {}
        return {**settings, "do_sample_frames": False} if self.mm_config.vision == "frames" else settings

    async def _in_thread(self, name, work, *args):
        """work(*args), while the server goes on serving. Raises RequestError for a video that it cannot read."""
        running = asyncio.get_running_loop().run_in_executor(self.io_executor, work, *args)
        try:
            return await asyncio.wait_for(running, self.mm_config.deadline_s)
        except Exception as error:
            explained = unreadable(name, "video", error)
            raise explained from (None if explained is error else error)

    def _check_fits(self, planned: list[sampling.Sampling]) -> None:
        """An hour of video takes minutes to decode: what will not fit is known before."""
        if self.prompt_limit is None or "size" in self.video_config:
            return
        patches = self._processor.video_processor.get_num_of_video_patches
        tokens = sum(patches(how.frames, how.height, how.width, {}) for how in planned) // self.spatial_merge_size**2
        frames = " and ".join(f"{how.frames:,} frames of {how.width}x{how.height}" for how in planned)
        self.prompt_limit.check(tokens, f"video of {tokens:,} tokens ({frames})")

    async def process_and_combine_mm_data_async(self, base_output, *args, **kwargs):
        metadata = getattr(base_output, "video_metadata", None)
        if metadata is not None:
            kwargs["processor_video_config"] = qwen_vl._get_processor_video_config(self.video_config, metadata)
            if self.mm_config.vision == "frames":
                kwargs.update(video_metadata=metadata, do_sample_frames=False)
        return await super().process_and_combine_mm_data_async(base_output, *args, **kwargs)

    def process_and_combine_mm_data(self, base_output, mm_tokens, processor=None, **kwargs):
        """SGLang's, in one of its threads. Pixels are written to the store and come back as handles."""
        if getattr(base_output, "lease", None) is None:
            return super().process_and_combine_mm_data(base_output, mm_tokens, processor=processor, **kwargs)
        swap = storing.Swap(base_output.lease, base_output.stored_videos)
        kwargs["processor"] = swap.processor(self._resolve_processor(processor)[0])
        items, ids, made = super().process_and_combine_mm_data(base_output, mm_tokens, **kwargs)
        swap.handles_into(items)
        return items, ids, made


def _read(reading: Reading, pieces, work):
    """work(pieces()), told while it goes on."""
    with reading:
        return work(reading.follow(pieces()))


def _joined(pieces) -> torch.Tensor:
    return torch.cat(list(pieces))
