"""The forms of one checkpoint that are timed, by the name of their folder."""

DENSE, FOUND, SMALLER = "dense", "found", "smaller"
"""Its dense twin, itself, and itself without its dead parts."""
