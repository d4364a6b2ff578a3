"""Residual vector quantiser: a vector is the sum of one entry from each of Q codebooks.

    r_0 = x;   code_q = argmin_v |r_q - c_qv|^2;   r_{q+1} = r_q - c_q[code_q];   x ~ sum_q c_q[code_q]

Each codebook describes what the ones before it left over, so any prefix of the codes is a coarser version of
the whole.  assets/build.py fits those of the tiny codec by k-means. Next: tiny.py.
"""

import torch
from torch import Tensor, nn


class ResidualVQ(nn.Module):
    """Q codebooks of V entries of width D, as one buffer `codebooks` (Q, V, D)."""

    def __init__(self, num_codebooks: int, codebook_size: int, dim: int):
        super().__init__()
        self.register_buffer("codebooks", torch.zeros(num_codebooks, codebook_size, dim))

    @torch.no_grad()
    def encode(self, x: Tensor, num_codebooks: int | None = None) -> Tensor:
        """Quantise (B, D, T) to codes (B, Q, T) int64; `num_codebooks` stops after that many."""
        B, D, T = x.shape
        residual = x.transpose(1, 2).reshape(B * T, D)
        codes = []
        for book in self.codebooks[:num_codebooks].to(x.dtype):     # (V, D); float64 in, float64 search
            code = nearest(residual, book)
            residual = residual - book[code]
            codes.append(code.view(B, T))
        return torch.stack(codes, 1)                                # -> (B, Q, T)

    def decode(self, codes: Tensor) -> Tensor:
        """Sum the entries of codes (B, q, T), q <= Q, into (B, D, T)."""
        check_codes(codes, self.codebooks.shape[0], self.codebooks.shape[1])
        books = self.codebooks[:codes.shape[1]]
        return sum(book[code] for book, code in zip(books, codes.unbind(1), strict=True)).transpose(1, 2)      # (B, T, D)


def check_codes(codes: Tensor, num_codebooks: int, codebook_size: int) -> None:
    """Raise ValueError unless codes are (B, 1..Q, T) integers in 0..V-1."""
    if codes.dim() != 3 or not 1 <= codes.shape[1] <= num_codebooks or codes.is_floating_point():
        found = f"{codes.dtype} {tuple(codes.shape)}"
        raise ValueError(f"codes are {found}, expected integers (B, 1..{num_codebooks}, T); pass the codebook streams only")
    low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
    if low < 0 or high >= codebook_size:
        raise ValueError(f"codes run from {low} to {high}, the codec has 0..{codebook_size - 1}; undelay and cut -1, BOS, EOS first")


def nearest(x: Tensor, book: Tensor) -> Tensor:
    """Index (N,) of the entry of book (V, D) closest to each row of x (N, D)."""
    return (book.square().sum(1) - 2 * x @ book.T).argmin(1)        # |x|^2 is the same for every entry
