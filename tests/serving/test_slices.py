"""Feed-forward layers in calls of bounded size."""

import torch

import sglang_mm

assert sglang_mm.Engine  # before SGLang is imported: it decides then on which platform it is
from sglang_mm.serving.context_parallel import in_slices  # noqa: E402


def test_slices_give_the_same_rows_in_bounded_calls():
    layer, sizes = torch.nn.Linear(8, 8), []

    def feed_forward(rows, forward_batch=None):
        sizes.append(len(rows))
        assert forward_batch == "batch"
        return layer(rows)

    for rows in (0, 5, 16, 17, 50):
        sizes.clear()
        given = torch.randn(rows, 8)
        with torch.no_grad():
            torch.testing.assert_close(in_slices(feed_forward, 16)(given, forward_batch="batch"), layer(given))
        assert max(sizes) <= 16 and sum(sizes) == rows and len(sizes) == max(1, -(-rows // 16))
