"""LZMA as a yardstick for models of text: used by pretrain and mambabyte."""

import lzma

__all__ = ["lzma_bits"]


def lzma_bits(before: bytes, text: bytes) -> tuple[float, float]:
    """Bits per byte of LZMA alone, and where the training text came before."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]

    def bits(data: bytes) -> int:
        return 8 * len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))

    return bits(text) / len(text), (bits(before + text) - bits(before)) / len(text)
