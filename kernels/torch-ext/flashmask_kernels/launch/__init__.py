"""Launching kernels in less host time than Triton takes."""
