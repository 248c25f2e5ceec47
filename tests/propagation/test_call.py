"""Which arguments of a model go along with the elements of a batch."""

import pytest
import torch

from gpseq.propagation.call import rows_of

ROWS = slice(1, 3)


@pytest.mark.parametrize("name", ["attn_mask", "mask", "src_mask"])
def test_masks_of_whole_numbers_have_a_row_for_each_element(name):
    """As those of tokenizers do; masks on pairs of positions, which torch has, are boolean or real."""
    for dtype in (torch.long, torch.int32):
        mask = torch.arange(20, dtype=dtype).view(4, 5)
        assert torch.equal(rows_of(name, mask, ROWS, 4), mask[1:3])
        square = torch.arange(16, dtype=dtype).view(4, 4)  # as many tokens as elements
        assert torch.equal(rows_of(name, square, ROWS, 4), square[1:3])
        assert rows_of(name, mask, ROWS, 5) is mask
    for pairs in (torch.ones(4, 4).bool(), torch.zeros(4, 4)):
        assert rows_of(name, pairs, ROWS, 4) is pairs


def test_masks_of_each_head_and_other_arguments():
    heads = torch.arange(4 * 2 * 3 * 3).view(8, 3, 3)
    assert torch.equal(rows_of("attn_mask", heads, ROWS, 4), heads[2:6])
    padding = torch.zeros(4, 3).bool()
    assert torch.equal(rows_of("key_padding_mask", padding, ROWS, 4), padding[1:3])
    for name, value in (("positions", torch.arange(4)), ("scale", torch.tensor(2.0)), ("causal", True)):
        assert rows_of(name, value, ROWS, 4) is value
