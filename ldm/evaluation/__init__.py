"""Measurements on reconstructions and generated images."""
