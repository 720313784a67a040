"""Triton Inference Server: a model repository with `decoder`, the fused graph, and `generate`, text in and text out."""
