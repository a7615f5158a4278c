"""What a model runs in: modes and threads, processes, memory, files, and what its code can reach."""
