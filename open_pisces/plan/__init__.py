"""What a run will need, before anything is downloaded: parameters, memory, time, disk."""
