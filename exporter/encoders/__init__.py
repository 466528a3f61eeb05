"""Encoders: from texts and images to model inputs."""
