"""Packed W(1+1)A4 inference: the LUT8 format, its reference and its fast paths."""
