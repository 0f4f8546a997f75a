"""Understanding benchmarks: questions about pictures, graded by the published rules."""
