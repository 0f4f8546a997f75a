"""An HTTP server: the engine that batches requests, the process that it runs in, the routes, the page."""
