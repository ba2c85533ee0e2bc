"""Tensors to few bits and back, block by block. numpy in, numpy out."""
