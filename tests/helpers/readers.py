"""Every reader of files and flags, by name, for the fuzz tests."""

import readers_of_data
import readers_of_files
import readers_of_flags

READERS = {**readers_of_files.READERS, **readers_of_data.READERS, **readers_of_flags.READERS}
