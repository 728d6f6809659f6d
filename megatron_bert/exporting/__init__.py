"""`megatron-bert export`: a quantized model in forms that other programs run."""
