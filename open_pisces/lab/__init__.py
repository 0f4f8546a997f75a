"""The paper's ablations in miniature: what is compared, the runs, and what may be concluded."""
