"""SGLang's multimodal processors, corrected. SGLang finds them through SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE."""
