"""The tiny block-diffusion language model.

Importing this package makes transformers' Auto classes know it. `save_pretrained` copies the two
files beside this one into the folder, and a folder so exported loads in plain transformers with
`trust_remote_code=True`.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from dmax_kernels.ring_walk.model.configuration_tiny_dlm import TinyDlmConfig
from dmax_kernels.ring_walk.model.modeling_tiny_dlm import TinyDlmForCausalLM

__all__ = ["TinyDlmConfig", "TinyDlmForCausalLM"]

AutoConfig.register(TinyDlmConfig.model_type, TinyDlmConfig, exist_ok=True)
AutoModelForCausalLM.register(TinyDlmConfig, TinyDlmForCausalLM, exist_ok=True)
TinyDlmConfig.register_for_auto_class()
TinyDlmForCausalLM.register_for_auto_class("AutoModelForCausalLM")
