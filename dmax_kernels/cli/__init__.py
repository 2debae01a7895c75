"""The commands of ``python -m dmax_kernels``, one file each."""
