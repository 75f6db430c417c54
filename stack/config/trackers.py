"""Names of trackers, for commands that import no torch; their classes are in
`stack/train/callbacks.py`.
"""

NAMES = ("tensorboard",)
