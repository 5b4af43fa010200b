"""Take a model to the device: export it to a file or folder, measure it, serve it."""
