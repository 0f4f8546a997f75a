"""Generation: the one place where tokens and vectors are produced and become text and pictures."""
