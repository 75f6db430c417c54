"""Kernels written in Triton. Each module imports triton, except `launch`, and is imported only when
its kernel is chosen.
"""
