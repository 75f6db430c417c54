"""Models leave for other libraries and come from them, compared with what
the other library computes.
"""
