"""The models and their layers."""
