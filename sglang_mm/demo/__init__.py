"""`python -m sglang_mm.demo`: the main job on real input, with its values checked against two references."""
