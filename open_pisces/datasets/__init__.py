"""What makes datasets: importing, indexing, curating and counting; what a training step reads is in ``data``."""
