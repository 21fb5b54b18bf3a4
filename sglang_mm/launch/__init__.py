"""From a command line to running servers: `python -m sglang_mm.launch`."""
