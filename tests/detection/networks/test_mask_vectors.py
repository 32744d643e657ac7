"""Vectors of masks against scipy's transform."""

from __future__ import annotations

import torch
from scipy.fft import dctn

from kd_hf.detection.networks.mask_vectors import cosine_matrix, decode_masks, encode_masks, zigzag


def disc(size):
    place = torch.arange(size) - size / 2 + 0.5
    return (place[:, None] ** 2 + (1.5 * place) ** 2) < (size / 3) ** 2


def test_order_of_the_places():
    assert zigzag(3, 9, torch.device("cpu")).tolist() == [0, 1, 3, 6, 4, 2, 5, 7, 8]


def test_equal_to_scipy():
    mask = disc(16)
    whole = torch.tensor([[0.0, 0.0, 16.0, 16.0]], dtype=torch.float64)
    found = encode_masks(mask[None], whole, 16, 20)[0]
    expected = torch.from_numpy(dctn(mask.double().numpy(), norm="ortho")).flatten()[zigzag(16, 20, mask.device)]
    torch.testing.assert_close(found, expected)
    matrix = cosine_matrix(16, expected)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(16, dtype=torch.float64))


def test_only_the_box_is_seen():
    mask = torch.zeros(2, 30, 40, dtype=torch.bool)
    mask[:, 5:21, 8:24] = disc(16)
    mask[1, 25:, :] = True  # outside the box
    boxes = torch.tensor([[8.0, 5.0, 24.0, 21.0]] * 2, dtype=torch.float64)
    found = encode_masks(mask, boxes, 16, 30)
    whole = torch.tensor([[0.0, 0.0, 16.0, 16.0]], dtype=torch.float64)
    torch.testing.assert_close(found, encode_masks(disc(16)[None], whole, 16, 30).expand(2, -1))


def test_low_frequencies_are_nearly_the_mask():
    mask = disc(128)[None]
    boxes = torch.tensor([[0.0, 0.0, 128.0, 128.0]])
    decoded = decode_masks(encode_masks(mask, boxes, 128, 256), 128)
    assert (decoded == mask).float().mean() > 0.99
    every = encode_masks(disc(8)[None], torch.tensor([[0.0, 0.0, 8.0, 8.0]]), 8, 64)
    assert torch.equal(decode_masks(every, 8)[0], disc(8))
    assert encode_masks(mask[:0], boxes[:0], 16, 30).shape == (0, 30)
