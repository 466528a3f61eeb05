"""Compression: what a model that was made smaller really is, and what that is worth where it runs."""
