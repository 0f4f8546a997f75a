"""Published weights as our parts: names, shapes and files of each family, every tensor accounted for."""
