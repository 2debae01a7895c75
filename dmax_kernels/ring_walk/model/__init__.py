"""The tiny block-diffusion language model, in files that also ship as remote code."""

from dmax_kernels.ring_walk.model.configuration_tiny_dlm import TinyDlmConfig
from dmax_kernels.ring_walk.model.modeling_tiny_dlm import TinyDlmForCausalLM

__all__ = ["TinyDlmConfig", "TinyDlmForCausalLM"]
