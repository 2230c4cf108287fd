"""Worker processes on this machine: how they start, what they may use, how they talk, how they end."""
