"""A linear map with orthonormal columns (or rows), learned on the Stiefel manifold at the price of thin matrices.

The parameter, the starting point and the maps are those of ``torch.nn.utils.parametrizations.orthogonal``. What
differs is the cost: the n×n matrices of that code are kept as products of a few Householder reflections.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kd_hf.methods.losses import full_precision

Map = Literal["auto", "householder", "matrix_exp", "qr"]


def inverse_factor(vectors: Tensor) -> Tensor:
    """T⁻¹ ``[k, k]`` of the compact WY form ``H_1 … H_k = I - V T Vᵀ`` for vectors V ``[n, k]``.

    H_i reflects at the hyperplane orthogonal to column i: ``T⁻¹ = striu(VᵀV) + diag(VᵀV) / 2``.
    """
    gram = vectors.T @ vectors
    return gram.triu() - torch.diag_embed(gram.diagonal() / 2)


def reflect(vectors: Tensor, factor: Tensor, columns: Tensor) -> Tensor:
    """``H_1 … H_k X`` for X ``[n, m]``; `factor` is :func:`inverse_factor` of the vectors."""
    return columns - vectors @ torch.linalg.solve_triangular(factor, vectors.T @ columns, upper=True)


def reflect_back(vectors: Tensor, factor: Tensor, columns: Tensor) -> Tensor:
    """``(H_1 … H_k)ᵀ X`` for X ``[n, m]``."""
    return columns - vectors @ torch.linalg.solve_triangular(factor.T, vectors.T @ columns, upper=False)


def unit_lower(matrix: Tensor) -> Tensor:
    """Householder vectors ``[n, k]`` as LAPACK stores them: 1 on the diagonal, the strictly lower part below."""
    return matrix.tril(-1) + torch.eye(*matrix.shape, dtype=matrix.dtype, device=matrix.device)


def skew_exponential(matrix: Tensor) -> Tensor:
    """First k columns of ``exp(A)``, ``A = L Eᵀ - E Lᵀ`` with L the strictly lower part of ``[n, k]`` and E ``[I; 0]``.

    A has rank 2k: ``exp(Y Zᵀ) = I + Y φ(ZᵀY) Zᵀ`` with ``φ(M) = (exp(M) - 1) / M``, of size 2k instead of n. Unlike a
    form that first orthogonalises L, this one is smooth at L = 0, where training starts.
    """
    rows, columns = matrix.shape
    lower = matrix.tril(-1)
    eye = torch.eye(rows, columns, dtype=matrix.dtype, device=matrix.device)
    if 4 * columns >= rows:
        skew = nn.functional.pad(lower, (0, rows - columns))
        return torch.linalg.matrix_exp(skew - skew.T)[:, :columns]
    left, right = torch.cat([lower, -eye], 1), torch.cat([eye, lower], 1)  # [n, 2k]
    inner = right.T @ left
    # exp of [[M, 1], [0, 0]] holds φ(M) in its upper right block
    blocks = torch.cat([inner, torch.eye(2 * columns, dtype=matrix.dtype, device=matrix.device)], 1)
    phi = torch.linalg.matrix_exp(nn.functional.pad(blocks, (0, 0, 0, 2 * columns)))[: 2 * columns, 2 * columns :]
    return eye + left @ (phi @ right[:columns].T)


def positive_qr(matrix: Tensor) -> Tensor:
    """The orthonormal columns of Gram–Schmidt: QR with a positive diagonal of R, ``[n, k] → [n, k]``."""
    q, r = torch.linalg.qr(matrix)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(matrix.dtype)
    return q * signs


class OrthogonalProjection(nn.Module):
    """``y = x Wᵀ`` with ``WᵀW = 1`` where the output is at least as wide as the input, else ``W Wᵀ = 1``. No bias.

    For n = max(inputs, outputs), k = min(inputs, outputs) and the parameter X ``[n, k]`` (its transpose where the
    input is wider), ``W = base · Q(X)`` or the transpose of that:

    - ``householder``: the first k columns of ``H_1 … H_k`` whose vectors are the strictly lower part of X below ones;
    - ``matrix_exp``: the first k columns of ``exp(A)``, A skew with the strictly lower part of X;
    - ``qr``: the orthonormal factor of X itself; there is no base;
    - ``auto``: what PyTorch takes: ``matrix_exp`` for a square matrix, else ``householder``.

    Weight decay moves a map with a base towards W = base, and leaves that of ``qr`` as it is: W stays orthonormal.

    Args:
        inputs: width of x.
        outputs: width of y.
        map: see above.
        truncated_signs: multiply the columns of the Householder map by the diagonal of X truncated to integers, as
            PyTorch does. That diagonal starts at -1; the least weight decay makes it 0, and W with it, for ever.

    The result is computed in float32 (float64 for float64 inputs) under any autocast.
    """

    def __init__(self, inputs: int, outputs: int, map: Map = "auto", truncated_signs: bool = False) -> None:
        super().__init__()
        self.wide = outputs < inputs
        self.map = map if map != "auto" else ("matrix_exp" if inputs == outputs else "householder")
        self.truncated_signs = truncated_signs and self.map == "householder"
        start = nn.Linear(inputs, outputs, bias=False).weight.detach()
        start = positive_qr(start.T if self.wide else start)
        rows, columns = start.shape
        if self.map == "qr":
            self.original = nn.Parameter(start.T.contiguous() if self.wide else start)
            return
        original = -torch.eye(*start.shape)
        self.original = nn.Parameter(original.T.contiguous() if self.wide else original)
        self.register_buffer("base_vectors", torch.empty(rows, columns))
        self.register_buffer("base_factor", torch.empty(columns, columns))
        self.register_buffer("base_signs", torch.empty(rows))
        self.set_base(start)

    @torch.no_grad()
    def set_base(self, base: Tensor) -> None:
        """Start from other orthonormal columns ``[n, m]``, m ≤ n, for instance the ``base`` of PyTorch's code.

        Fewer than n columns are completed to a basis by reflections.
        """
        # a network that is only planned (on the meta device) has shapes and no values
        packed, tau = (base, base.diagonal()) if base.is_meta else torch.geqrf(base)
        vectors = unit_lower(packed)
        # tau is 0 where nothing is to be reflected; a huge entry of T⁻¹ leaves that column out
        factor = inverse_factor(vectors).triu(1) + torch.diag_embed(tau.reciprocal().nan_to_num(posinf=1e30))
        signs = base.new_ones(len(base))
        signs[: base.shape[1]] = packed.diagonal().sign()
        self.base_vectors, self.base_factor, self.base_signs = vectors, factor, signs

    def forward(self, features: Tensor) -> Tensor:
        """``[B, inputs] → [B, outputs]``."""
        with torch.autocast(features.device.type, enabled=False):
            columns = full_precision(features).T  # [inputs, B]
            return (self._narrow(columns) if self.wide else self._widen(columns)).T

    def weight(self) -> Tensor:
        """W ``[outputs, inputs]``."""
        inputs = self.original.shape[1]
        return self(torch.eye(inputs, dtype=self.original.dtype, device=self.original.device)).T

    def _widen(self, columns: Tensor) -> Tensor:
        """``base · Q · x`` for x ``[k, B]``; vectors are reflected, W itself is never formed."""
        if self.map == "qr":
            return positive_qr(self.original) @ columns
        if self.map == "matrix_exp":
            columns = skew_exponential(self.original) @ columns
        else:
            vectors = unit_lower(self.original)
            columns = self._signs()[:, None] * columns
            columns = nn.functional.pad(columns, (0, 0, 0, len(vectors) - len(columns)))
            columns = reflect(vectors, inverse_factor(vectors), columns)
        return reflect(self.base_vectors, self.base_factor, self.base_signs[:, None] * columns)

    def _narrow(self, columns: Tensor) -> Tensor:
        """``(base · Q)ᵀ x`` for x ``[n, B]``."""
        original = self.original.T
        if self.map == "qr":
            return positive_qr(original).T @ columns
        columns = self.base_signs[:, None] * reflect_back(self.base_vectors, self.base_factor, columns)
        if self.map == "matrix_exp":
            return skew_exponential(original).T @ columns
        vectors = unit_lower(original)
        columns = reflect_back(vectors, inverse_factor(vectors), columns)[: original.shape[1]]
        return self._signs()[:, None] * columns

    def _signs(self) -> Tensor:
        """Factor of each column: it turns the -1 that a reflection puts on the diagonal back, or PyTorch's."""
        diagonal = self.original.diagonal()
        return diagonal.detach().trunc() if self.truncated_signs else -torch.ones_like(diagonal)
