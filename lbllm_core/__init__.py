"""LBLLM: language models in one bit a weight, one bitmap bit, and 4-bit activations.

Start reading in `lbllm_core/quant/weight.py`.
"""

from lbllm_core.model.hf_integration import register_on_import

__version__ = "0.1.0"

register_on_import()  # `AutoModelForCausalLM.from_pretrained` knows packed folders as soon as transformers is imported
