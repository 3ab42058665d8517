"""Processes, devices, and who watches."""
