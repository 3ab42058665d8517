"""Every reader of files and flags, by name, for the fuzz tests."""

import readers_of_data
import readers_of_flags
import readers_of_networks
import readers_of_runs

MODULES = readers_of_networks, readers_of_runs, readers_of_data, readers_of_flags
READERS = {name: make for module in MODULES for name, make in module.READERS.items()}
