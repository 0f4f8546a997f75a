"""The model: single-device modules that know nothing of files of data, ranks or command lines."""
