"""Kernels written in Triton. Each module imports triton, so none is imported before its kernel is
chosen; `launch` is free of it.
"""
