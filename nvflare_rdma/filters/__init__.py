"""FLARE task filters that quantize before send and dequantize after receive."""
