"""What the portable kernels and those for sm_90 share."""
