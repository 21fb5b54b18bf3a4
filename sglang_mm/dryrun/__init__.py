"""A prompt laid out, compiled and weighed without weights, attention or a GPU: `launch --dry-run`."""
