"""LBLLM: language models in one bit a weight, one bitmap bit, and 4-bit activations.

Start reading in `lbllm_core/quant/weight.py`.
"""

__version__ = "0.1.0"
