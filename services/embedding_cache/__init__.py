"""Turns texts into vectors, from memory or through `inference`. A process: nothing imports it."""
